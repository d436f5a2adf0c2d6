"""The family on one H100 or A100 of 80 GB: gpu/80gb_1:SIZE, of 111M, 256M, 590M, 1.3B, 2.7B; 1.3B without one.

Train:      launch/gpu.sh gpu/80gb_1:1.3B DIR --config.data.store=STORE
Memory:     in LAYOUTS, GiB of a GPU at 2,048 tokens, of 71.2 that JAX may take (nine tenths), compiled without one:
            btlm plan --config=gpu/80gb_1:SIZE --topology=h100-1 (jax 0.10.2, cuDNN 9.20, 2026-11-30). Not measured.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

LAYOUTS = {
    "111M": dict(accumulation=4, remat="matmuls_saved", evaluation=12),  # 26.1
    "256M": dict(accumulation=8, remat="matmuls_saved", evaluation=8),  # 38.2
    "590M": dict(accumulation=16, remat="matmuls_saved", evaluation=6),  # 45.3
    "1.3B": dict(accumulation=64, remat="matmuls_saved", evaluation=4),  # 46.7
    "2.7B": dict(accumulation=192, remat="full", evaluation=2),  # 57.9
}


def family_config(name: str, layouts: dict, size: str) -> ConfigDict:
    """Return the family's config of a size, laid out as this file or one beside it says."""
    if size not in layouts:
        raise ValueError(f"{name} has no size {size!r}, but {', '.join(layouts)}")
    config = runpy.run_path(str(Path(__file__).parent.parent / "family" / f"{size}.py"))["get_config"]()
    layout = layouts[size]
    config.mesh.update(tensor=1, context=1, accumulation=layout["accumulation"])
    config.model.remat = layout["remat"]
    config.evaluation.batch_size = layout["evaluation"]
    return config


def get_config(size: str = "1.3B") -> ConfigDict:
    return family_config("gpu/80gb_1", LAYOUTS, size)
