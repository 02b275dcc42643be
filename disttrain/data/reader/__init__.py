"""Random access to samples in local shards."""
