"""How a stored weight becomes one in use, and a gradient goes back: exchanges between devices, inside `jax.shard_map`.

A weight is stored in float32, split along its model dim over (fsdp, tensor). In use it has the activations' dtype, is
whole along the model dim and split along its other dim over tensor.
Its gradient is float32 when it is summed over the devices, and never whole on all of them: each gets the sum of its own
part (reduce-scatter over fsdp), then adds it up over the axes that hold copies of that part.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from btlm_jax.sharding import CONTEXT, FSDP, SHARED, TENSOR, platform

COPIES = (SHARED, CONTEXT)  # the axes whose devices store the same part of every weight
TABLE_PIECE = 8192  # tokens whose gradients are scattered at a time


def gather_kernel(stored_XX: jax.Array, *, dtype: jnp.dtype, embed_dim: int) -> jax.Array:
    """Return a stored matrix as it is used on this device; `embed_dim` (0 or 1) is the dim that was split."""
    part_XX = stored_XX.astype(dtype)
    if jax.lax.axis_size(TENSOR) > 1:
        part_XX = jax.lax.all_to_all(part_XX, TENSOR, split_axis=1 - embed_dim, concat_axis=embed_dim, tiled=True)
    return jax.lax.all_gather(part_XX, FSDP, axis=embed_dim, tiled=True)


def scatter_kernel_gradient(grad_XX: jax.Array, *, embed_dim: int) -> jax.Array:
    """Return the sum over all devices of the gradients of a matrix in use, as it is stored."""
    part_XX = jax.lax.psum_scatter(_outermost(grad_XX, embed_dim), FSDP, scatter_dimension=embed_dim, tiled=True)
    if jax.lax.axis_size(TENSOR) > 1:
        part_XX = jax.lax.all_to_all(part_XX, TENSOR, split_axis=embed_dim, concat_axis=1 - embed_dim, tiled=True)
    return jax.lax.psum(part_XX, COPIES)


def gather_table(stored_VD: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Return the whole embedding table on every device."""
    return jax.lax.all_gather(stored_VD.astype(dtype), (FSDP, TENSOR), axis=1, tiled=True)


def scatter_table_gradient(grad_DV: jax.Array) -> jax.Array:
    """Return the sum over all devices of gradients of the whole table, transposed, as it is stored: [V, D / ways].

    In pieces, because XLA:TPU has a very large matrix sent to everyone.
    """
    pieces = jnp.split(grad_DV, list(range(TABLE_PIECE, grad_DV.shape[1], TABLE_PIECE)), axis=1)
    parts = [
        jax.lax.psum_scatter(_outermost(piece, 0), (FSDP, TENSOR), scatter_dimension=0, tiled=True) for piece in pieces
    ]
    return jax.lax.psum(jnp.concatenate(parts, axis=1), COPIES).T


def _outermost(grad_XX: jax.Array, dim: int) -> jax.Array:
    """Put a matrix into memory so that it can be scattered along `dim`.

    A TPU scatters along the outer dim in memory; along the inner one XLA has it send everything to everyone instead.
    """
    if platform() != "tpu":
        return grad_XX
    return with_layout_constraint(grad_XX, Layout(major_to_minor=(dim, 1 - dim)))


def own_part(x_M: jax.Array) -> jax.Array:
    """Return this device's part of a vector along the tensor axis."""
    part = x_M.shape[0] // jax.lax.axis_size(TENSOR)
    return jax.lax.dynamic_slice_in_dim(x_M, jax.lax.axis_index(TENSOR) * part, part)


def put_parts_together(x_M: jax.Array) -> jax.Array:
    """Return the whole vector of which `own_part` takes parts, zero but for this device's."""
    ways = jax.lax.axis_size(TENSOR)
    whole_M = jnp.zeros(x_M.shape[0] * ways, x_M.dtype)
    return jax.lax.dynamic_update_slice_in_dim(whole_M, x_M, jax.lax.axis_index(TENSOR) * x_M.shape[0], axis=0)
