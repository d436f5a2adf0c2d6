"""A training run loads few of the package's modules, all of them before its first step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import loaded_modules
from support.real_store import write_config
from support.run_command import ONE_PHASE

MAX_MODULES = 61  # of ours, in sys.modules after the first logged step
TESTS = Path(__file__).parents[1]


def loaded(folder: Path, config: Path, *options: str) -> dict[str, set[str]]:
    """Run `btlm train` in a process of its own; return the modules that it had loaded, by moment."""
    command = [sys.executable, loaded_modules.__file__, folder / "modules.json", "train", f"--config={config}"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    result = subprocess.run(
        [*command, f"--workdir={folder / 'run'}", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return {moment: set(names) for moment, names in json.loads((folder / "modules.json").read_text()).items()}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("btlm_jax")}


def folders(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if "." in name}


@pytest.mark.slow
def test_a_run_that_makes_its_store_loads_few_modules_and_none_in_its_loop(tmp_path):
    config = write_config(tmp_path / "config.py", store="store", corpus__source="installed_python", **ONE_PHASE)
    modules = loaded(tmp_path, config, "--made_up")
    assert len(ours(modules["first step"])) <= MAX_MODULES, sorted(modules["first step"])
    assert "corpus" in folders(modules["first step"])  # which made the store
    assert not folders(modules["first step"]) & {"convert", "plan", "tune", "quantize", "hub", "decode"}
    assert not modules["first step"] & (set(loaded_modules.LIBRARIES_FOR_OTHERS) - {"sentencepiece"})
    assert modules["last step"] == modules["first step"]
    # Plots and the sample are made when the last checkpoint is complete.
    late = modules["end"] - modules["last step"]
    assert folders(late) <= {"generate", "decode", "tokenizers", "kernels", "display", "storage", "train"}
    assert {name for name in late if name.startswith("btlm_jax.train.")} == {"btlm_jax.train.plots"}
