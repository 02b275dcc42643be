"""Which samples the shards hold, and where."""
