"""Predictions, written to one output by all ranks."""
