"""The config that the experiments vary: local_cpu's at width 96, with 2 layers and 1,024 ids: 0.3 M parameters."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

STEP = 1024  # tokens


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent.parent / "configs" / "local_cpu.py"))["get_config"]()
    config.model.update(vocab_size=1024, num_layers=2, d_model=96, num_heads=2, d_ff=256)
    config.mup.update(base_d_model=96.0, base_d_ff=256.0, output_multiplier=2.22)  # BTLM's
    config.curriculum.update(seq_len=(128, 512), batch_size=(8, 2), num_tokens=(360 * STEP, 120 * STEP))
    config.corpus.update(max_bytes=16_000_000)
    config.evaluation.update(every_steps=1_000_000, blocks_per_source=4)
    config.checkpoint.update(every_steps=200, keep_last=1)
    config.log.update(sample_tokens=1)
    return config


def get_large_config() -> ConfigDict:
    """Return what takes some ten minutes a run on one H200: BTLM's family at 40 M, 2,048 then 8,192 positions."""
    root = Path(__file__).parent.parent / "configs"
    config = runpy.run_path(str(root / "family" / "40M.py"))["get_config"]()
    return config
