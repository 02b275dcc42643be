"""Records that a run keeps: history, metrics, samples, settings and loaders."""
