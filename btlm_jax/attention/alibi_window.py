"""How far back ALiBi lets a head see, and how heads are dealt to devices so that all have as much to do."""

import math
import types

import jax
import jax.numpy as jnp

from btlm_jax.attention.alibi_lanes import lanes_of_heads

SPREAD = 64.0  # nats by which scores of a row are taken to differ at most, where nothing is known of them
_ROUNDING = 24 * math.log(2)  # nats from a weight to half a unit in float32's last place


def reach(spread, slopes, *, xp: types.ModuleType = jnp):
    """Return how many positions back a key can lie and still count, not rounded; inf for a head without a slope.

    Let scores of a row, without ALiBi, lie within `spread` nats of each other. Relative to the weight of the query's
    own position, all keys further back than w together weigh at most e^spread * sum over d > w of e^(-slope d); the
    reach is the w for which that is half a unit in float32's last place. Shapes broadcast; `xp` is numpy or jax.numpy.
    """
    return xp.where(slopes > 0, (spread + _ROUNDING - xp.log(-xp.expm1(-slopes))) / slopes, xp.inf)


def largest_spread(q_SBTM: jax.Array, k_SBTM: jax.Array, *, num_heads: int, scale: float) -> jax.Array:
    """Return a bound of how far apart the scores of a row are, float32 [B, N]: 2 * scale * max |q| * max |k|."""
    is_of_head_NM = lanes_of_heads(num_heads, q_SBTM.shape[3] // num_heads).astype(q_SBTM.dtype)

    def longest(x_SBTM):  # squares are rounded, to 8 bits at worst
        square_SBNT = jnp.einsum("SBTM,NM->SBNT", x_SBTM * x_SBTM, is_of_head_NM, preferred_element_type=jnp.float32)
        return jnp.sqrt(1.02 * square_SBNT.max((0, 3)))

    return 2 * scale * longest(q_SBTM) * longest(k_SBTM)
