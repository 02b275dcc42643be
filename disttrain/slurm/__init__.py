"""SLURM support: job descriptions, scripts, cluster commands, and requeueing."""
