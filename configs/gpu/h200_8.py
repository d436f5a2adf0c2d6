"""The family on 8 H200: gpu/h200_8:SIZE, of 111M, 256M, 590M, 1.3B, 2.7B; 1.3B without one.

Train:      launch/gpu.sh gpu/h200_8:1.3B DIR --config.data.store=STORE
Memory:     in LAYOUTS, GiB of a GPU at 2,048 tokens, of 126.9 that JAX may take (nine tenths), compiled without one:
            btlm plan --config=gpu/h200_8:SIZE --topology=h200-8 (jax 0.10.2, cuDNN 9.20, 2026-11-30). Not measured.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

LAYOUTS = {
    "111M": dict(accumulation=1, remat="matmuls_saved", evaluation=48),  # 12.7
    "256M": dict(accumulation=1, remat="matmuls_saved", evaluation=40),  # 34.6
    "590M": dict(accumulation=1, remat="matmuls_saved", evaluation=48),  # 69.2
    "1.3B": dict(accumulation=2, remat="matmuls_saved", evaluation=64),  # 81.9
    "2.7B": dict(accumulation=6, remat="matmuls_saved", evaluation=48),  # 71.0
}


def get_config(size: str = "1.3B") -> ConfigDict:
    family_config = runpy.run_path(str(Path(__file__).with_name("80gb_1.py")))["family_config"]
    return family_config("gpu/h200_8", LAYOUTS, size)
