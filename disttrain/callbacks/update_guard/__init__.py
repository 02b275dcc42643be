"""Skips harmful updates, and rolls the run back when there are too many."""
