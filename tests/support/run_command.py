"""The real command in a process of its own, for tests where the process matters, and what it leaves behind."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from btlm_jax.model import make_model, parameter_table
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import train_config_from
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.train import METRICS_FILE
from btlm_jax.train.checkpoint import Checkpointer
from btlm_jax.train.metric_writer import read_metrics
from btlm_jax.train.step import abstract_state

TOKENS_PER_STEP, PHASE_STEPS = 384, (6, 4)
NUM_STEPS = sum(PHASE_STEPS)
ONE_PHASE = {
    "curriculum__seq_len": (48,),
    "curriculum__batch_size": (8,),
    "curriculum__num_tokens": (3 * TOKENS_PER_STEP,),
    "checkpoint__every_steps": 2,
    "evaluation__every_steps": 2,
}  # changes of a config: three steps, which compile what the second phase does
TIMEOUT = 400.0  # seconds; an idle machine needs about 10

_CLOCK = ("tokens_per_second", "mfu", "seconds")


def start_btlm(*arguments, num_devices: int = 1, variables: Mapping[str, str] = {}, **options) -> subprocess.Popen:
    """Start `btlm ARGUMENTS` on simulated CPU devices, with changed environment variables; `options` are Popen's."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices), "PYTHONUNBUFFERED": "1"}
    environment |= variables
    return subprocess.Popen(
        [sys.executable, "-m", "btlm_jax", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finish_btlm(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for the end of a started command; one that takes too long is killed, and the test fails."""
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        pytest.fail(f"no end after {TIMEOUT:.0f} s:\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_btlm(*arguments, num_devices: int = 1, **options) -> subprocess.CompletedProcess:
    """Run `btlm ARGUMENTS` to its end."""
    return finish_btlm(start_btlm(*arguments, num_devices=num_devices, **options))


def train_arguments(config: Path, workdir: Path) -> list[str]:
    """Return the arguments of a training command."""
    return ["train", f"--config={config}", f"--workdir={workdir}"]


def recorded(workdir: Path, kind: str) -> list[dict]:
    """Return the lines of one kind ("train", "eval") of a run's metrics.jsonl, without what a clock decides."""
    rows = [row for row in read_metrics(workdir / METRICS_FILE) if row["kind"] == kind]
    return [{name: value for name, value in row.items() if name not in _CLOCK} for row in rows]


def checkpoint_steps(workdir: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def saved_state(workdir: Path, config_path: Path, *, step: int) -> list[np.ndarray]:
    """Return every array of a checkpoint: parameters, optimizer state and step counter."""
    scope = {}
    exec(compile(config_path.read_text(), str(config_path), "exec"), scope)
    config = train_config_from(scope["get_config"]().to_dict())
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    table = parameter_table(make_model(config.model, make_parametrization(config.mup, config.model)), mesh)
    checkpointer = Checkpointer(workdir, config=config.checkpoint)
    try:
        abstract = abstract_state(table, make_optimizer(config.optimizer, table), mesh)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpointer.restore_state(step, abstract=abstract))]
    finally:
        checkpointer.close()


def assert_same_run(workdir: Path, expected: Path, config: Path) -> None:
    """Assert that two runs of `config` recorded the same numbers and ended in the same state, to the bit."""
    for kind in ("train", "eval"):
        assert recorded(workdir, kind) == recorded(expected, kind)
    num_steps = checkpoint_steps(expected)[-1]
    for found, wanted in zip(
        saved_state(workdir, config, step=num_steps), saved_state(expected, config, step=num_steps), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def assert_refused(result: subprocess.CompletedProcess, *, code: int, said: tuple[str, ...]) -> None:
    """Assert that the command ended with `code` and told the user why, in `said`, without a traceback."""
    assert result.returncode == code, f"exit code {result.returncode}:\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    for part in said:
        assert part in result.stderr, f"{part!r} is not in:\n{result.stderr}"
