"""Files, terminals, signals and devices. Knows nothing about training."""
