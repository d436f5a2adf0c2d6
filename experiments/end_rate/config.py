"""The experiment with the schedule's end: 0.16 M parameters, 1.2 tokens a parameter and 10; "large" is for a GPU."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "") -> ConfigDict:
    made = runpy.run_path(str(Path(__file__).parents[1] / "base_config.py"))
    if size == "large":
        return made["get_large_config"]()
    config, step = made["get_config"](), made["STEP"]
    num_steps = 60 if size == "quick" else 200
    config.model.update(d_model=64, d_ff=170)
    config.mup.update(base_d_model=64.0, base_d_ff=170.0)
    config.curriculum.update(seq_len=(128,), batch_size=(8,), num_tokens=(num_steps * step,))
    config.optimizer.update(warmup_tokens=num_steps // 10 * step)
    return config
