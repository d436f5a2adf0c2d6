"""BTLM-3B-8K, the paper's run, on 128 chips of v4 (v4:4x4x8; Google Cloud's v4-256).

Command:   btlm train --config=configs/pods/v4_128.py --workdir=DIR --config.data.store=STORE --distributed
What it needs and should take: table.md, made by btlm plan --table=configs/pods/table.json
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

TOPOLOGY = "v4:4x4x8"
OTHERS = (dict(accumulation=1),)  # in the table too


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent.parent / "btlm_3b_8k.py"))["get_config"]()
    config.mesh.update(tensor=1, context=4, accumulation=3)
    config.model.remat = "matmuls_saved"
    return config
