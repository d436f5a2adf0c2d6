"""Run a stage's tasks as a Slurm job array: submit it, watch it, cancel it. What its jobs do is slurm_worker.py's.

Each job of the array is a worker that takes tasks until none is left, so thousands of tasks need no more jobs than
there are workers. All is said through the stage's directory, which every machine sees:

    done/00003.json      the task's record, as everywhere; nothing else says that a task is finished
    slurm/name           the name of the job; written before it is submitted
    slurm/work.pickle    what to do: function and tasks; worker.sh is what Slurm starts
    slurm/claims/00003   a link that names the worker that took the task; of two that try, one succeeds
    slurm/failed/00003   the error that the task raised, pickled
    slurm/2.log          what job 2 of the array printed

slurm/ goes when all tasks are done. While its job is in the queue nobody else works in the directory: a start finds
what an earlier one has left at work, and waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from btlm_jax.corpus.engine.progress import Progress
from btlm_jax.corpus.engine.slurm_worker import CLAIMS, FAILED, WORK, Work, claim_path
from btlm_jax.corpus.engine.tasks import DONE_FOLDER, Run, Task, record_path
from btlm_jax.corpus.engine.workers import Done
from btlm_jax.storage.files import write_atomically

FOLDER, NAME_FILE, _SCRIPT = "slurm", "name", "worker.sh"
POLL_SECONDS = 10.0  # between looks at the queue, which belongs to all users
_CANCEL_SECONDS = 2.0  # the same, for somebody who waits
VISIBLE_SECONDS = 60.0  # for which NFS may not show a file that another machine has written
_SHOWN = 3  # unfinished tasks that an error names

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmWorkers:
    """An array of at most `count` jobs; `options` are sbatch's."""

    count: int
    options: tuple[str, ...]
    log: Log

    def run_tasks(
        self, run: Run, tasks: Sequence[Task], directory: Path, *, name: str, progress: Progress, done: Done
    ) -> None:
        """Run tasks, as `Workers` says; Ctrl-C cancels the job, a watcher that is killed leaves it at work."""
        if not tasks:
            return
        if shutil.which("sbatch") is None:
            raise _not_here("sbatch")
        for task in tasks:
            record_path(directory, task).unlink(missing_ok=True)  # its outputs are gone
        job = _prepare(Work(run=run, tasks=tuple(tasks), directory=directory.absolute()), name=name, log=self.log)
        left = {record_path(directory, task).name: task for task in tasks}

        def collect() -> None:
            for file in sorted(left.keys() & set(os.listdir(directory / DONE_FOLDER))):
                task = left.pop(file)
                record = json.loads(record_path(directory, task).read_bytes())
                progress.count_record(record["counted"])
                done(task, record)
            progress.report_if_due()

        with job.cancelled_by_ctrl_c():
            job.submit(count=min(self.count, len(tasks)), options=self.options)
            for _ in job.until_gone(POLL_SECONDS):
                collect()
                if not left or job.errors():
                    job.cancel("--state=PENDING")  # has nothing to do
            deadline = time.monotonic() + VISIBLE_SECONDS
            while collect() or left and not job.errors() and time.monotonic() < deadline:
                time.sleep(min(1.0, POLL_SECONDS))
        for error in job.errors():
            raise error
        if left:
            raise ValueError(job.epitaph(list(left.values()), num_tasks=len(tasks)))
        shutil.rmtree(job.folder)


def wait_for_earlier_job(directory: Path, *, name: str, log: Log) -> None:
    """Wait until no job works in the directory that a killed start of this stage has left behind; Ctrl-C cancels it.

    Raises:
      OSError: there may be one, and this machine cannot tell.
    """
    folder = directory / FOLDER
    if not (folder / NAME_FILE).is_file():
        return
    job = _Job(folder=folder, stage=name, name=(folder / NAME_FILE).read_text(), log=log)
    if shutil.which("squeue") is None:
        raise OSError(
            f"the Slurm job {job.name} may still be at work in {directory}, and squeue is not installed here: run the "
            f"same command where Slurm is; if the job is surely gone, delete {folder} first"
        )
    with job.cancelled_by_ctrl_c():
        for _ in job.until_gone(POLL_SECONDS):
            pass


def _prepare(work: Work, *, name: str, log: Log) -> _Job:
    """Write down what the jobs are to do."""
    folder = work.directory / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for made in (folder / CLAIMS, folder / FAILED):
        made.mkdir(parents=True)
    job = _Job(folder=folder, stage=name, name=f"btlm-{name.replace(' ', '-')}-{secrets.token_hex(6)}", log=log)
    (folder / WORK).write_bytes(pickle.dumps(work))
    command = [sys.executable, "-m", Work.__module__, str(folder)]
    (folder / _SCRIPT).write_text(f"#!/bin/sh\nexec srun {shlex.join(command)}\n")
    write_atomically(folder / NAME_FILE, job.name)
    return job


