"""Jobs under SLURM: what a job is, its script, the commands of a cluster, and going on in the same job."""
