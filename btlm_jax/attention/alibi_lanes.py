"""ALiBi as extra lanes of q and k, for kernels that know no bias: q' . k' = q . k + slope * (s - t).

Kernels multiply in bfloat16, whose 8 bits hold neither a slope nor a position, so both are split into parts that it
holds exactly: a slope into three, a position into its multiple of 256 and the rest. The products are then exact and
summed in float32. The lanes are constants: what a kernel returns as their gradient is cut off.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

TILE = 128  # lanes of a TPU's vectors
NUM_PARTS = 3  # of a slope: 3 x 8 bits are a float32's 24
NUM_LANES = 4 * NUM_PARTS
MAX_LENGTH = 1 << 16  # the multiples of 256 below it have 8 bits


def whole_tiles(size: int) -> int:
    """Return a number of lanes rounded up to whole tiles."""
    return -(-size // TILE) * TILE


def lanes_of_heads(num_heads: int, head_dim: int) -> np.ndarray:
    """Return which lanes are whose where heads lie side by side, float32 [N, M] of zeros and ones.

    A product with it sums over each head's lanes, where a reshape to heads would have a TPU move them all.
    """
    return np.repeat(np.eye(num_heads, dtype=np.float32), head_dim, axis=1)


def alibi_lanes(slopes_N: jax.Array, *, length: int, head_dim: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Return what to add to q and to k, both [T, N, W], once `widen` has given them `width` lanes: zeros but for ALiBi.

    Per part of a slope, q carries (slope, -coarse, slope, -fine) of its position and k (coarse, slope, fine, slope).
    That is centred on the query, so a score is as small as what it stands for, and no row needs a large maximum.

    Raises:
      ValueError: more positions than two parts of 8 bits can count.
    """
    if length > MAX_LENGTH:
        raise ValueError(f"ALiBi inside q and k counts {MAX_LENGTH:,} positions; got a length of {length:,}")
    assert width >= head_dim + NUM_LANES

    def place(x_XA):
        return jnp.pad(x_XA, ((0, 0), (head_dim, width - head_dim - NUM_LANES)))

    slope_NA = jnp.repeat(bfloat16_parts(slopes_N), 4, axis=1)
    position_T = jnp.arange(length)
    coarse_T, fine_T = position_T // 256 * 256, position_T % 256
    position_TA = jnp.tile(jnp.stack([coarse_T, coarse_T, fine_T, fine_T], axis=1), NUM_PARTS).astype(jnp.float32)
    is_even_A = (jnp.arange(NUM_LANES) % 2 == 0)[None]
    q_slopes_NW, q_positions_TW = place(jnp.where(is_even_A, slope_NA, 0)), place(jnp.where(is_even_A, 0, -position_TA))
    k_slopes_NW, k_positions_TW = place(jnp.where(is_even_A, 0, slope_NA)), place(jnp.where(is_even_A, position_TA, 0))
    return q_slopes_NW[None] + q_positions_TW[:, None], k_slopes_NW[None] + k_positions_TW[:, None]


def named(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Name what the backward pass needs, for remat policies: attention_query, attention_key and attention_value."""
    return tuple(checkpoint_name(x, f"attention_{name}") for x, name in ((q, "query"), (k, "key"), (v, "value")))


def widen(x: jax.Array, lanes: jax.Array) -> jax.Array:
    """Pad the last axis of x with zeros to that of `lanes` and add them: that fuses where concatenating would copy."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, lanes.shape[-1] - x.shape[-1])]
    return jnp.pad(x, padding) + lanes.astype(x.dtype)


def bfloat16_parts(x_N: jax.Array) -> jax.Array:
    """Split float32 values into NUM_PARTS float32 summands_NP that bfloat16 holds exactly, largest first."""
    parts, rest_N = [], x_N
    for _ in range(NUM_PARTS):
        # A cast there and back would not do: XLA may leave both out.
        part_N = jax.lax.reduce_precision(rest_N, exponent_bits=8, mantissa_bits=7)
        parts.append(part_N)
        rest_N = rest_N - part_N
    return jnp.stack(parts, axis=1)
