"""What a run records about itself: its history, metrics, samples, settings and loaders."""
