"""The experiment with the options beyond BTLM's recipe: 1.1 M parameters, 300 steps, experiments/search's constants.

With BTLM's own output multiplier a good part of so short a run unlearns the first logits, which hides what an option
does. "quick" is smaller, "large" is for a GPU.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "") -> ConfigDict:
    made = runpy.run_path(str(Path(__file__).parents[1] / "base_config.py"))
    if size == "large":
        return made["get_large_config"]()
    config, step = made["get_config"](), made["STEP"]
    num_steps = 40 if size == "quick" else 300
    width, d_ff, layers = (64, 170, 2) if size == "quick" else (128, 342, 4)
    config.model.update(num_layers=layers, d_model=width, d_ff=d_ff, vocab_size=512 if size == "quick" else 2048)
    config.mup.update(
        base_d_model=float(width), base_d_ff=float(d_ff), base_num_layers=layers, init_std=0.12, output_multiplier=0.6
    )
    config.curriculum.update(num_tokens=(num_steps * 3 // 4 * step, num_steps // 4 * step))
    config.optimizer.update(
        peak_learning_rate=0.0085, end_learning_rate=7.225e-5, warmup_tokens=num_steps // 15 * step, weight_decay=0.053
    )
    config.checkpoint.update(every_steps=1_000_000)
    return config
