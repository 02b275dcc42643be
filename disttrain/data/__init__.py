"""From shards to batches, in an order that does not depend on the ranks."""
