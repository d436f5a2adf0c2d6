"""The experiment with near-duplicates; "large" is for a GPU."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "") -> ConfigDict:
    made = runpy.run_path(str(Path(__file__).parents[1] / "base_config.py"))
    if size == "large":
        return made["get_large_config"]()
    config, step = made["get_config"](), made["STEP"]
    num_steps = 64 if size == "quick" else 600
    width = 64 if size == "quick" else 96
    config.model.update(num_layers=2, d_model=width, num_heads=2, d_ff=width * 8 // 6 * 2)
    config.mup.update(base_d_model=float(width), base_d_ff=float(width * 8 // 6 * 2))
    config.curriculum.update(seq_len=(256,), batch_size=(4,), num_tokens=(num_steps * step,))
    config.optimizer.update(warmup_tokens=num_steps // 10 * step)
    return config
