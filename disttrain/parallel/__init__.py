"""The arithmetic of batches and gradients over ranks."""
