"""How a stage runs: tasks, workers (local, Slurm, Ray), progress, manifests, resuming."""
