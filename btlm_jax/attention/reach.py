"""How far back ALiBi lets a head see, and how heads are dealt to devices so that all have the same to do."""

import math

import jax
import jax.numpy as jnp
import numpy as np

ROUNDING = 24 * math.log(2)  # nats from a weight to half a unit in float32's last place


def reach(spread, slopes):
    """Return how many positions back a key can lie and still count, as floats, inf for a head without a slope.

    Let scores of a row, without ALiBi, lie within `spread` nats of each other. Relative to the weight of the query's
    own position, all keys further back than w together weigh at most e^spread * sum over d > w of e^(-slope d); the
    reach is the w for which that is half a unit in float32's last place. Shapes broadcast.
    """
    slopes = jnp.asarray(slopes, jnp.float32)
    return jnp.where(slopes > 0, (spread + ROUNDING - jnp.log(-jnp.expm1(-slopes))) / slopes, jnp.inf)


def largest_spread(q_SBTM: jax.Array, k_SBTM: jax.Array, *, num_heads: int, scale: float) -> jax.Array:
    """Return a bound of how far apart the scores of a row are, float32 [B, N]: 2 * scale * max |q| * max |k|."""
    M = q_SBTM.shape[-1]
    is_of_head_NM = np.repeat(np.eye(num_heads, dtype=q_SBTM.dtype), M // num_heads, axis=1)

    def longest(x_SBTM):  # squares are rounded, to 8 bits at worst
        square_SBNT = jnp.einsum("SBTM,NM->SBNT", x_SBTM * x_SBTM, is_of_head_NM, preferred_element_type=jnp.float32)
        return jnp.sqrt(1.02 * square_SBNT.max((0, 3)))

    return 2 * scale * longest(q_SBTM) * longest(k_SBTM)


def dealt(num_heads: int, *, ways: int) -> np.ndarray:
    """Return the heads in the order in which devices hold them, each device as many one after the other.

    A head's slope says how much there is to compute for it, so heads are dealt like cards, to and fro: of 8 heads and
    2 devices, one holds 0, 3, 4 and 7.
    """
    heads = np.arange(num_heads)
    if num_heads % ways:
        return heads
    rounds = heads.reshape(-1, ways)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T.reshape(-1)
