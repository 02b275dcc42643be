"""Checkpoints: one directory format for all strategies and world sizes, committed atomically."""
