"""Run a stage's tasks as a Slurm job array: submit it, watch it, cancel it. slurm_worker.py is what its jobs run.

Each job of the array is a worker that runs tasks until none is left, so thousands of tasks need no more jobs than
there are workers. Parent and workers communicate through the stage's directory, which every machine must see:

    done/00003.json      the task's record, as with every executor; it alone marks a task as finished
    slurm/name           the name of the job; written before it is submitted
    slurm/work.pickle    the function and the tasks; worker.sh is the script that Slurm starts
    slurm/claims/00003   a symlink that names the worker that runs the task; of two that try, one succeeds
    slurm/failed/00003   the error that the task raised, pickled
    slurm/2.log          the output of job 2 of the array

slurm/ is deleted when all tasks are done. While its job is in the queue no other process works in the directory: a new
start finds the job that an earlier one left running, and waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import secrets
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from btlm_jax import ending_of, module_command
from btlm_jax.corpus.engine.progress import Progress
from btlm_jax.corpus.engine.slurm_worker import CLAIMS_FOLDER, FAILED_FOLDER, WORK_FILE, TaskList, claim_path
from btlm_jax.corpus.engine.tasks import DONE_FOLDER, Task, TaskFunction, record_path
from btlm_jax.corpus.engine.workers import OnDone
from btlm_jax.display.progress import Log
from btlm_jax.storage.files import read_json_object, write_atomically

FOLDER, NAME_FILE, _SCRIPT = "slurm", "name", "worker.sh"
POLL_SECONDS = 10.0  # between queries of the queue, which all users share
_CANCEL_SECONDS = 2.0  # the same while a user waits for the end of a cancelled job
VISIBLE_SECONDS = 60.0  # until NFS surely shows a file that another machine has written
_MAX_NAMED = 3  # unfinished tasks that an error names


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmWorkers:
    """Run tasks in an array of at most `count` jobs; `options` are passed to sbatch."""

    count: int
    options: tuple[str, ...]
    log: Log

    def run_tasks(
        self,
        run: TaskFunction,
        tasks: Sequence[Task],
        directory: Path,
        *,
        name: str,
        progress: Progress,
        on_done: OnDone,
    ) -> None:
        """Run tasks; see `Workers`. Ctrl-C cancels the job; if this process is killed, the job goes on."""
        if not tasks:
            return
        if shutil.which("sbatch") is None:
            raise _not_installed("sbatch")
        for task in tasks:
            record_path(directory, task).unlink(missing_ok=True)  # of a task whose outputs are missing
        job = _prepare(TaskList(run=run, tasks=tuple(tasks), directory=directory.absolute()), name=name, log=self.log)
        unfinished = {record_path(directory, task).name: task for task in tasks}

        def collect() -> None:
            for file in sorted(unfinished.keys() & set(os.listdir(directory / DONE_FOLDER))):
                task = unfinished.pop(file)
                record = read_json_object(record_path(directory, task))
                progress.add_record(record["counted"])
                on_done(task, record)
            progress.report_if_due()

        with job.cancelled_by_ctrl_c():
            job.submit(count=min(self.count, len(tasks)), options=self.options)
            for _ in job.poll_until_gone(POLL_SECONDS):
                collect()
                if not unfinished or job.errors():
                    job.cancel("--state=PENDING")  # jobs that would find no task
            deadline = time.monotonic() + VISIBLE_SECONDS
            while collect() or unfinished and not job.errors() and time.monotonic() < deadline:
                time.sleep(min(1.0, POLL_SECONDS))
        for error in job.errors():
            raise error
        if unfinished:
            raise ValueError(job.failure_message(list(unfinished.values()), num_tasks=len(tasks)))
        shutil.rmtree(job.folder)


def wait_for_earlier_job(directory: Path, *, name: str, log: Log) -> None:
    """Wait for the job that an earlier start, now killed, has left running in the directory; Ctrl-C cancels it.

    Raises:
      OSError: there may be such a job, and squeue is not installed here.
    """
    folder = directory / FOLDER
    if not (folder / NAME_FILE).is_file():
        return
    job = _Job(folder=folder, stage=name, name=(folder / NAME_FILE).read_text(encoding="utf-8"), log=log)
    if shutil.which("squeue") is None:
        raise OSError(
            f"the Slurm job {job.name} may still be at work in {directory}, and squeue is not installed here: run the "
            f"same command where Slurm is; if the job is surely gone, delete {folder} first"
        )
    with job.cancelled_by_ctrl_c():
        for _ in job.poll_until_gone(POLL_SECONDS):
            pass


def _prepare(task_list: TaskList, *, name: str, log: Log) -> _Job:
    """Write the files that the jobs read."""
    folder = task_list.directory / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for name_of_folder in (CLAIMS_FOLDER, FAILED_FOLDER):
        (folder / name_of_folder).mkdir(parents=True)
    job = _Job(folder=folder, stage=name, name=f"btlm-{name.replace(' ', '-')}-{secrets.token_hex(6)}", log=log)
    (folder / WORK_FILE).write_bytes(pickle.dumps(task_list))
    command = [*module_command(TaskList.__module__), str(folder)]
    (folder / _SCRIPT).write_text(f"#!/bin/sh\nexec srun {shlex.join(command)}\n", encoding="utf-8")
    write_atomically(folder / NAME_FILE, job.name)
    return job


@dataclasses.dataclass(kw_only=True)
class _Job:
    """A job array that is or was in the queue."""

    folder: Path
    stage: str
    name: str  # unique in the queue
    log: Log
    number: str = ""  # from sbatch

    def submit(self, *, count: int, options: Sequence[str]) -> None:
        """Queue the array.

        Raises:
          OSError: Slurm is not installed here, or refuses the job.
        """
        output = _slurm(
            ["sbatch", "--parsable", f"--job-name={self.name}", f"--array=0-{count - 1}", f"--chdir={Path.cwd()}"]
            + [f"--output={self.folder}/%a.log", "--open-mode=append", *options, str(self.folder / _SCRIPT)]
        )
        self.number = output.strip().split(";")[0]
        self.log(f"{self.stage}: submitted as Slurm job {self.number}, {count} jobs; Ctrl-C cancels it")

    def poll_until_gone(self, interval: float) -> Iterator[None]:
        """Yield every `interval` seconds until no job of the array is in the queue; log changes of their states."""
        logged = ""
        while True:
            try:
                states = _slurm(["squeue", "--noheader", "--array", f"--name={self.name}", "--format=%T (%r)"])
            except OSError as error:  # the controller is busy or restarting, which does not affect the job
                states, summary = "unknown", str(error)
            else:
                counts = Counter(line.strip().removesuffix(" (None)") for line in states.splitlines())
                summary = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
            if not states:
                return
            if summary != logged:
                self.log(f"{self.stage}: in the queue as {self.name}: {summary}")
                logged = summary
            yield
            time.sleep(interval)

    def cancel(self, *options: str) -> None:
        """Ask Slurm to cancel the jobs, or those that the options select."""
        with contextlib.suppress(OSError):  # callers poll the queue and try again
            _slurm(["scancel", f"--name={self.name}", *options])

    @contextlib.contextmanager
    def cancelled_by_ctrl_c(self) -> Iterator[None]:
        """Cancel the array if the block is interrupted, and wait until its jobs have ended."""
        try:
            yield
        except KeyboardInterrupt:
            self.log(f"{self.stage}: cancelling {self.name}; Ctrl-C again leaves it to Slurm")
            self.cancel()
            for _ in self.poll_until_gone(_CANCEL_SECONDS):
                self.cancel()
            raise

    def errors(self) -> list[Exception]:
        """Return the errors that tasks have raised."""
        names = sorted(name for name in os.listdir(self.folder / FAILED_FOLDER) if not name.startswith("."))
        return [pickle.loads((self.folder / FAILED_FOLDER / name).read_bytes()) for name in names]

    def failure_message(self, unfinished: Sequence[Task], *, num_tasks: int) -> str:
        """Return which tasks are unfinished, how the jobs that ran them ended, and what to do."""
        outcomes = [self._task_outcome(task) for task in unfinished[:_MAX_NAMED]]
        return (
            f"{self.stage}: Slurm job {self.number} has ended and left {len(unfinished)} of {num_tasks} tasks: "
            f"{'; '.join(outcomes)}{'; ...' * (len(unfinished) > _MAX_NAMED)}. Finished work is kept: run the same "
            "command again, with --sbatch='--mem-per-cpu=8G --time=24:00:00' or the like if memory or time was short"
        )

    def _task_outcome(self, task: Task) -> str:
        claim = claim_path(self.folder, task)
        was_claimed = claim.is_symlink()
        index = os.readlink(claim).split(".")[0] if was_claimed else "0"
        state = self._end_states().get(f"{self.number}_{index}", "in a state that sacct does not know")
        log = self.folder / f"{index}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        start = f"{task} was taken by" if was_claimed else f"{task} was not begun;"
        return f"{start} job {self.number}_{index}, which ended {state}; the last line of its log {log}: {last_line}"

    def _end_states(self) -> dict[str, str]:
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={self.number}"]
        try:
            output = _slurm([*command, "--format=JobID,State,ExitCode"])
        except OSError:  # not every cluster has accounting
            return {}
        rows = [line.split("|") for line in output.splitlines()]
        return {job: f"{state} (exit code {code})" for job, state, code in rows}


def _slurm(command: Sequence[str]) -> str:
    """Run a command of Slurm and return its output."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise _not_installed(command[0]) from error
    if result.returncode:
        raise OSError(f"{command[0]} failed: {' '.join(result.stderr.split()) or ending_of(result.returncode)}")
    return result.stdout


def _not_installed(command: str) -> OSError:
    return OSError(f"{command} is not installed here; give --executor=slurm on a login node of a Slurm cluster")
