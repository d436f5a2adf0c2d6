"""What is kept of an evaluation: a file for each part, which is not measured again; its units of work; and progress.

A part is kept as PART-SETTINGS.json, where SETTINGS is a hash of all that its numbers depend on: the model's identity,
the documents', and its settings. While it is measured, PART-SETTINGS.partial has a line of JSON for each unit of work.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from btlm_jax import notices, stopping
from btlm_jax.display.progress import RateLimit, StatusLine, minutes_and_seconds
from btlm_jax.evaluate.processes import is_first, of_first, say
from btlm_jax.storage.files import (
    hash_json,
    only_writer,
    open_to_append,
    parse_json,
    read_json_object,
    write_all,
    write_atomically,
)

FORMAT = "btlm evaluation 1"
_numbers = itertools.count()  # of what is measured: all processes measure the same, in one order
PROGRESS_SECONDS = 5.0


class Work:
    """The units of a part: which are done, what they gave; and how long the others will take.

    Without a path nothing is kept.
    """

    def __init__(self, name: str, path: Path | None, *, done: Sequence[tuple[int, Any]] = ()):
        """Begin with (number, what it gave) of units that are done, and with what a start has left at `path`."""
        self.name, self._path = name, path
        self._done: dict[int, Any] = dict(done)
        self._num_bytes = 0  # of whole lines
        self._file: io.FileIO | None = None
        self._line, self._limit = StatusLine(sys.stderr), RateLimit(PROGRESS_SECONDS, is_due_at_start=False)
        self._sizes: Sequence[int] = ()
        self._ahead = 0  # of the unit that is being done, what is behind it
        self._first, self._since = 0, 0.0
        if path is not None and path.exists():
            self._read(path)
        self._left = frozenset(self._done)  # by an earlier start

    def begin(self, sizes: Sequence[int], *, unit_name: str) -> None:
        """Say how large each unit is, which decides how long it will take, in what; before `done` and `add`.

        It may be said again with more units after these.
        """
        self._sizes, self._unit_name = sizes, unit_name
        if num_left := sum(number in self._left for number in range(len(sizes))):
            say(f"{self.name}: going on, {num_left:,} of {len(sizes):,} parts are done")

    @property
    def units(self) -> list[tuple[int, Any]]:
        """Return (number, what it gave) of every unit that is done."""
        return list(self._done.items())

    def done(self, number: int) -> Any:
        """Return what a unit gave, or None if it is to be done."""
        return self._done.get(number)

    def advance(self, size: int) -> None:
        """Say that so much more of a unit is done, for the progress alone."""
        self._ahead += size
        self._show()

    def add(self, number: int, value: Any) -> None:
        """Keep what a unit gave.

        Raises:
          OSError: it cannot be written.
        """
        self._done[number], self._ahead = value, 0
        if self._path is not None:
            try:
                if self._file is None:
                    self._file = open_to_append(self._path, num_bytes=self._num_bytes)
                write_all(self._file, json.dumps([number, value]).encode() + b"\n")
            except OSError as error:
                raise OSError(
                    f"{self._path} cannot be written: {error.strerror or error}; what is in it is kept: mend it, and "
                    "the same command goes on"
                ) from error
        self._show()

    def close(self) -> None:
        """Close the file; it stays for a later start."""
        self._line.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, path: Path) -> None:
        for count, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # it was cut off
            try:
                number, value = parse_json(line, name=path)
            except (ValueError, TypeError):  # such as zeros after a loss of power
                notices.report("evaluation-again", f"{path} is damaged from line {count} on; that is measured again")
                break
            self._done[number] = value
            self._num_bytes += len(line)

    def _show(self) -> None:
        """Show what is done, and how long the rest takes at the rate since the first call, which compiled."""
        if not is_first() or (self._since and not self._limit.is_due()):
            return
        total = sum(self._sizes)
        done = sum(size for number, size in enumerate(self._sizes) if number in self._done)
        size = min(total, done + self._ahead)
        if not self._since:
            self._first, self._since = size, time.monotonic()
        if not self._limit.is_due():
            return
        self._limit.restart()
        text = f"{self.name}: {size:,} of {total:,} {self._unit_name} ({size / total:.0%})"
        if size > self._first:
            rate = (size - self._first) / (time.monotonic() - self._since)
            text += f", {rate:,.0f}/s, {minutes_and_seconds((total - size) / rate)} left"
        self._line.show(text)


class Results:
    """The folder of a model's results."""

    def __init__(self, folder: Path, *, identity: dict[str, Any]):
        """Keep results in a folder; `identity` says which model and how it computes, and is part of every settings."""
        self.folder, self.identity = folder, identity

    def measure(self, part: str, settings: dict[str, Any], make: Callable[[Work], dict], *, what: str = "") -> dict:
        """Return what `make` gives, or gave at an earlier start with the same settings; `what` is for the progress.

        Raises:
          OSError: the folder cannot be read or written, or another process measures the same.
          ValueError: a file of it is damaged.
          ProcessesDifferError: another process of this evaluation has other documents or settings.
        """
        everything = json.loads(json.dumps(self.identity | {"part": part} | settings))
        facts = {f"{part}{what}, {key}": json.dumps(value) for key, value in everything.items()}
        stopping.current().agree(f"evaluation {next(_numbers)}", facts)
        name = f"{part}-{hash_json(everything)[:12]}"
        path = self.folder / f"{name}.json"
        if (kept := of_first(_kept(path, everything) if is_first() else None)) is not None:
            say(f"{part}{what}: done already, {path}")
            return kept
        if not is_first():
            return make(Work(f"{part}{what}", None, done=of_first(None)))
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{name}.partial"
        with only_writer(path):
            work = Work(f"{part}{what}", partial)
            try:
                of_first(work.units)
                result = make(work)
            finally:
                work.close()
            write_atomically(path, json.dumps({"format": FORMAT, "settings": everything, "result": result}))
            partial.unlink(missing_ok=True)
        return result


def _kept(path: Path, settings: dict[str, Any]) -> dict | None:
    """Return the result that a file keeps of these settings, if it does."""
    if not path.exists():
        return None
    try:
        kept = read_json_object(path)
    except ValueError as error:
        notices.report("evaluation-again", f"{error}; it is measured again")
        return None
    if (kept.get("format"), kept.get("settings")) == (FORMAT, settings) and isinstance(kept.get("result"), dict):
        return kept["result"]
    notices.report("evaluation-again", f"{path} is not what its name says; it is measured again")
    return None
