"""The family's shape at 124 M parameters on a v5e host of 8 chips (v5e:2x4, v5litepod-8).

The smallest layout of the table, which the tests compile again. The optimizer's values are the 3B's, not tuned for
batches an eighth as large. How a pod's config is made: btlm_jax/plan/make_table.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

TOPOLOGY = "v5e:2x4"
OTHERS = (dict(accumulation=1),)
TOKENS_PER_STEP = 256 * 2048


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent.parent / "btlm_3b_8k.py"))["get_config"]()
    config.model.update(num_layers=12, d_model=768, num_heads=12, d_ff=2048, remat="matmuls_saved")
    config.curriculum.update(batch_size=(256, 64), num_tokens=(3600 * TOKENS_PER_STEP, 1200 * TOKENS_PER_STEP))
    config.optimizer.warmup_tokens = 95 * TOKENS_PER_STEP
    config.evaluation.batch_size = 64
    config.mesh.accumulation = 4
    return config
