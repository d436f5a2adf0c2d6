"""The config of the curriculum experiment, whose runs this one measures."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "") -> ConfigDict:
    path = Path(__file__).parents[1] / "curriculum" / "config.py"
    return runpy.run_path(str(path))["get_config"](size)
