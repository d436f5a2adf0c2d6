"""The proxy of the search: configs/local_cpu.py's shape with 4,096 ids and BTLM's constants, a third of its tokens.

A trial of all tokens takes about a minute on 2 cores. "quick" is a smaller proxy, "large" local_cpu's own tokens.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

STEP = 8 * 128  # tokens


def get_config(size: str = "") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "local_cpu.py"))["get_config"]()
    steps = {"quick": (24, 12), "": (150, 50), "large": (450, 150)}[size]
    config.mup.output_multiplier = 2.22  # BTLM's, as all others
    if size == "quick":
        config.model.update(vocab_size=512, num_layers=2, d_model=64, num_heads=2, d_ff=170)
        config.mup.update(base_d_model=64.0, base_d_ff=170.0, base_num_layers=2)
    config.curriculum.update(num_tokens=(steps[0] * STEP, steps[1] * STEP))
    config.optimizer.update(warmup_tokens=sum(steps) // 15 * STEP)
    config.corpus.update(max_bytes=2_000_000 if size == "quick" else 16_000_000)
    config.evaluation.update(every_steps=1_000_000, blocks_per_source=16)
    config.checkpoint.update(every_steps=1_000_000, keep_last=1)
    config.log.update(every_steps=20, sample_tokens=1)
    return config
