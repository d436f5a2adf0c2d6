"""Exchange a sharded length for heads, and back (Ulysses, arXiv 2309.14509); all of this runs inside shard_map.

Each of the S devices that share sequences has its own positions of all heads, and needs all positions of some heads. It
sends and receives pieces [S, B, T, M], one per device: before the exchange S groups of heads at its own positions,
after it S spans of positions of its own group. A piece has its heads side by side in M = heads x head dim, as
projections write and kernels read them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from btlm_jax.parallel.collectives import with_row_major_layout
from btlm_jax.parallel.mesh import Axes, num_ways


def attend_exchanged(
    attend_local: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    slopes_N: jax.Array,
    starts_BT: jax.Array | None,
    *,
    scale: float,
    length_axes: Axes,
) -> jax.Array:
    """Attend with whole sequences of this device's group of heads; return o_BTNH of all heads at its own positions."""
    head_dim = q_BTNH.shape[-1]
    pieces_SBTM = [seq_to_heads(x, length_axes) for x in (q_BTNH, k_BTNH, v_BTNH)]
    S, B, T, M = pieces_SBTM[0].shape
    whole = (B, S * T, M // head_dim, head_dim)
    q_BTNH, k_BTNH, v_BTNH = (merge_pieces(x).reshape(whole) for x in pieces_SBTM)
    o_BTNH = attend_local(q_BTNH, k_BTNH, v_BTNH, slopes_N, starts_BT, scale=scale)
    o_SBTM = all_to_all(split_pieces(o_BTNH.reshape(B, S * T, M), S), length_axes)
    return heads_to_seq(o_SBTM, head_dim=head_dim)


def seq_to_heads(x_BTNH: jax.Array, axes: Axes) -> jax.Array:
    """Exchange positions for heads; return pieces_SBTM, which together are all positions of a group of heads."""
    B, T, N, H = x_BTNH.shape
    ways = num_ways(jax.sharding.get_abstract_mesh(), axes)
    return all_to_all(jnp.moveaxis(x_BTNH.reshape(B, T, ways, N // ways * H), 2, 0), axes)


def heads_to_seq(x_SBTM: jax.Array, *, head_dim: int) -> jax.Array:
    """Return x_BTNH of all heads at the own positions, of pieces that `all_to_all` has sent back."""
    S, B, T, M = x_SBTM.shape
    return jnp.moveaxis(x_SBTM, 0, 2).reshape(B, T, S * M // head_dim, head_dim)


def all_to_all(pieces_SBXX: jax.Array, axes: Axes) -> jax.Array:
    """Send every device one piece and receive one of each: from groups of heads to spans of positions, or back."""
    if not axes:
        return pieces_SBXX
    return with_row_major_layout(
        jax.lax.all_to_all(with_row_major_layout(pieces_SBXX), axes, split_axis=0, concat_axis=0, tiled=True)
    )


def merge_pieces(x_SBTM: jax.Array) -> jax.Array:
    """Return all positions of pieces one after the other, x_BTM."""
    S, B, T, M = x_SBTM.shape
    return jnp.moveaxis(x_SBTM, 0, 1).reshape(B, S * T, M)


def split_pieces(x_BTM: jax.Array, num: int) -> jax.Array:
    """Undo `merge_pieces`."""
    B, T, M = x_BTM.shape
    return jnp.moveaxis(x_BTM.reshape(B, num, T // num, M), 1, 0)
