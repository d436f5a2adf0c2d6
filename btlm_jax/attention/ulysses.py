"""Positions for heads and back, where a length is split over devices (Ulysses, arXiv 2309.14509); inside shard_map.

What goes out and comes in lies in pieces [S, B, T, M], one for each of the S devices: S groups of heads of a device's
own positions before the exchange, S spans of positions of its own heads after it. A piece keeps its heads side by side
in M lanes, as projections and kernels have them.
"""

import jax
import jax.numpy as jnp

from btlm_jax.parallel.collectives import with_row_major_layout
from btlm_jax.parallel.mesh import Axes, num_ways


def positions_for_heads(x_BTNH: jax.Array, axes: Axes) -> jax.Array:
    """Give away most heads of the own positions; return pieces_SBTM, which together are all positions of few heads."""
    B, T, N, H = x_BTNH.shape
    ways = num_ways(jax.sharding.get_abstract_mesh(), axes)
    return exchanged(jnp.moveaxis(x_BTNH.reshape(B, T, ways, N // ways * H), 2, 0), axes)


def own_positions(x_SBTM: jax.Array, *, head_dim: int) -> jax.Array:
    """Return x_BTNH of all heads at the own positions, of pieces that have been exchanged back."""
    S, B, T, M = x_SBTM.shape
    return jnp.moveaxis(x_SBTM, 0, 2).reshape(B, T, S * M // head_dim, head_dim)


def exchanged(pieces_SBXX: jax.Array, axes: Axes) -> jax.Array:
    """Give every device one piece and get one of each: from groups of heads to spans of positions, or back."""
    if not axes:
        return pieces_SBXX
    return with_row_major_layout(
        jax.lax.all_to_all(with_row_major_layout(pieces_SBXX), axes, split_axis=0, concat_axis=0, tiled=True)
    )


def joined(x_SBTM: jax.Array) -> jax.Array:
    """Return all positions of pieces one after the other, x_BTM."""
    S, B, T, M = x_SBTM.shape
    return jnp.moveaxis(x_SBTM, 0, 1).reshape(B, S * T, M)


def in_pieces(x_BTM: jax.Array, num: int) -> jax.Array:
    """Undo `joined`."""
    B, T, M = x_BTM.shape
    return jnp.moveaxis(x_BTM.reshape(B, num, T // num, M), 1, 0)
