"""A stage of five tasks, and ways in which a task may end. Imports little: workers elsewhere load it from the start."""

import os
import signal
from pathlib import Path

from btlm_jax.corpus.engine.stage import Stage
from btlm_jax.corpus.engine.tasks import Task, TaskFunction


def counting(run: TaskFunction) -> Stage:
    tasks = [Task(index=index, inputs=(), weight=1) for index in range(5)]
    return Stage(name="counting things", settings={}, tasks=tasks, run=run)


def begun(directory: Path) -> dict[str, int]:
    """Return how often each task was run."""
    return {path.name: path.stat().st_size for path in directory.glob("begun-*")}


def count(task, directory, heartbeat):
    with open(directory / f"begun-{task.index}", "a") as file:
        file.write("x")
    heartbeat(10, 2_000_000)
    return {"totals": {"seen": 1 + task.index}, "outputs": []}


def die(task, directory, heartbeat):
    if task.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return count(task, directory, heartbeat)


def refuse(task, directory, heartbeat):
    if task.index == 0:
        raise ValueError("task 0 cannot be done")
    return count(task, directory, heartbeat)


def write(task, directory, heartbeat):
    (directory / f"written-{task.index}").write_text("x")
    output = {"file": f"written-{task.index}", "num_bytes": 1, "sha256": ""}
    return count(task, directory, heartbeat) | {"outputs": [output]}
