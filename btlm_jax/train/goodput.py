"""Goodput: the wall seconds of a run by category, such as "step", "data wait", "evaluation" and "checkpoint"."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator


class GoodputLedger:
    """Wall seconds by category, for one thread; a category inside another stops the outer one's count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._began = self._charged = clock()
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` block to category `name`."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every category up to now, the running one included, and the "total" since the start."""
        self._charge()
        return {**self._seconds, "total": self._charged - self._began}

    def describe(self) -> str:
        """Return one line: the total, and each category's share of it, largest first."""
        seconds = self.seconds()
        total = seconds.pop("total")
        seconds["other"] = total - sum(seconds.values())
        shares = [
            f"{name} {value / total if total else 0:.1%}"
            for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        ]
        return f"Time {datetime.timedelta(seconds=round(total))}: {', '.join(shares)}"

    def _charge(self) -> None:
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._charged
        self._charged = now
