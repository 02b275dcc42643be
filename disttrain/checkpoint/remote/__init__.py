"""Copies of checkpoints on remote storage."""
