"""What a step really took over what is computed from its program: published runs of other models, and one's own.

calibration.json beside this file holds the published runs, each with its source, and the parts of its program as
`benchmarks/plan_calibration.py` compiled it. It is frozen: its hash is in every table that is made by it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from btlm_jax.storage.files import hash_json, read_json_object, write_atomically

CALIBRATION_FILE = Path(__file__).with_name("calibration.json")
MEASURED_FOLDER = "measured"  # of a cache of compilations: steps of one's own runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds of a step's parts, by its compiled program; estimates are the compiler's own."""

    products: float  # fusions with matrix products, by the estimate
    products_at_peak: float  # their FLOPs at the chip's peak
    elementwise: float  # fusions without, by the estimate
    elementwise_at_bandwidth: float  # their bytes at the bandwidth of HBM
    slowest: float  # of both, each fusion's greater one of FLOPs at peak and bytes at bandwidth
    unestimated: float  # gathers, scatters, sorts, copies: bytes at 0.8 of the bandwidth
    prefetched: float  # copies beside other work, bytes at the bandwidth; in no sum
    attention: float  # kernels, over all keys
    negligible: float  # the part of them over keys outside ALiBi's windows
    exposed: float  # synchronous collectives
    asynchronous: float  # collectives that may run beside computation

    @property
    def estimate(self) -> float:
        """Seconds of computation by the compiler's estimates."""
        return self.products + self.elementwise + self.unestimated + self.attention

    @property
    def roofline(self) -> float:
        """Seconds of computation if every fusion ran at the chip's limits."""
        return self.slowest + self.unestimated + self.attention

    @property
    def exchanged(self) -> float:
        """Seconds of exchanges that nothing hides: those alone, and what is longer than all computation."""
        return self.exposed + max(0.0, self.asynchronous - self.estimate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A run whose step was measured."""

    name: str
    chip: str
    measured: float  # seconds a step
    parts: Parts
    hfu: float  # executed FLOP/s over peak, as measured

    @property
    def ratio(self) -> float:
        """What computation took over its roofline; of exchanges no more than half of the step is believed."""
        return max(self.measured - self.parts.exchanged, self.measured / 2) / self.parts.roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """What the roofline of a chip's steps is multiplied by, and how far off that is."""

    factor: float
    error: float  # relative: a step is between its value / (1 + error) and its value x (1 + error)
    source: str

    def seconds(self, parts: Parts) -> float:
        """Return the central value of a step's seconds."""
        return self.factor * parts.roofline + parts.exchanged


@functools.cache
def published_points(file: Path = CALIBRATION_FILE) -> tuple[Point, ...]:
    """Return the published runs that have been compiled."""
    return tuple(_point(each) for each in read_json_object(file)["points"] if each.get("parts"))


@functools.cache
def calibration_hash() -> str:
    """Return the first 12 digits of the hash of the published runs and their parts."""
    return hash_of_points(published_points())


def hash_of_points(points: Sequence[Point]) -> str:
    """Return the first 12 digits of the hash of runs and their parts."""
    values = [[each.name, each.chip, each.measured, dataclasses.asdict(each.parts)] for each in points]
    return hash_json({"points": values})[:12]


def best_published_hfu(chip: str) -> float | None:
    """Return the greatest hardware FLOPs utilization published of a chip; None if there is none."""
    stored = read_json_object(CALIBRATION_FILE)["best_hfu"]
    return stored[chip]["hfu"] if chip in stored else None


def best_known_hfu(chip: str, *, own: Sequence[Point]) -> float | None:
    """Return the greatest hardware FLOPs utilization of a chip, published or of one's own runs; None without either."""
    published = best_published_hfu(chip)
    return max([each.hfu for each in own] + ([] if published is None else [published]), default=None)


def correction_of(chip: str, *, own: Sequence[Point] = (), roofline: float = math.nan) -> Correction:
    """Return the correction of a TPU: see `correction_by`."""
    return correction_by(published_points(), chip=chip, own=own, roofline=roofline)


def correction_by(
    points: Sequence[Point], *, chip: str, own: Sequence[Point] = (), roofline: float = math.nan
) -> Correction:
    """Return the correction of a step on a chip: by one's own runs, or by published ones.

    Of one's own those count whose roofline is at most 4 times shorter or longer than `roofline`, that of the step in
    seconds: what a small step takes over its roofline is launching, and says nothing of a large one. Where there are
    any, published runs do not count.

    The factor is the geometric mean of the ratios of the chip's runs and of one more, the mean of all runs: with so
    few, that leaves less error than either mean. The error is the root of the mean square of the errors, in nats, that
    leaving one run out makes; for a chip without runs that of leaving out a chip, if it is greater; and 10 % at least.
    """
    alike = [each for each in own if abs(math.log(each.parts.roofline / roofline)) <= math.log(_ALIKE)]
    if alike:
        factor = _mean_ratio(alike)
        spread = max(abs(math.log(each.ratio / factor)) for each in alike)
        source = f"steps measured here ({len(alike)} of about this length)"
        return Correction(factor=factor, error=max(_OWN_ERROR, math.expm1(spread)), source=source)
    error = _root_mean_square([math.log(each.measured / predicted) for each, predicted in left_out(points)])
    num_same = sum(each.chip == chip for each in points)
    source = f"{num_same} published runs on {chip}, of {len(points)} in all, none of this model"
    if not num_same:
        source = f"{len(points)} published runs on other chips"
        chips = {each.chip for each in points}
        by_others = {left: _mean_ratio([each for each in points if each.chip != left]) for left in chips}
        error = max(error, _root_mean_square([math.log(each.ratio / by_others[each.chip]) for each in points]))
    if own:
        source += f"; of {len(own)} measured here none is of about this length"
    return Correction(factor=_factor(chip, points), error=max(_OTHERS_ERROR, math.expm1(error)), source=source)


def left_out(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Return each run with the seconds predicted of it by the others."""
    found = []
    for point in points:
        others = [each for each in points if each is not point]
        correction = Correction(factor=_factor(point.chip, others), error=0.0, source="")
        found.append((point, correction.seconds(point.parts)))
    return found


def keep_points(points: list[Point], *, directory: Path) -> None:
    """Keep points for later plans; one of the same name and program takes the place of an earlier one."""
    directory.mkdir(parents=True, exist_ok=True)
    for point in points:
        values = dataclasses.asdict(point)
        name = hash_json({"name": point.name, "parts": values["parts"]})[:16]
        write_atomically(directory / f"{point.chip}-{name}.json", json.dumps(values, indent=1))


def kept_points(chip: str, *, directory: Path) -> tuple[Point, ...]:
    """Return the points of a chip that were kept.

    Raises:
      ValueError: a file of them is damaged.
    """
    found = []
    for path in sorted(directory.glob(f"{chip}-*.json")):
        values = read_json_object(path)
        try:
            found.append(Point(**{**values, "parts": Parts(**values["parts"])}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no measured step that this version wrote ({error}); delete it") from error
    return tuple(found)


_OWN_ERROR = 0.05  # at least, of a prediction by one's own runs: other layouts differ
_OTHERS_ERROR = 0.1  # at least, by published runs: that of v5e-256-maxtext-32b, compiled when the others had been read
_ALIKE = 4.0  # how many times longer the roofline of one step may be than that of another which it corrects


def _factor(chip: str, points: Sequence[Point]) -> float:
    of_all, same = _mean_ratio(points), [each for each in points if each.chip == chip]
    logs = [math.log(of_all), *(math.log(each.ratio) for each in same)]
    return math.exp(sum(logs) / len(logs))


def _mean_ratio(points: Sequence[Point]) -> float:
    return math.exp(sum(math.log(each.ratio) for each in points) / len(points))


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(each**2 for each in values) / len(values))


def _point(values: dict) -> Point:
    return Point(
        name=values["name"],
        chip=values["chip"],
        measured=values["step_seconds"],
        parts=Parts(**values["parts"]),
        hfu=values["hfu"],
    )
