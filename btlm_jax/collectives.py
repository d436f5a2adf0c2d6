"""How a stored weight becomes one in use, and a gradient goes back: exchanges between devices, inside `jax.shard_map`.

A weight is stored in float32, split along its model dim over (fsdp, tensor). In use it has the activations' dtype, is
whole along the model dim, and its other dim is padded with zeros to a multiple of the tensor axis and split over that.
Its gradient is float32 when it is summed over the devices, and never whole on all of them: each gets the sum of its own
part (reduce-scatter over fsdp), then adds it up over the axes that hold copies of that part.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from btlm_jax.sharding import CONTEXT, FSDP, SHARED, TENSOR

COPIES = (SHARED, CONTEXT)  # the axes whose devices store the same part of every weight


def gather_kernel(stored_XX: jax.Array, *, dtype: jnp.dtype, embed_dim: int) -> jax.Array:
    """Return a stored matrix as it is used on this device; `embed_dim` (0 or 1) is the dim that was split."""
    other_dim = 1 - embed_dim
    part_XX = stored_XX.astype(dtype)
    if (ways := jax.lax.axis_size(TENSOR)) > 1:
        part_XX = _pad(part_XX, other_dim, padded_size(part_XX.shape[other_dim], ways))
        part_XX = jax.lax.all_to_all(part_XX, TENSOR, split_axis=other_dim, concat_axis=embed_dim, tiled=True)
    return jax.lax.all_gather(part_XX, FSDP, axis=embed_dim, tiled=True)


def scatter_kernel_gradient(grad_XX: jax.Array, *, embed_dim: int, other_size: int) -> jax.Array:
    """Return the sum over devices of gradients of a matrix in use, as it is stored; `other_size` is before padding."""
    other_dim = 1 - embed_dim
    part_XX = jax.lax.psum_scatter(grad_XX, FSDP, scatter_dimension=embed_dim, tiled=True)
    if jax.lax.axis_size(TENSOR) > 1:
        part_XX = jax.lax.all_to_all(part_XX, TENSOR, split_axis=embed_dim, concat_axis=other_dim, tiled=True)
        part_XX = jax.lax.slice_in_dim(part_XX, 0, other_size, axis=other_dim)
    return jax.lax.psum(part_XX, COPIES)


def gather_table(stored_VD: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Return the whole embedding table on every device."""
    return jax.lax.all_gather(stored_VD.astype(dtype), (FSDP, TENSOR), axis=1, tiled=True)


def scatter_table_gradient(grad_VD: jax.Array) -> jax.Array:
    """Return the sum over all devices of gradients of the whole table, as it is stored."""
    return jax.lax.psum(jax.lax.psum_scatter(grad_VD, (FSDP, TENSOR), scatter_dimension=1, tiled=True), COPIES)


def own_part(x: jax.Array, *, dim: int, size: int) -> jax.Array:
    """Return this device's part along the tensor axis of a vector or matrix, padded as `gather_kernel` pads."""
    ways = jax.lax.axis_size(TENSOR)
    if ways == 1:
        return x
    padded = _pad(x, dim, padded_size(size, ways))
    part = padded.shape[dim] // ways
    return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(TENSOR) * part, part, axis=dim)


def padded_size(size: int, ways: int) -> int:
    """Return the next multiple of `ways`."""
    return -(-size // ways) * ways


def _pad(x: jax.Array, dim: int, size: int) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[dim] = (0, size - x.shape[dim])
    return jnp.pad(x, padding)
