"""Remote shards as local files: a bounded cache per node."""
