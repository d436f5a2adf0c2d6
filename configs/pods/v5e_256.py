"""BTLM-3B-8K, the paper's run, on v5e-256, a whole v5e pod (v5e:16x16; Google Cloud's v5litepod-256).

Command:   btlm train --config=configs/pods/v5e_256.py --workdir=DIR --config.data.store=STORE --distributed
What it needs and should take: table.md, made by btlm plan --table=configs/pods/table.json
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

TOPOLOGY = "v5e:16x16"
OTHERS = (dict(accumulation=1),)  # in the table too


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent.parent / "btlm_3b_8k.py"))["get_config"]()
    config.mesh.update(tensor=1, context=8, accumulation=3, gradient_dtype="bfloat16")
    config.model.remat = "matmuls_saved"
    return config
