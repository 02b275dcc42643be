"""The format of a checkpoint on disk: reading, writing, committing, verifying and exporting."""
