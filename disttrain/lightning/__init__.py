"""The only place that names protected parts of Lightning; against another Lightning, its tests fail first."""
