"""Batches for one rank, in threads or worker processes."""
