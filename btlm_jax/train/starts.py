"""The records of a run's starts, which `metric_writer.StartRecord` writes, read back and checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from btlm_jax.storage.files import read_json_object
from btlm_jax.train import STARTS

_MOST_SECONDS = 1e11  # the year 5138


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run: the command, where, when, its ledger, how it ended."""

    number: int  # of starts before it: clocks of several machines do not tell the order
    began: float  # of the Unix epoch, by that machine's clock
    written: float  # when the record was written last
    host: str
    pid: int
    command: tuple[str, ...]
    facts: dict[str, str]  # versions, devices, the commit, the store's fingerprint
    first_step: int | None  # that it trained; None: it did not come so far
    step: int | None  # the last one that is recorded
    repeated_steps: int  # that an earlier start had recorded already
    passed_over: tuple[tuple[int, int], ...]  # (first, last) step, of which nothing was kept
    running: str  # the category that was running
    seconds: dict[str, float]  # by category, and "total"
    marks: tuple[tuple[int, dict[str, float]], ...]  # (step, the same up to it)
    notices: dict[str, int]
    code: int | None  # exit code; None: it runs, or was killed
    reason: str

    @property
    def ended(self) -> float:
        """When it ended, as far as is known."""
        return self.began + self.seconds["total"]

    def at(self, step: int) -> dict[str, float]:
        """Return the seconds by category up to a step, from the marks on both sides of it."""
        before = max((mark for mark in self.marks if mark[0] <= step), key=lambda mark: mark[0], default=None)
        later = (mark for mark in self.marks if mark[0] >= step)
        after = min(later, key=lambda mark: mark[0], default=(self.step, self.seconds))
        if before is None:
            return dict(self.marks[0][1]) if self.marks else dict(self.seconds)
        if before[0] == step or not after[0] or after[0] <= before[0]:
            return dict(before[1])
        share = (step - before[0]) / (after[0] - before[0])
        names = after[1].keys() | before[1].keys()
        return {
            name: before[1].get(name, 0.0) + share * (after[1].get(name, 0.0) - before[1].get(name, 0.0))
            for name in names
        }


def read_starts(path: Path, problems: list[str]) -> tuple[Start, ...]:
    """Return the starts of a run in order; add what is wrong with their records to `problems`."""
    folder = path / STARTS
    starts = []
    for file in sorted(folder.glob("[!.]*.json")):
        try:
            starts.append(_start(read_json_object(file)))
        except (ValueError, OSError) as error:
            problems.append(f"the record of a start, {file}, is not read: {error}")
    return tuple(sorted(starts, key=lambda start: (start.number, start.began)))


def read_sound_starts(path: Path) -> tuple[Start, ...]:
    """Return the starts of a run in order.

    Raises:
      ValueError: a record is damaged, or cannot be read.
    """
    problems: list[str] = []
    starts = read_starts(path, problems)
    if problems:
        raise ValueError("; ".join(problems))
    return starts


def _start(row: dict[str, Any]) -> Start:
    """Return what a record of a start says.

    Raises:
      ValueError: it is damaged.
    """
    match row:
        case {
            "began": float() as began,
            "written": float() as written,
            "host": str() as host,
            "pid": int() as pid,
            "command": list() as command,
            "seconds": dict() as seconds,
            "marks": list() as marks,
            "notices": dict() as counts,
        }:
            pass
        case _:
            raise ValueError("it lacks a part of a start's record")
    if not 0 <= min(began, written) <= max(began, written) < _MOST_SECONDS:
        raise ValueError("when it began, or was written, is no time")
    passed_over = row.get("passed_over", [])
    if not isinstance(passed_over, list):
        raise ValueError("steps that are passed over are no list")
    end = row.get("end") or {}
    if not isinstance(end, dict) or not isinstance(end.get("code"), (int, type(None))):
        raise ValueError('its "end" has no exit code')
    facts = row.get("facts")
    here = {name: row.get(name) for name in ("btlm_jax", "python", "jax", "jaxlib", "numpy", "commit", "folder")}
    facts = here | (facts if isinstance(facts, dict) else {})
    return Start(
        number=_whole(row.get("number")) or 0,
        began=began,
        written=written,
        host=host,
        pid=pid,
        command=tuple(map(str, command)),
        facts={str(name): str(value) for name, value in facts.items() if value},
        first_step=_whole(row.get("first_step")),
        step=_whole(row.get("step")),
        repeated_steps=_whole(row.get("repeated_steps")) or 0,
        passed_over=tuple(map(_steps, passed_over)),
        running=str(row.get("running") or ""),
        seconds=_seconds(seconds),
        marks=tuple((step, _seconds(at)) for step, at in map(_mark, marks)),
        notices={str(name): count for name, count in counts.items() if isinstance(count, int)},
        code=end.get("code"),
        reason=str(end.get("reason") or ""),
    )


def _whole(value: object) -> int | None:
    return None if value is None else _step(value)


def _step(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"a step is no whole number from 0 on: {str(value)[:40]}")
    return value


def _steps(value: object) -> tuple[int, int]:
    match value:
        case [first, last]:
            return _step(first), _step(last)
    raise ValueError("steps that are passed over are no [first, last]")


def _mark(value: object) -> tuple[int, dict]:
    match value:
        case [step, dict() as seconds]:
            return _step(step), seconds
    raise ValueError("a mark is no [step, seconds]")


def _seconds(values: dict) -> dict[str, float]:
    seconds = {str(name): value for name, value in values.items()}
    if "total" not in seconds or not all(
        isinstance(value, (int, float)) and 0 <= value < _MOST_SECONDS for value in seconds.values()
    ):
        raise ValueError("its seconds are no numbers with a total")
    return {name: float(value) for name, value in seconds.items()}
