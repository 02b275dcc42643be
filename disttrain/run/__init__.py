"""A run's folder and metrics, and the list of runs."""
