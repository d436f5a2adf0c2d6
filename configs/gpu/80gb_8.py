"""The family on 8 H100 or A100 of 80 GB: gpu/80gb_8:SIZE, of 111M, 256M, 590M, 1.3B, 2.7B; 1.3B without one.

Train:      launch/gpu.sh gpu/80gb_8:1.3B DIR --config.data.store=STORE
Memory:     in LAYOUTS, GiB of a GPU at 2,048 tokens, of 71.2 that JAX may take (nine tenths), compiled without one:
            btlm plan --config=gpu/80gb_8:SIZE --topology=h100-8 (jax 0.10.2, cuDNN 9.20, 2026-11-30). Not measured.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

LAYOUTS = {
    "111M": dict(accumulation=1, remat="matmuls_saved", evaluation=48),  # 12.7
    "256M": dict(accumulation=1, remat="matmuls_saved", evaluation=40),  # 34.6
    "590M": dict(accumulation=2, remat="matmuls_saved", evaluation=32),  # 35.8
    "1.3B": dict(accumulation=4, remat="matmuls_saved", evaluation=32),  # 43.3
    "2.7B": dict(accumulation=8, remat="matmuls_saved", evaluation=24),  # 55.4
}


def get_config(size: str = "1.3B") -> ConfigDict:
    family_config = runpy.run_path(str(Path(__file__).with_name("80gb_1.py")))["family_config"]
    return family_config("gpu/80gb_8", LAYOUTS, size)
