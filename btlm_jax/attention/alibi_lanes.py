"""ALiBi as extra lanes of q and k, for kernels that take no bias: q' . k' = q . k + slope * (s - t).

Kernels multiply in bfloat16, whose 8 bits represent neither a slope nor a position exactly. So both are split into
parts that it represents exactly: a slope into three, a position into a multiple of 256 and the remainder. The products
are then exact and summed in float32. The lanes are constants: the gradient that a kernel returns for them is dropped.
"""

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.parallel.mesh import TPU_LANES

NUM_PARTS = 3  # of a slope: 3 x 8 bits are a float32's 24
NUM_LANES = 4 * NUM_PARTS
MAX_LENGTH = 1 << 16  # multiples of 256 below it have 8 significant bits


def whole_tiles(size: int) -> int:
    """Return a number of lanes rounded up to whole tiles of a TPU."""
    return -(-size // TPU_LANES) * TPU_LANES


def head_of_lane(num_heads: int, head_dim: int) -> np.ndarray:
    """Return which lanes belong to which head where heads are side by side, float32 [N, M] of zeros and ones.

    A product with it sums over each head's lanes. A reshape to [heads, head dim] would make a TPU move all lanes.
    """
    return np.repeat(np.eye(num_heads, dtype=np.float32), head_dim, axis=1)


def alibi_lanes(slopes_N: jax.Array, *, length: int, head_dim: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Return what `widen` adds to q and to k, both [T, N, W]: ALiBi in lanes H to H + NUM_LANES, zeros elsewhere.

    Per part of a slope, q has the lanes (slope, -coarse, slope, -fine) and k has (coarse, slope, fine, slope), where
    coarse + fine is a position. The sum is exactly slope * (s - t), so scores stay as small as with a bias.

    Raises:
      ValueError: more positions than two parts of 8 bits can count.
    """
    if length > MAX_LENGTH:
        raise ValueError(f"ALiBi inside q and k counts {MAX_LENGTH:,} positions; got a length of {length:,}")
    assert width >= head_dim + NUM_LANES

    def padded(x_XA):
        return jnp.pad(x_XA, ((0, 0), (head_dim, width - head_dim - NUM_LANES)))

    slope_NA = jnp.repeat(bfloat16_parts(slopes_N), 4, axis=1)
    position_T = jnp.arange(length)
    coarse_T, fine_T = position_T // 256 * 256, position_T % 256
    position_TA = jnp.tile(jnp.stack([coarse_T, coarse_T, fine_T, fine_T], axis=1), NUM_PARTS).astype(jnp.float32)
    is_even_A = (jnp.arange(NUM_LANES) % 2 == 0)[None]
    q_slopes_NW, q_positions_TW = (
        padded(jnp.where(is_even_A, slope_NA, 0)),
        padded(jnp.where(is_even_A, 0, -position_TA)),
    )
    k_slopes_NW, k_positions_TW = (
        padded(jnp.where(is_even_A, 0, slope_NA)),
        padded(jnp.where(is_even_A, position_TA, 0)),
    )
    return q_slopes_NW[None] + q_positions_TW[:, None], k_slopes_NW[None] + k_positions_TW[:, None]


def widen(x: jax.Array, lanes: jax.Array) -> jax.Array:
    """Pad the last dim of x with zeros to that of `lanes` and add them: XLA fuses that, and copies a concatenation."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, lanes.shape[-1] - x.shape[-1])]
    return jnp.pad(x, padding) + lanes.astype(x.dtype)


def bfloat16_parts(x_N: jax.Array) -> jax.Array:
    """Split float32 values into NUM_PARTS float32 summands_NP that bfloat16 represents exactly, largest first."""
    parts, remainder_N = [], x_N
    for _ in range(NUM_PARTS):
        # Not a cast to bfloat16 and back, which XLA may remove.
        part_N = jax.lax.reduce_precision(remainder_N, exponent_bits=8, mantissa_bits=7)
        parts.append(part_N)
        remainder_N = remainder_N - part_N
    return jnp.stack(parts, axis=1)
