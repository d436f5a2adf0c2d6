"""Where the wall time of a run went, over all its starts: steps that count, what stands beside them, and what was lost.

A start that goes on from step s has no use of what earlier starts trained after s: their seconds from there on, as the
marks in their records have them, are lost. So are those of steps that a run passed over when it went back from bad
numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from btlm_jax.train.starts import Start

STEP, LOST, BETWEEN, SET_UP, OTHER = "step", "lost work", "between starts", "set-up", "other"
_REFUSED = (1, 2)  # exit codes: an error, a wrong flag
# In the order in which they are shown; a record may have others, which come after them.
CATEGORIES = (
    STEP, "data wait", "evaluation", "checkpoint", LOST, BETWEEN, SET_UP, "corpus", "compile", "restore", "sample",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartTime:
    """One start: its seconds by category, those of steps that were trained again later apart."""

    start: Start
    seconds: dict[str, float]  # by category, LOST and OTHER among them; they sum to what the start took
    lost_steps: int  # that a later start trained again
    passed_over_steps: int
    last_kept: int | None  # the last step that counts; None: it trained none
    before: float  # seconds between the start before it and this one
    at: float  # seconds from the beginning of the first start to that of this one

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class WallTime:
    """All starts of a run, but those that found it finished, or were refused after its end."""

    starts: tuple[StartTime, ...]
    seconds: dict[str, float]  # by category, in the order of CATEGORIES; they sum to `total`

    @property
    def total(self) -> float:
        """Return the seconds from the beginning of the first start to what is known of the last one."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Return the share of all time that went into steps that count."""
        return self.seconds.get(STEP, 0.0) / self.total if self.total else 0.0

    @property
    def lost_steps(self) -> int:
        return sum(each.lost_steps for each in self.starts)


def wall_time(starts: Sequence[Start]) -> WallTime:
    """Return where the time of a run went; the starts are in order."""
    starts = [each for each in starts if not (each.code == 0 and each.first_step is None)]
    trained = max((index for index, each in enumerate(starts) if each.first_step is not None), default=None)
    if trained is not None and starts[trained].code == 0:
        starts[trained + 1 :] = [each for each in starts[trained + 1 :] if each.code not in _REFUSED]
    kept = [each.step or 0 for each in starts]  # the last step of each start that still counts
    lost_from: list[dict[str, float]] = [each.seconds for each in starts]  # seconds up to there
    lost_steps = [0] * len(starts)
    for index, start in enumerate(starts):
        if start.first_step is None:
            continue
        resumed, known = start.first_step - 1, sum(lost_steps)
        for number in range(index - 1, -1, -1):
            earlier = starts[number]
            if earlier.first_step is not None:
                if kept[number] <= resumed:
                    break  # those before it end before it begins
                last_kept = max(resumed, earlier.first_step - 1)
                lost_steps[number] += max(0, kept[number] - last_kept)
                kept[number], lost_from[number] = last_kept, earlier.at(last_kept)
        if index:  # what a killed start trained after the last write of its record
            lost_steps[index - 1] += max(0, start.repeated_steps - (sum(lost_steps) - known))
    known = [steps for index, each in enumerate(starts) for steps in each.passed_over if steps[1] <= kept[index]]
    passed_over = _joined(known)
    rows: list[StartTime] = []
    for index, start in enumerate(starts):
        before = max(start.began - starts[index - 1].ended, 0.0) if index else 0.0  # a clock may have been set back
        own = [(max(a, start.first_step or 0), min(b, kept[index])) for a, b in passed_over]
        own = [(a, b) for a, b in own if start.first_step is not None and a <= b]
        seconds = _by_category(start, lost_from[index], passed_over=own)
        rows.append(
            StartTime(
                start=start,
                seconds=seconds,
                lost_steps=lost_steps[index],
                passed_over_steps=sum(b - a + 1 for a, b in own),
                last_kept=None if start.first_step is None else kept[index],
                before=before,
                at=rows[-1].at + rows[-1].start.seconds["total"] + before if rows else 0.0,
            )
        )
    sums: dict[str, float] = {BETWEEN: sum(row.before for row in rows)}
    for row in rows:
        for name, value in row.seconds.items():
            sums[name] = sums.get(name, 0.0) + value
    return WallTime(starts=tuple(rows), seconds=_in_order(sums))


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges without what they have in common: a run may go back to the same step twice."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        first = max(first, joined[-1][1] + 1) if joined else first
        if first <= last:
            joined.append((first, last))
    return joined


def _by_category(start: Start, kept: dict[str, float], *, passed_over: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return a start's seconds, those after `kept` and of steps that were passed over as LOST.

    What is in no category is set-up until the steps begin.
    """
    counted = {name: value for name, value in kept.items() if name != "total"}
    lost = start.seconds["total"] - kept["total"]
    other = kept["total"] - sum(counted.values())
    begun = start.marks[0][1] if start.marks else kept
    set_up = begun["total"] - sum(value for name, value in begun.items() if name != "total")
    for first, last in passed_over:
        before, after = start.at(first - 1), start.at(last)
        for name in counted:
            seconds = after.get(name, 0.0) - before.get(name, 0.0)
            counted[name], lost = counted[name] - seconds, lost + seconds
    counted |= {LOST: lost, SET_UP: set_up, OTHER: other - set_up}
    return _in_order({name: max(value, 0.0) for name, value in counted.items()})


def _in_order(seconds: dict[str, float]) -> dict[str, float]:
    """Return the categories that took time: the known ones in their order, then others."""
    names = [*CATEGORIES, *(name for name in seconds if name not in CATEGORIES)]
    return {name: seconds[name] for name in names if seconds.get(name)}
