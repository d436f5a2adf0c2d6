"""BTLM-3B-8K, the paper's run, on 128 chips of v5p (v5p:4x4x8; Google Cloud's v5p-256).

Command:   btlm train --config=configs/pods/v5p_128.py --workdir=DIR --config.data.store=STORE --distributed
What it needs and should take: table.md, made by btlm plan --table=configs/pods/table.json
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

TOPOLOGY = "v5p:4x4x8"
OTHERS = ()


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent.parent / "btlm_3b_8k.py"))["get_config"]()
    config.mesh.update(tensor=1, context=4, accumulation=1)
    config.model.update(remat="matmuls_saved", loss_chunk=2048)
    return config