@dataclasses.dataclass(kw_only=True)
class _Job:
    """An array in the queue, or one that was there."""

    folder: Path
    stage: str
    name: str  # in the queue; no other job has it
    log: Log
    number: str = ""  # that sbatch gave it

    def submit(self, *, count: int, options: Sequence[str]) -> None:
        """Queue the array.

        Raises:
          OSError: Slurm is not here, or refuses.
        """
        said = _slurm(
            ["sbatch", "--parsable", f"--job-name={self.name}", f"--array=0-{count - 1}", f"--chdir={Path.cwd()}"]
            + [f"--output={self.folder}/%a.log", "--open-mode=append", *options, str(self.folder / _SCRIPT)]
        )
        self.number = said.strip().split(";")[0]
        self.log(f"{self.stage}: submitted as Slurm job {self.number}, {count} jobs; Ctrl-C cancels it")

    def until_gone(self, interval: float) -> Iterator[None]:
        """Yield every `interval` seconds until no job of the array is in the queue; say when what is there changes."""
        told = ""
        while True:
            try:
                states = _slurm(["squeue", "--noheader", "--array", f"--name={self.name}", "--format=%T (%r)"])
            except OSError as error:  # the controller is busy, or restarts; the job does not care
                states, says = "unknown", str(error)
            else:
                counts = Counter(line.strip().removesuffix(" (None)") for line in states.splitlines())
                says = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
            if not states:
                return
            if says != told:
                self.log(f"{self.stage}: in the queue as {self.name}: {says}")
                told = says
            yield
            time.sleep(interval)

    def cancel(self, *options: str) -> None:
        """Ask Slurm to end the jobs, or those that the options choose."""
        with contextlib.suppress(OSError):  # who waits for them sees whether they are gone, and asks again
            _slurm(["scancel", f"--name={self.name}", *options])

    @contextlib.contextmanager
    def cancelled_by_ctrl_c(self) -> Iterator[None]:
        """Cancel the array if the block is interrupted, and wait until its jobs have ended."""
        try:
            yield
        except KeyboardInterrupt:
            self.log(f"{self.stage}: cancelling {self.name}; Ctrl-C again leaves it to Slurm")
            self.cancel()
            for _ in self.until_gone(_CANCEL_SECONDS):
                self.cancel()
            raise

    def errors(self) -> list[Exception]:
        """Return what tasks have raised."""
        names = sorted(name for name in os.listdir(self.folder / FAILED) if not name.startswith("."))
        return [pickle.loads((self.folder / FAILED / name).read_bytes()) for name in names]

    def epitaph(self, left: Sequence[Task], *, num_tasks: int) -> str:
        """Say which tasks the jobs have not finished, how these ended, and what to do."""
        found = [self._fate(task) for task in left[:_SHOWN]]
        return (
            f"{self.stage}: Slurm job {self.number} has ended and left {len(left)} of {num_tasks} tasks: "
            f"{'; '.join(found)}{'; ...' * (len(left) > _SHOWN)}. Finished work is kept: run the same command again, "
            "with --sbatch='--mem-per-cpu=8G --time=24:00:00' or the like if memory or time was short"
        )

    def _fate(self, task: Task) -> str:
        claim = claim_path(self.folder, task)
        begun = claim.is_symlink()
        index = os.readlink(claim).split(".")[0] if begun else "0"
        state = self._end_states().get(f"{self.number}_{index}", "in a state that sacct does not know")
        log = self.folder / f"{index}.log"
        lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        doing = f"{task} was taken by" if begun else f"{task} was not begun;"
        return f"{doing} job {self.number}_{index}, which ended {state}; the last line of its log {log}: {last}"

    def _end_states(self) -> dict[str, str]:
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={self.number}"]
        try:
            said = _slurm([*command, "--format=JobID,State,ExitCode"])
        except OSError:  # not every cluster keeps accounts
            return {}
        rows = [line.split("|") for line in said.splitlines()]
        return {job: f"{state} (exit code {code})" for job, state, code in rows}


def _slurm(command: Sequence[str]) -> str:
    """Run one of Slurm's commands and return what it printed."""
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise _not_here(command[0]) from error
    if made.returncode:
        raise OSError(f"{command[0]} failed: {' '.join(made.stderr.split()) or f'exit code {made.returncode}'}")
    return made.stdout


def _not_here(command: str) -> OSError:
    return OSError(f"{command} is not installed here; give --executor=slurm on a login node of a Slurm cluster")
