"""Saving in the background, from a copy in host memory."""
