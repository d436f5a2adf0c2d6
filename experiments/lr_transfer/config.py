"""Learning-rate sweeps: the largest model of both ladders. Widths double from mup.base_d_model to model.d_model, at the
depth mup.base_num_layers; depths from that to model.num_layers, at the base width.

Constants with coordinates near 1 at width 64, as of `btlm tune coord-check` without a config: sigma = 1 / sqrt(64),
embedding x 8, logits x 0.25. BTLM's own are tuned at width 256 and chaotic in the first steps below it. "" is for 2 CPU
cores, "quick" ends within minutes, "large" is for a GPU: BTLM's constants from width 256 on.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

STEP = 8 * 64  # tokens


def get_config(size: str = "") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "local_cpu.py"))["get_config"]()
    if size == "large":
        step = 256 * 512
        config.model.update(vocab_size=32768, num_layers=32, d_model=2048, num_heads=32, d_ff=5456, dtype="bfloat16")
        config.mup.update(base_d_ff=682.0)
        config.curriculum.update(seq_len=(512,), batch_size=(256,), num_tokens=(4000 * step,))
        config.optimizer.update(warmup_tokens=400 * step)
        return config
    num_steps = 120 if size == "quick" else 240
    wide, deep = (128, 4) if size == "quick" else (512, 16)
    config.model.update(
        vocab_size=512, num_layers=deep, d_model=wide, num_heads=wide // 32, d_ff=170 * wide // 64, remat="none",
        loss_chunk=64,
    )  # fmt: skip
    config.mup.update(
        base_d_model=64.0, base_d_ff=170.0, base_num_layers=2, init_std=0.125, embedding_multiplier=8.0,
        output_multiplier=0.25,
    )  # fmt: skip
    config.curriculum.update(seq_len=(64,), batch_size=(8,), num_tokens=(num_steps * STEP,))
    config.optimizer.update(
        peak_learning_rate=2.0**-6, end_learning_rate=0.0085 * 2.0**-6, warmup_tokens=num_steps // 10 * STEP
    )
    config.corpus.update(max_bytes=2_000_000 if size == "quick" else 16_000_000)
    config.evaluation.update(every_steps=1_000_000, blocks_per_source=32)
    config.checkpoint.update(every_steps=1_000_000, keep_last=1)
    config.log.update(every_steps=20, sample_tokens=1)
    return config
