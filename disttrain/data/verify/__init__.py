"""Checking and measuring shards."""
