"""The order in which devices hold heads, so that ALiBi gives all of them as much to do."""

from __future__ import annotations

import numpy as np


def dealt(num_heads: int, *, ways: int) -> np.ndarray:
    """Return the heads in the order in which devices hold them; each has its share of them side by side.

    A head's slope says how much there is to compute for it, so heads are dealt like cards, to and fro: of 8 heads and
    2 devices, one holds 0, 3, 4 and 7. Where `ways` does not divide them, which `attend` refuses, they stay in order.
    """
    heads = np.arange(num_heads)
    if num_heads % ways:
        return heads
    rounds = heads.reshape(num_heads // ways, ways)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T.reshape(num_heads)
