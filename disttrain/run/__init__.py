"""A run's folder, its metrics, and the list of runs."""
