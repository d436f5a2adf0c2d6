"""The config of the coordinate check, with BTLM's constants.

"" is configs/local_cpu.py from width 256 on; "quick" the proxy of the sweeps from width 64 on; "large" the paper's,
which needs a machine that holds four of its layers at width 1,024.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).parents[2]


def get_config(size: str = "") -> ConfigDict:
    if size == "quick":
        config = runpy.run_path(str(ROOT / "experiments" / "lr_transfer" / "config.py"))["get_config"]("quick")
        config.model.update(num_layers=2)
        return config
    name = "btlm_3b_8k" if size == "large" else "local_cpu"
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    config.mup.output_multiplier = 2.22  # BTLM's
    return config
