"""When checkpoints are saved, and which are kept."""
