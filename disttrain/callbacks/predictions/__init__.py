"""Predictions, written to one file by all ranks."""
