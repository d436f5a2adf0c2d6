"""A job of a Slurm array: take tasks until none is left. `python -m btlm_jax.corpus.engine.slurm_worker FOLDER`."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import socket
import sys
from pathlib import Path

from btlm_jax.corpus.engine.tasks import Run, Task, count_nothing, record_path, run_task
from btlm_jax.corpus.engine.workers import leave
from btlm_jax.storage.files import write_atomically

WORK, CLAIMS, FAILED = "work.pickle", "claims", "failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The tasks of one array, and how each is run."""

    run: Run
    tasks: tuple[Task, ...]
    directory: Path


def work(folder: Path, *, array_task: str, process: str) -> int:
    """Run tasks that nobody has taken until there are none, or one has failed; return the exit code.

    A job that Slurm starts anew, after its machine was lost, takes up the task that it had.
    """
    todo: Work = pickle.loads((folder / WORK).read_bytes())
    for task in todo.tasks:
        if any((folder / FAILED).iterdir()):
            return 0
        if not _claim(folder, task, worker=f"{array_task}.{process}") or record_path(todo.directory, task).is_file():
            continue
        print(f"{task} on {socket.gethostname()}", flush=True)
        try:
            run_task(todo.run, task, todo.directory, count_nothing)
        except (ValueError, OSError) as error:
            write_atomically(folder / FAILED / f"{task.index:05d}", pickle.dumps(error))
            print(f"{task} failed: {error}", flush=True)
            return 1
    return 0


def claim_path(folder: Path, task: Task) -> Path:
    """Return the link that names the worker that took a task."""
    return folder / CLAIMS / f"{task.index:05d}"


def _claim(folder: Path, task: Task, *, worker: str) -> bool:
    path = claim_path(folder, task)
    try:
        os.symlink(worker, path)  # in one step, on every shared file system
    except FileExistsError:
        return os.readlink(path) == worker
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    environment = os.environ
    sys.exit(
        work(
            Path(sys.argv[1]),
            array_task=environment["SLURM_ARRAY_TASK_ID"],
            process=environment.get("SLURM_PROCID", "0"),
        )
    )
