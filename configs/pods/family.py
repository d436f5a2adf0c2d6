"""The family on slices of 4 to 16 chips: pods/family:SIZE@SLICE, as 590M@v5e-16; 111M@v5e-8 without one.

Train:      btlm train --config=pods/family:256M@v5e-8 --workdir=DIR --config.data.store=STORE
            (16 chips are several hosts: with --distributed on each)
Times:      what a step needs and should take: table.md, made by btlm plan --table=configs/pods/table.json --only=family
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

LAYOUTS = {  # by size and slice
    "111M@v5e-8": dict(accumulation=1, remat="matmuls_saved"),
    "256M@v5e-8": dict(accumulation=5, remat="matmuls_saved"),
    "590M@v5e-8": dict(accumulation=6, remat="matmuls_saved"),
    "1.3B@v5e-8": dict(accumulation=16, remat="out_recomputed"),
    "111M@v5e-16": dict(accumulation=1, remat="matmuls_saved"),
    "256M@v5e-16": dict(accumulation=5, remat="matmuls_saved"),
    "590M@v5e-16": dict(accumulation=3, remat="matmuls_saved"),
    "1.3B@v5e-16": dict(accumulation=8, remat="matmuls_saved"),
    "111M@v6e-8": dict(accumulation=1, remat="matmuls_saved"),
    "256M@v6e-8": dict(accumulation=2, remat="matmuls_saved"),
    "590M@v6e-8": dict(accumulation=3, remat="matmuls_saved"),
    "1.3B@v6e-8": dict(accumulation=8, remat="matmuls_saved"),
    "111M@v4-8": dict(accumulation=2, remat="matmuls_saved"),
    "256M@v4-8": dict(accumulation=4, remat="matmuls_saved"),
    "590M@v4-8": dict(accumulation=8, remat="matmuls_saved"),
    "1.3B@v4-8": dict(accumulation=32, remat="matmuls_saved"),
    "111M@v5p-8": dict(accumulation=1, remat="matmuls_saved"),
    "256M@v5p-8": dict(accumulation=1, remat="matmuls_saved"),
    "590M@v5p-8": dict(accumulation=2, remat="matmuls_saved"),
    "1.3B@v5p-8": dict(accumulation=8, remat="matmuls_saved"),
}
TOPOLOGIES = {dial: dial.partition("@")[2] for dial in LAYOUTS}  # rows of the table


def get_config(dial: str = "111M@v5e-8") -> ConfigDict:
    if dial not in LAYOUTS:
        raise ValueError(f"pods/family has no {dial!r}, but {', '.join(LAYOUTS)}")
    size, layout = dial.partition("@")[0], LAYOUTS[dial]
    config = runpy.run_path(str(Path(__file__).parent.parent / "family" / f"{size}.py"))["get_config"]()
    config.mesh.update(tensor=1, context=1, accumulation=layout["accumulation"])
    config.model.remat = layout["remat"]
    config.evaluation.batch_size = config.curriculum.batch_size[-1] // layout["accumulation"]
    return config
