"""BTLM-3B-8K, the paper's run, on v6e-256, a whole v6e pod (v6e:16x16; Google Cloud's v6e-256).

Command:   btlm train --config=configs/pods/v6e_256.py --workdir=DIR --config.data.store=STORE --distributed
What it needs and should take: table.md, made by btlm plan --table=configs/pods/table.json
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

TOPOLOGY = "v6e:16x16"
OTHERS = ()


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent.parent / "btlm_3b_8k.py"))["get_config"]()
    config.mesh.update(tensor=1, context=8, accumulation=1, gradient_dtype="bfloat16")
    config.model.update(remat="attention_saved", loss_chunk=1024)
    return config
