"""A stage's progress in one line: shards, documents and megabytes per second, time left, memory."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

from btlm_jax.display.progress import Log, RateLimit

INTERVAL = 5.0  # seconds between lines


class SharedCounters(NamedTuple):
    """What workers count in memory shared with their parent."""

    num_documents: Synchronized
    num_bytes: Synchronized  # of text
    peak_bytes: Synchronized  # largest resident memory of one worker


class Progress:
    """Counts finished work and logs it every few seconds."""

    interval = INTERVAL

    def __init__(self, stage: str, *, num_tasks: int, num_done: int, weights: Sequence[int], log: Log):
        self._stage, self._num_tasks, self._num_done, self._log = stage, num_tasks, num_done, log
        self._weight = sum(weights)
        self._weight_done = self._bytes_done = 0  # of finished tasks
        self._num_documents = self._num_bytes = 0
        self._worker_peak = 0
        self._start, self._rate_limit = time.monotonic(), RateLimit(self.interval, is_due_at_start=False)
        if num_done:
            log(f"{stage}: {num_done} of {num_tasks} shards were done before")

    def add(self, num_documents: int, num_bytes: int) -> None:
        """Add what a task in this process has done since its last call: its heartbeat."""
        self._num_documents += num_documents
        self._num_bytes += num_bytes
        self.report_if_due()

    def read_counters(self, counters: SharedCounters) -> None:
        """Take over the totals of the worker processes."""
        self._num_documents, self._num_bytes, self._worker_peak = (counter.value for counter in counters)
        self.report_if_due()

    def add_record(self, counted: dict) -> None:
        """Add what a task on another machine has counted."""
        self._worker_peak = max(self._worker_peak, counted["peak_bytes"])
        self.add(counted["documents"], counted["bytes"])

    def task_done(self, weight: int, num_bytes: int) -> None:
        """Count a finished shard, which had so much text."""
        self._num_done += 1
        self._weight_done += weight
        self._bytes_done += num_bytes
        self.report_if_due()

    def seconds_left(self, seconds: float) -> float | None:
        """Return about how long the rest will take after `seconds`; None while that is not known.

        Of the shards that are being worked on counts what text they have reported, at the rate of text to weight that
        the finished ones had.
        """
        if self._weight_done == self._weight:
            return 0.0
        if not self._weight_done:
            return None
        done = self._weight_done
        if self._bytes_done:
            done = max(done, self._num_bytes * self._weight_done / self._bytes_done)
        return seconds * (self._weight - done) / done if done < self._weight else None

    def eta(self, seconds: float) -> str:
        """Return what a line says of the time left after `seconds`.

        Before the first shard is finished, its text is taken to be as long as its file: compressed, it is longer.
        """
        if (left := self.seconds_left(seconds)) is not None:
            return _clock(left)
        if not self._weight_done and 0 < self._num_bytes < self._weight:
            return f"at least {_clock(seconds * (self._weight / self._num_bytes - 1))}"
        return "unknown"

    def report(self) -> None:
        """Log a line."""
        self._rate_limit.restart()
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._log(
            f"{self._stage}: {self._num_done}/{self._num_tasks} shards, {self._num_documents:,} documents, "
            f"{self._num_documents / seconds:,.0f} documents/s, {self._num_bytes / 1e6 / seconds:.1f} MB/s, "
            f"ETA {self.eta(seconds)}, at most {max(peak_bytes(), self._worker_peak) / 1e6:.0f} MB a process"
        )

    def report_if_due(self) -> None:
        """Log a line, unless the last one is less than `interval` seconds old."""
        if self._rate_limit.is_due():
            self.report()


def make_counters(context: BaseContext) -> SharedCounters:
    """Return counters at zero, for the workers of a multiprocessing context."""
    return SharedCounters(*(context.Value("q", 0) for _ in SharedCounters._fields))


def shared_heartbeat(counters: SharedCounters) -> Callable[[int, int], None]:
    """Return a heartbeat that adds to the shared counters."""

    def heartbeat(num_documents: int, num_bytes: int) -> None:
        for counter, more in ((counters.num_documents, num_documents), (counters.num_bytes, num_bytes)):
            with counter.get_lock():
                counter.value += more

    return heartbeat


def record_peak(counters: SharedCounters) -> None:
    """Record this worker's largest memory in the shared counters."""
    with counters.peak_bytes.get_lock():
        counters.peak_bytes.value = max(counters.peak_bytes.value, peak_bytes())


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had.

    Read from /proc on Linux, where getrusage's value starts at that of the process that forked this one.
    """
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024 * int(match[1]) if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
