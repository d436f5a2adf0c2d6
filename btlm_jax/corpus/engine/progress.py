"""A stage's progress in one line: shards, documents and megabytes a second, time left, memory."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path

from btlm_jax.display.progress import RateLimit

INTERVAL = 5.0  # seconds between lines


class Progress:
    """Counts what is done and says so every few seconds."""

    interval = INTERVAL

    def __init__(
        self, stage: str, *, num_tasks: int, num_done: int, weights: Sequence[int], log: Callable[[str], None]
    ):
        self._stage, self._num_tasks, self._num_done, self._log = stage, num_tasks, num_done, log
        self._weight_left = self._weight = sum(weights)
        self._num_documents = self._num_bytes = 0
        self._worker_peak = 0
        self._start, self._rate_limit = time.monotonic(), RateLimit(self.interval, is_due_at_start=False)
        if num_done:
            log(f"{stage}: {num_done} of {num_tasks} shards were done before")

    def tick(self, num_documents: int, num_bytes: int) -> None:
        """Count what a task in this process has done since its last tick."""
        self._num_documents += num_documents
        self._num_bytes += num_bytes
        self.report_if_due()

    def count(self, counters: tuple) -> None:
        """Take over what the workers have counted."""
        self._num_documents, self._num_bytes, self._worker_peak = (counter.value for counter in counters)
        self.report_if_due()

    def count_record(self, counted: dict) -> None:
        """Take over what a task on another machine has counted."""
        self._worker_peak = max(self._worker_peak, counted["peak_bytes"])
        self.tick(counted["documents"], counted["bytes"])

    def task_done(self, weight: int) -> None:
        """Count a finished shard."""
        self._num_done += 1
        self._weight_left -= weight
        self.report_if_due()

    def report(self) -> None:
        """Say how far the stage is."""
        self._rate_limit.restart()
        seconds = max(time.monotonic() - self._start, 1e-9)
        done = self._weight - self._weight_left
        left = "unknown" if not done else _clock(seconds * self._weight_left / done)
        self._log(
            f"{self._stage}: {self._num_done}/{self._num_tasks} shards, {self._num_documents:,} documents, "
            f"{self._num_documents / seconds:,.0f} documents/s, {self._num_bytes / 1e6 / seconds:.1f} MB/s, "
            f"ETA {left}, at most {max(peak_bytes(), self._worker_peak) / 1e6:.0f} MB a process"
        )

    def report_if_due(self) -> None:
        """Say how far the stage is, unless that was said a moment ago."""
        if self._rate_limit.is_due():
            self.report()


def make_counters(context: BaseContext) -> tuple:
    """Return the counters that workers share with the parent: documents, bytes of text, the largest memory of one."""
    return tuple(context.Value("q", 0) for _ in range(3))


def tick_of(counters: tuple) -> Callable[[int, int], None]:
    """Return a worker's tick."""

    def tick(num_documents: int, num_bytes: int) -> None:
        for counter, more in zip(counters[:2], (num_documents, num_bytes), strict=True):
            with counter.get_lock():
                counter.value += more

    return tick


def record_peak(counters: tuple) -> None:
    """Tell the parent how much memory this worker has needed."""
    with counters[2].get_lock():
        counters[2].value = max(counters[2].value, peak_bytes())


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had.

    Linux says it itself; what getrusage says there begins with the memory of the process that started this one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
