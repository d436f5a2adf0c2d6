"""A job of a Slurm array: run tasks until none is left. `python -m btlm_jax.corpus.engine.slurm_worker FOLDER`."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import socket
import sys
from pathlib import Path

from btlm_jax.corpus.engine.tasks import Task, TaskFunction, no_heartbeat, record_path, run_task
from btlm_jax.corpus.engine.workers import exit_on_signal
from btlm_jax.storage.files import write_atomically

WORK_FILE, CLAIMS_FOLDER, FAILED_FOLDER = "work.pickle", "claims", "failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskList:
    """The tasks of one array, and the function that runs each."""

    run: TaskFunction
    tasks: tuple[Task, ...]
    directory: Path


def run_unclaimed_tasks(folder: Path, *, array_task: str, process: str) -> int:
    """Claim and run tasks until none is unclaimed or one has failed; return the exit code.

    A job that Slurm has restarted because it lost the machine runs the task again that it had claimed.
    """
    task_list: TaskList = pickle.loads((folder / WORK_FILE).read_bytes())
    for task in task_list.tasks:
        if any((folder / FAILED_FOLDER).iterdir()):
            return 0
        is_claimed = _claim(folder, task, worker=f"{array_task}.{process}")
        if not is_claimed or record_path(task_list.directory, task).is_file():
            continue
        print(f"{task} on {socket.gethostname()}", flush=True)
        try:
            run_task(task_list.run, task, task_list.directory, no_heartbeat)
        except (ValueError, OSError) as error:
            write_atomically(folder / FAILED_FOLDER / f"{task.index:05d}", pickle.dumps(error))
            print(f"{task} failed: {error}", flush=True)
            return 1
    return 0


def claim_path(folder: Path, task: Task) -> Path:
    """Return the symlink that names the worker that runs a task."""
    return folder / CLAIMS_FOLDER / f"{task.index:05d}"


def _claim(folder: Path, task: Task, *, worker: str) -> bool:
    """Return whether the task is this worker's: claimed now, or before a restart."""
    path = claim_path(folder, task)
    try:
        os.symlink(worker, path)  # atomic on every shared file system
    except FileExistsError:
        return os.readlink(path) == worker
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, exit_on_signal)
    sys.exit(
        run_unclaimed_tasks(
            Path(sys.argv[1]),
            array_task=os.environ["SLURM_ARRAY_TASK_ID"],
            process=os.environ.get("SLURM_PROCID", "0"),
        )
    )
