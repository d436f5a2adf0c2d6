"""Executors of a stage's tasks: this process, or worker processes on this machine (see slurm.py, ray_workers.py too).

All write the same bytes. An interrupted or failed run leaves finished tasks with their records and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from btlm_jax.corpus.engine.progress import Progress, SharedCounters, make_counters, record_peak, shared_heartbeat
from btlm_jax.corpus.engine.tasks import Task, TaskFunction, run_task

_STOP_SECONDS = 5.0  # for interrupted workers to delete their unfinished files
_QUEUED_PER_WORKER = 2  # tasks submitted ahead, so that no worker waits for the parent

OnDone = Callable[[Task, dict], None]  # takes a finished task and its record


class Workers(Protocol):
    """An executor of tasks, on one machine or on several that share the stage's directory."""

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
        """Run tasks, calling `on_done` for each that finishes, in any order; raise the first failure, starting no more.

        Raises:
          ValueError: a task refused its input, or a worker process was killed.
          OSError: a task cannot read or write, or the workers cannot be reached.
        """


@dataclasses.dataclass(frozen=True)
class LocalWorkers:
    """Run tasks in this process, or in `count` processes that it starts."""

    count: int

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
        """Run tasks; see `Workers`."""
        if self.count == 1:
            for task in tasks:
                on_done(task, run_task(run, task, directory, progress.add))
        elif tasks:
            _run_in_pool(run, tasks, directory, name=name, count=self.count, progress=progress, on_done=on_done)


def _run_in_pool(
    run: TaskFunction,
    tasks: Sequence[Task],
    directory: Path,
    *,
    name: str,
    count: int,
    progress: Progress,
    on_done: OnDone,
) -> None:
    context = multiprocessing.get_context("spawn")  # the parent has threads, whose locks a fork would copy in any state
    counters = make_counters(context)
    earlier_children = set(multiprocessing.active_children())
    waiting = iter(tasks)
    running: dict[Future, Task] = {}
    with ProcessPoolExecutor(count, context, initializer=_init_worker, initargs=(counters,)) as pool:
        try:
            while True:
                with _interrupts_blocked():
                    for task in itertools.islice(waiting, _QUEUED_PER_WORKER * count - len(running)):
                        running[pool.submit(_run_in_worker, run, task, directory)] = task
                if not running:
                    break
                ended, _ = wait(running, timeout=progress.interval, return_when=FIRST_COMPLETED)
                progress.read_counters(counters)
                for future in ended:
                    on_done(running.pop(future), future.result())
        except BrokenProcessPool as error:
            raise ValueError(
                f"{name}: a worker was killed, perhaps for its memory; finished work is kept: run the same "
                "command again, with fewer --workers if memory is short"
            ) from error
        except KeyboardInterrupt:
            _stop(set(multiprocessing.active_children()) - earlier_children)
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # waits for running tasks


def _stop(processes: set[BaseProcess]) -> None:
    """End processes; kill those that are in a library which does not look at signals."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.0))
    for process in processes:
        process.kill()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT; processes started inside inherit that and never see Ctrl-C, so that only the parent handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_counters: SharedCounters | None = None


def _init_worker(counters: SharedCounters) -> None:
    global _counters  # shared memory reaches a spawned process only through its initializer
    _counters = counters
    signal.signal(signal.SIGTERM, exit_on_signal)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def exit_on_signal(signum, frame):
    """Handle a signal by raising SystemExit, so that unfinished files are deleted on the way out."""
    raise SystemExit(128 + signum)


def _exit_with_parent() -> None:
    """Exit when the parent has died: its next start would run the same task at the same time."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_in_worker(run: TaskFunction, task: Task, directory: Path) -> dict:
    assert _counters is not None
    try:
        record = run_task(run, task, directory, shared_heartbeat(_counters))
    except SystemExit:
        os._exit(1)  # its files are deleted by now; a normal exit would let the pool start the next task
    record_peak(_counters)
    return record
