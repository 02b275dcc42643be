"""Detect a hang, report where every rank is, and end the run."""
