"""ALiBi (Press et al., arXiv 2108.12409): its slopes, and the window of positions that they let a head see.

The window is one rule for every backend: the kernels in C++ and in Pallas, the blockwise form in XLA, the cache of
generation and the planner. The score of query t and key s is x - slope * (t - s), where x = scale * q_t . k_s. Let the
values x of a row differ by at most `spread` nats. Relative to the query's own position, which every row sees, a key at
distance d = t - s then weighs at most e^(spread - slope * d), and all keys at distances from w on together at most

    sum over d >= w of e^(spread - slope * d)  =  e^(spread - slope * w) / (1 - e^-slope)

The window is the w for which that is 2^-24, half a unit in float32's last place:

    w  =  (spread + 24 ln 2 - ln(1 - e^-slope)) / slope

Keys from there on are left out. A share L <= 2^-24 of a row's weight left out moves its output by at most 2 L max|v|.
The same sum over the queries that follow a key bounds what its gradients lose: dv at most 2^-24 max|do|, and dk at most
2^-24 * scale * max|q| times the largest gradient of a weight; dq likewise with max|k|.

`spread` is bounded from the norms of queries and of keys less a mean key (`spread_bound`), or assumed where there are
none yet (SPREAD). What is left out is not looked at: a NaN in v beyond a head's window does not reach that query, as it
would through a weight of 0 in the sum over all keys. It reaches its own position's output and those within the window,
so it is in the loss. q and k that are not finite make their head see everything.
The bias itself is formed inside attention, never here.
"""

import math
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SPREAD = 64.0  # nats by which the scores of a row are assumed to differ at most where q and k are not known
CENTRE_KEYS = 128  # of a sequence, the first, whose mean is taken off all its keys for the bound
_NATS_TO_HALF_ULP = 24 * math.log(2)  # from a weight to half a unit in its last place in float32
_SQUARE_MARGIN = 1.02  # squared norms may be too small by this: of bfloat16, each square is rounded to 8 bits


def alibi_slopes(num_heads: int, *, scaling: float) -> np.ndarray:
    """Return the slopes_N, float32, positive: score += -slope * distance.

    A power of two n has 2^(-8k/n), k = 1..n; another count takes those of the power of two below it and fills up with
    every other slope of the power of two above, as the published BTLM code does. `scaling` divides them: linear
    position interpolation (arXiv 2310.13017).
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = _power_of_two_slopes(below) + _power_of_two_slopes(2 * below)[0::2][: num_heads - below]
    return (np.asarray(slopes, np.float64) / scaling).astype(np.float32)


def dynamic_factor(num_keys, train_len: int, *, xp: types.ModuleType):
    """Return what slopes are divided by for so many keys, float32: num_keys / train_len, but at least 1; 1 for 0.

    That is the published code's `{"type": "linear", "train_seq_len": train_len}`: one factor for all queries of a call,
    from the keys that there are at its end. So a whole forward pass and decoding over a cache differ beyond train_len.
    """
    if train_len == 0:
        return xp.ones_like(num_keys, dtype=xp.float32)
    return xp.maximum(xp.asarray(num_keys, xp.float32) / xp.float32(train_len), xp.float32(1))


def _power_of_two_slopes(n: int) -> list[float]:
    return [2.0 ** (-8.0 * k / n) for k in range(1, n + 1)]


def alibi_window(spread, slopes, *, xp: types.ModuleType):
    """Return w, the distance from which on keys are left out, as a float; inf for a head without a slope.

    Shapes broadcast; `xp` is numpy or jax.numpy.
    """
    return xp.where(slopes > 0, (spread + _NATS_TO_HALF_ULP - xp.log(-xp.expm1(-slopes))) / slopes, xp.inf)


def spread_bound(
    q: jax.Array, k: jax.Array, *, scale: float, largest_square: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Return a bound of how far apart the scores of any row are, without ALiBi: 2 * scale * max|q| * max|k|.

    For |q . k_s - q . k_u| = |q . (k_s - c) - q . (k_u - c)| <= |q| (|k_s - c| + |k_u - c|), whatever c is: the caller
    has subtracted one (`centre_of`). `largest_square` returns the largest squared norm over positions of each head's
    queries or keys, in the caller's layout, float32.
    """

    def longest(x):
        return jnp.sqrt(_SQUARE_MARGIN * largest_square(x))

    return 2 * scale * longest(q) * longest(k)


def centre_of(keys: jax.Array, *, positions: int | tuple[int, ...]) -> jax.Array:
    """Return the mean of a sequence's first CENTRE_KEYS keys over the dims `positions`, which stay, in the keys' dtype.

    What all keys of a sequence have in common, such as their bias, is in it, and does not make scores differ. A few
    keys serve as well as all: for their mean a TPU would read all keys once more.
    """
    return keys.mean(positions, keepdims=True, dtype=jnp.float32).astype(keys.dtype)


def window_of(
    q: jax.Array,
    k: jax.Array,
    slopes: jax.Array,
    *,
    scale: float,
    length: int,
    centre: jax.Array,
    largest_square: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Return the largest distance at which heads see keys, int32: the window of `spread_bound`, rounded down.

    `centre` is what `centre_of` has of k. The window is `length`, so everything, where it is that long, or where q or k
    are not finite. A v that is not finite is seen within the window, and always at its own position.
    """
    spread = spread_bound(q, k - centre, scale=scale, largest_square=largest_square)
    window = alibi_window(spread, slopes, xp=jnp)
    return jnp.where(window < length, window, length).astype(jnp.int32)  # NaN fails the comparison


def windows_of_heads(q_BTNH: jax.Array, k_BTNH: jax.Array, slopes_N: jax.Array, *, scale: float) -> jax.Array:
    """Return `window_of` each head of each sequence, int32 [B, N]."""

    def largest_square(x_BTNH):
        return jnp.square(x_BTNH.astype(jnp.float32)).sum(-1).max(1)

    centre = centre_of(k_BTNH[:, :CENTRE_KEYS], positions=1)
    return window_of(
        q_BTNH, k_BTNH, slopes_N, scale=scale, length=q_BTNH.shape[1], centre=centre, largest_square=largest_square
    )
