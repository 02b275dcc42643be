"""Gradient reduction over ranks."""
