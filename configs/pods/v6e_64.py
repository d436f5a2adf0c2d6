"""BTLM-3B-8K, the paper's run, on 64 chips of v6e (v6e:8x8; Google Cloud's v6e-64).

Command:   btlm train --config=configs/pods/v6e_64.py --workdir=DIR --config.data.store=STORE --distributed
What it needs and should take: table.md, made by btlm plan --table=configs/pods/table.json
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

TOPOLOGY = "v6e:8x8"
OTHERS = ()  # layouts that stand in the table too


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent.parent / "btlm_3b_8k.py"))["get_config"]()
    config.mesh.update(tensor=1, context=2, accumulation=3, gradient_dtype="bfloat16")
    config.model.remat = "attention_saved"
    return config
