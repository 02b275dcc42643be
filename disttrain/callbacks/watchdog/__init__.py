"""Detects a hang, reports where every rank is, and ends the run."""
