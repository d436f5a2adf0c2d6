"""ALiBi slopes (Press et al., arXiv 2108.12409). The bias itself is formed inside attention, never here."""

from __future__ import annotations

import math

import numpy as np


def alibi_slopes(num_heads: int, *, scaling: float) -> np.ndarray:
    """Return the slopes_N, float32, positive: score += -slope * distance.

    A power of two n has 2^(-8k/n), k = 1..n; another count takes those of the power of two below it and fills up with
    every other slope of the power of two above, as the published BTLM code does. `scaling` divides them: linear
    position interpolation (arXiv 2310.13017).
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = _power_of_two_slopes(below) + _power_of_two_slopes(2 * below)[0::2][: num_heads - below]
    return (np.asarray(slopes, np.float64) / scaling).astype(np.float32)


def _power_of_two_slopes(n: int) -> list[float]:
    return [2.0 ** (-8.0 * k / n) for k in range(1, n + 1)]
