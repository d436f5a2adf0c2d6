"""Intervals: of ratios of sums by resampling whole documents (Efron's percentile bootstrap), and of proportions."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
_COUNTS_AT_A_TIME = 1 << 22  # of documents in resamples: a million documents are resampled four times at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """The middle LEVEL of the resamples."""

    low: float
    high: float

    def to_json(self) -> list[float]:
        """Return [low, high]."""
        return [self.low, self.high]


def counts_of_resamples(num_documents: int, *, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each document is drawn, float64 [some resamples, num_documents], RESAMPLES in all.

    The same seed gives the same draws, so that two models on the same documents are compared in pairs.
    """
    generator = np.random.default_rng(seed)
    at_a_time = max(1, min(50, _COUNTS_AT_A_TIME // num_documents))
    for start in range(0, RESAMPLES, at_a_time):
        number = min(at_a_time, RESAMPLES - start)
        drawn = generator.integers(0, num_documents, (number, num_documents))
        offsets = np.arange(number)[:, None] * num_documents
        counts = np.bincount((drawn + offsets).ravel(), minlength=number * num_documents)
        yield counts.reshape(number, num_documents).astype(np.float64)


def resampled_sums(strata: Sequence[np.ndarray], *, seed: int = SEED) -> np.ndarray:
    """Return the sums of quantities over resampled documents, float64 [RESAMPLES, strata, quantities].

    Each stratum is an array [documents, quantities]; its documents are resampled among themselves.
    """
    return np.stack(
        [
            np.concatenate([counts @ stratum for counts in counts_of_resamples(len(stratum), seed=seed + number)])
            for number, stratum in enumerate(strata)
        ],
        axis=1,
    )


def interval_of(values: np.ndarray) -> Interval:
    """Return the interval of a statistic's resamples."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high))


def interval_of_proportion(number: int, of: int) -> Interval:
    """Return Wilson's interval of a proportion, which is none of zero width where all cases or none are right."""
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (number + z * z / 2) / (of + z * z)
    margin = z / (of + z * z) * math.sqrt(number * (of - number) / of + z * z / 4)
    return Interval(low=max(0.0, centre - margin), high=min(1.0, centre + margin))
