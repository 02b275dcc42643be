"""Processes: how they find each other, agree, and end together."""
