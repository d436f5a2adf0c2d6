"""Who runs a stage's tasks: this process, or worker processes of this machine. Clusters have modules of their own.

The result is the same. An interrupted or failed run leaves finished tasks with their records and nothing of the others.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol

from btlm_jax.corpus.engine.progress import Progress, make_counters, record_peak, tick_of
from btlm_jax.corpus.engine.tasks import Run, Task, run_task

_QUEUED = 2  # tasks that are handed out for each worker

Done = Callable[[Task, dict], None]


class Workers(Protocol):
    """Who runs tasks: the processes of one machine, or of many that share the stage's directory."""

    def run_tasks(
        self, run: Run, tasks: Sequence[Task], directory: Path, *, name: str, progress: Progress, done: Done
    ) -> None:
        """Run tasks and call `done` with each that ends, in any order; at the first failure start no more and raise it.

        Raises:
          ValueError: a task refused its input, or a worker was killed.
          OSError: a task cannot read or write, or the workers cannot be reached.
        """


@dataclasses.dataclass(frozen=True)
class LocalWorkers:
    """This process, or `count` processes that it starts."""

    count: int

    def run_tasks(
        self, run: Run, tasks: Sequence[Task], directory: Path, *, name: str, progress: Progress, done: Done
    ) -> None:
        """Run tasks, as `Workers` says."""
        if self.count == 1:
            for task in tasks:
                done(task, run_task(run, task, directory, progress.tick))
        elif tasks:
            _run_in_pool(run, tasks, directory, name=name, count=self.count, progress=progress, done=done)


def _run_in_pool(
    run: Run, tasks: Sequence[Task], directory: Path, *, name: str, count: int, progress: Progress, done: Done
) -> None:
    context = multiprocessing.get_context("spawn")  # the parent has threads, which a fork would leave in any state
    counters = make_counters(context)
    others = set(multiprocessing.active_children())
    waiting = iter(tasks)
    running: dict[Future, Task] = {}
    with ProcessPoolExecutor(count, context, initializer=_begin_worker, initargs=(counters,)) as pool:
        try:
            while True:
                with _interrupts_blocked():
                    for task in itertools.islice(waiting, _QUEUED * count - len(running)):
                        running[pool.submit(_run_in_worker, run, task, directory)] = task
                if not running:
                    break
                ended, _ = wait(running, timeout=progress.interval, return_when=FIRST_COMPLETED)
                progress.count(counters)
                for future in ended:
                    done(running.pop(future), future.result())
        except BrokenProcessPool as error:
            raise ValueError(
                f"{name}: a worker was killed, perhaps for its memory; finished work is kept: run the same "
                "command again, with fewer --workers if memory is short"
            ) from error
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # waits for the tasks that run


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Hold Ctrl-C back; a process started here never sees it, so that its parent decides what becomes of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_counters: tuple = ()


def _begin_worker(counters: tuple) -> None:
    global _counters  # a spawned process gets shared memory at its start only
    _counters = counters
    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def leave(signum, frame):
    """End this process as an exception does, so that unfinished files are deleted."""
    raise SystemExit(128 + signum)


def _end_with_parent() -> None:
    """End this process when its parent is gone, whose next run would do the same task beside it."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run_in_worker(run: Run, task: Task, directory: Path) -> dict:
    try:
        record = run_task(run, task, directory, tick_of(_counters))
    except SystemExit:
        os._exit(1)  # its files are tidied up; the pool would go on with the next task
    record_peak(_counters)
    return record
