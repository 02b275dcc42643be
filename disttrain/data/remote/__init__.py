"""Ranged reads from HTTP servers and object stores."""
