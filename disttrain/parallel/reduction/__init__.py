"""How gradients are added over ranks."""
