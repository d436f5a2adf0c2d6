"""The lines of a run's metrics.jsonl, read from outside: the last ones, or all of a kind, in bounded time and memory.

A line that is damaged is left out and counted; the last one may be half written.
"""

from __future__ import annotations

import array
import dataclasses
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from btlm_jax.train.metric_writer import parse_row

TAIL_BYTES = 256 << 10
_SEARCH_BYTES = 256 << 20  # from the end, for the last line of a kind
MAX_TRAIN_ROWS = 50_000  # that are parsed: of longer runs every k-th


def last_rows(path: Path, *, num_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """Return the lines in the last bytes of a metrics file, damaged ones left out; none if there is no file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = file.seek(max(0, size - num_bytes))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return [row for line in lines[bool(begin) : -1] if (row := _row(line, path)) is not None]


def last_of_kind(path: Path, kind: str, *, number: int = 1) -> list[dict[str, Any]]:
    """Return the last lines of a kind, in order, as far as they are near the end."""
    found: list[dict[str, Any]] = []
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            at = contents.rfind(b"\n") + 1
            stop = max(0, at - _SEARCH_BYTES)
            while len(found) < number and (at := contents.rfind(_beginning(kind), stop, at)) >= 0:
                is_whole_line = at == 0 or contents[at - 1 : at] == b"\n"
                row = _row(contents[at : contents.find(b"\n", at)], path) if is_whole_line else None
                found += [row] if row is not None else []
    except (FileNotFoundError, ValueError):  # an empty file cannot be mapped
        return []
    return found[::-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a metrics file has: columns of the train lines, and the other lines by kind."""

    train: dict[str, np.ndarray]  # by name, float64 of the same length; nan where a line lacks it
    others: dict[str, list[dict[str, Any]]]
    num_train: int  # train lines in the file
    stride: int  # every so many of them are in the columns
    num_damaged: int

    def kind(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of another kind than "train", in order."""
        return self.others.get(name, [])


def read_metrics_of(path: Path, *, max_rows: int = MAX_TRAIN_ROWS) -> Metrics:
    """Read a metrics file, of at most so many train lines: of more, every k-th and the last.

    Raises:
      OSError: it cannot be read.
    """
    columns = _Columns()
    others: dict[str, list[dict[str, Any]]] = {}
    num_train, num_damaged = 0, 0
    stride = max(1, -(-_count_train(path) // max_rows))
    last = b""
    train = _beginning("train")
    for line in _lines(path):
        if line.startswith(train):
            num_train += 1
            last = line
            if num_train % stride:
                continue
            last = b""
        row = _row(line, path)
        if row is None:
            num_damaged += 1
        elif row["kind"] == "train":
            columns.add(row)
        else:
            others.setdefault(row["kind"], []).append(row)
    if last and (row := _row(last, path)):
        columns.add(row)
    return Metrics(train=columns.arrays(), others=others, num_train=num_train, stride=stride, num_damaged=num_damaged)


def _beginning(kind: str) -> bytes:
    return b'{"kind": "%s"' % kind.encode()


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the whole lines of a file, without their ends."""
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]
    except FileNotFoundError:
        return


def _count_train(path: Path) -> int:
    return sum(line.startswith(_beginning("train")) for line in _lines(path))


def _row(line: bytes, path: Path) -> dict[str, Any] | None:
    try:
        return parse_row(line, name=str(path))
    except ValueError:
        return None


class _Columns:
    """Columns of the numbers in rows."""

    def __init__(self) -> None:
        self._length = 0
        self._columns: dict[str, array.array] = {}

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)):
                column = self._columns.setdefault(name, array.array("d"))
                column.extend([math.nan] * (self._length - len(column)))  # of rows that lack it
                column.append(value)
        self._length += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the columns, all of the same length."""
        for column in self._columns.values():
            column.extend([math.nan] * (self._length - len(column)))
        return {name: np.array(self._columns[name]) for name in sorted(self._columns)}
