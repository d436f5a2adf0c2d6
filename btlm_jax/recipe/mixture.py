"""Weights of sources: how a config writes them, and which source window n of a phase is of. Host integers alone."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

OTHERS = "*"  # all sources that a phase does not name
_PARTS = 10_000
MAX_TURNS = 100_000  # of a round, all of which are listed
_SHARE = re.compile(r"(?P<source>.+?)=\s*(?P<weight>[0-9]{1,12}(?:\.[0-9]{1,12})?)\s*(?P<end>[,;]|$)", flags=re.DOTALL)
_NATURAL = re.compile(r"\s*natural\s*(?P<end>;|$)")


def parse_weights(text: str) -> tuple[dict[str, int], ...]:
    """Return the weight of each source, as whole numbers without a common divisor, of each phase that a text names.

    "web=3,books=1" is of all phases; "web=3,books=1; web=1,books=1" of two. A weight may be 0 or have decimals. What
    stands between a weight with its comma and the next "=" with a number is a name, whatever is in it; "*" are all that
    are not named, each with that weight. Of a phase that is "natural", which has the sources as the store has them,
    nothing is returned. `weights_of` are a phase's weights.

    Raises:
      ValueError: it is no such text, names a source twice, or has no weight above 0 in a phase.
    """
    phases: list[dict[str, Fraction]] = [{}]
    naturals: list[int] = []  # indices of phases
    text, place = text.strip(), 0
    while place < len(text):
        if not phases[-1] and (natural := _NATURAL.match(text, place)):
            naturals.append(len(phases) - 1)
            phases += [{}] if natural["end"] else []
            place = natural.end()
            continue
        found = _SHARE.match(text, place)
        source = found["source"].strip() if found else ""
        if found is None or not source:
            raise ValueError(
                f"data.weights={_shown(text)} cannot be read from {_shown(text[place:])} on; it is SOURCE=NUMBER with "
                'commas between, for example "web=3,books=1"; of each phase with ";" between: "natural; web=3,books=1"'
            )
        if source in phases[-1]:
            raise ValueError(f"data.weights={_shown(text)} names {source!r} twice in one phase")
        phases[-1][source] = Fraction(found["weight"])
        place = found.end()
        if found["end"] == ";":
            phases.append({})
    return tuple({} if number in naturals else _whole(weights, text=text) for number, weights in enumerate(phases))


def weights_of(given: dict[str, int], sizes: dict[str, int], *, of: str) -> tuple[int, ...]:
    """Return the weight of each source that has a size, of a phase of `parse_weights`; `of` is what has the sources.

    Raises:
      ValueError: the phase names other sources, or not all of them; or no weight is above 0, or they are too large.
    """
    if not given:
        return natural_weights(list(sizes.values()))
    if unknown := sorted(given.keys() - sizes.keys() - {OTHERS}):
        raise ValueError(
            f"data.weights names {_listed(unknown)}, which {of} does not have; its sources are {_listed(list(sizes))}"
            + "; a weight is a number such as 3 or 0.25, and what is none is taken for part of a name"
            * any("=" in name for name in unknown)
        )
    missing = [source for source in sizes if source not in given]
    if missing and OTHERS not in given:
        raise ValueError(
            f"data.weights says nothing of {_listed(missing)}; give each source of {of} a number in every phase, 0 to "
            f'leave it out, or "{OTHERS}=0" for all others'
        )
    weights = tuple(given[source] if source in given else given[OTHERS] for source in sizes)
    if not 0 < sum(weights) <= MAX_TURNS:
        raise ValueError(
            f"data.weights of the {len(sizes)} sources of {of} are {sum(weights):,} together in a phase; they must be "
            f"from 1 to {MAX_TURNS:,}"
        )
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)


def check_sources(weights: Sequence[dict[str, int]], sources: Sequence[str], *, of: str) -> None:
    """Check that the weights of every phase are of these sources; `of` is what has them.

    Raises:
      ValueError: as `weights_of`.
    """
    for given in weights:
        weights_of(given, dict.fromkeys(sources, 1), of=of)


def natural_weights(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return whole numbers for sources of these sizes, in parts of a ten-thousandth of all where they are larger."""
    total = sum(sizes)
    parts = [max(1, round(size * _PARTS / total)) for size in sizes] if total > _PARTS else sizes
    divisor = math.gcd(*parts)
    return tuple(part // divisor for part in parts)


def _whole(weights: dict[str, Fraction], *, text: str) -> dict[str, int]:
    if not any(weights.values()):
        named = f": only {_listed(list(weights))}" if weights else ""
        raise ValueError(f"data.weights={_shown(text)} has a phase without a weight above 0{named}")
    scale = math.lcm(*(weight.denominator for weight in weights.values()))
    whole = {source: int(weight * scale) for source, weight in weights.items()}
    divisor = math.gcd(*whole.values())
    whole = {source: weight // divisor for source, weight in whole.items()}
    if sum(whole.values()) > MAX_TURNS:
        raise ValueError(
            f"data.weights={_shown(text)} are as whole numbers {sum(whole.values()):,} together, and {MAX_TURNS:,} is "
            "the most; use fewer digits"
        )
    return whole


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(repr, names[:20])) + more


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """The order in which sources take turns in a phase, in rounds of as many turns as the weights sum to.

    Of the first n turns a source of weight w, of W together, has floor(n w / W) or ceil(n w / W), for every n: its j-th
    turn, j = 0, 1, ..., is from floor(j W / w) on and before ceil((j + 1) W / w), counted from 0, and of those that may
    have a turn the one has it that must have it first. (Tijdeman, The chairman assignment problem, 1980, shows that
    there is such an order; with unit turns the earliest deadline finds it.)
    """

    weights: tuple[int, ...]  # 0 or more, not all 0, without a common divisor

    @property
    def num_turns(self) -> int:
        return sum(self.weights)

    def at(self, turn: int) -> tuple[int, int]:
        """Return (source, how many turns it had before) of a turn 0, 1, ..."""
        number, within = divmod(turn, self.num_turns)
        source = int(self._sources[within])
        return source, number * self.weights[source] + int(self._before[within])

    def counts(self, num_turns: int) -> list[int]:
        """Return how many of the first `num_turns` turns each source has."""
        number, within = divmod(num_turns, self.num_turns)
        last = np.bincount(self._sources[:within], minlength=len(self.weights)).tolist()
        return [number * weight + more for weight, more in zip(self.weights, last, strict=True)]

    @functools.cached_property
    def _sources(self) -> np.ndarray:
        """The source of each turn of a round, int32."""
        return np.asarray(_round(self.weights), np.int32)

    @functools.cached_property
    def _before(self) -> np.ndarray:
        """How many turns of a round its source had before each, int32."""
        before = np.zeros(self.num_turns, np.int32)
        for source in range(len(self.weights)):
            own = np.flatnonzero(self._sources == source)
            before[own] = np.arange(len(own))
        return before


def _round(weights: Sequence[int]) -> list[int]:
    """Return the source of each turn of a round: the earliest deadline first, of equal ones the first source."""
    total = sum(weights)
    waiting = [(0, source, 0) for source, weight in enumerate(weights) if weight]  # (first turn allowed, source, j)
    ready: list[tuple[int, int, int]] = []  # (last turn allowed, source, j)
    sources = []
    for turn in range(total):
        while waiting and waiting[0][0] <= turn:
            _, source, number = heapq.heappop(waiting)
            last = -(-(number + 1) * total // weights[source]) - 1
            heapq.heappush(ready, (last, source, number))
        last, source, number = heapq.heappop(ready)
        assert turn <= last, f"weights {weights}: turn {turn} of source {source} is too late"
        sources.append(source)
        heapq.heappush(waiting, ((number + 1) * total // weights[source], source, number + 1))
    return sources
