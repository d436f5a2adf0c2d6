"""The training run: setup, loop, step, checkpoints, metrics, held-out loss, finish. Here: the names in its workdir."""

CONFIG_FILE = "config.json"  # of the start that ran last
CHECKPOINTS = "checkpoints"  # directory; one directory a step
KEPT_TOKENIZER = "tokenizer"  # directory: the token store's tokenizer, so that the model can be used without the store
METRICS_FILE = "metrics.jsonl"  # a line a step, an evaluation or an event
STARTS = "starts"  # directory: of each start its command, its wall time by category, and how it ended
TENSORBOARD = "tensorboard"  # directory
TRACKERS = "trackers"  # directory: how far log.trackers are, and their logs and files
PROFILE = "profile"  # directory of what log.profile_steps traced
COMPILE_CACHE = "compile_cache"  # directory of JAX's compilation cache
LOSS_PLOT, POSITION_PLOT = "loss.png", "loss_by_position.png"
DAMAGED = "damaged"  # directory of checkpoints that were set aside because they are not as they were written
EVIDENCE = "bad_numbers"  # directory of what a run left that stopped on them
REPLACED = "replaced"  # directory of checkpoints and metrics that --resume_step set aside
INIT_FILE = "init.json"  # of a run that began with given weights: which, and what was taken of them
SUMMARY_FILE = "summary.json"  # of a finished run
