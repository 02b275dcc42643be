"""Making shards."""
