"""The experiment with near-duplicates; "large" is for a GPU."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "") -> ConfigDict:
    made = runpy.run_path(str(Path(__file__).parents[1] / "base_config.py"))
    if size == "large":
        return made["get_large_config"]()
    config, step = made["get_config"](), made["STEP"]
    num_steps = 240 if size == "quick" else 600
    if size == "quick":
        config.model.update(d_model=64, d_ff=170)
        config.mup.update(base_d_model=64.0, base_d_ff=170.0)
    config.curriculum.update(seq_len=(256,), batch_size=(4,), num_tokens=(num_steps * step,))
    config.optimizer.update(warmup_tokens=num_steps // 10 * step)
    return config
