"""The curriculum experiment: "" ran on 2 CPU cores, "quick" ends within minutes, "large" is for a GPU."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "") -> ConfigDict:
    made = runpy.run_path(str(Path(__file__).parents[1] / "base_config.py"))
    if size == "large":
        return made["get_large_config"]()
    config = made["get_config"]()
    if size == "quick":
        step = made["STEP"]
        config.model.update(d_model=64, d_ff=170)
        config.mup.update(base_d_model=64.0, base_d_ff=170.0)
        config.curriculum.update(num_tokens=(180 * step, 60 * step))
        config.optimizer.update(warmup_tokens=24 * step)
    return config
