"""Checkpoints: one directory format for every strategy and world size, committed atomically."""
