"""The only package that uses protected parts of Lightning, so its tests are the first to fail on a new version."""
