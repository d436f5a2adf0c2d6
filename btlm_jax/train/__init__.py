"""The training run: setup, loop, step, checkpoints, metrics, held-out loss, finish."""
