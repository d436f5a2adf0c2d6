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

from btlm_jax.parallel.mesh import CONTEXT, FSDP, SHARED, TENSOR, platform

COPIES = (SHARED, CONTEXT)  # the axes whose devices store the same part of every weight
TABLE_PIECE = 8192  # tokens whose gradients are scattered at a time


def gather_kernel(stored_XX: jax.Array, *, dtype: jnp.dtype, embed_dim: int) -> jax.Array:
    """Return a stored matrix as it is used on this device; `embed_dim` (0 or 1) is the dim that was split."""
    part_XX = _exchange(stored_XX.astype(dtype), split_dim=1 - embed_dim, join_dim=embed_dim)
    return _gather(part_XX, FSDP, dim=embed_dim)


def scatter_kernel_gradient(grad_XX: jax.Array, *, embed_dim: int) -> jax.Array:
    """Return the sum over all devices of the gradients of a matrix in use, as it is stored."""
    part_XX = _exchange(_scatter(grad_XX, FSDP, dim=embed_dim), split_dim=embed_dim, join_dim=1 - embed_dim)
    return jax.lax.psum(part_XX, COPIES)


def gather_table(stored_VD: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Return the whole embedding table on every device."""
    return _gather(stored_VD.astype(dtype), (FSDP, TENSOR), dim=1)


def scatter_table_gradient(grad_VD: jax.Array) -> jax.Array:
    """Return the sum over all devices of gradients of the whole table, as it is stored.

    In pieces, because XLA:TPU has a very large matrix sent to everyone.
    """
    pieces = jnp.split(grad_VD, list(range(TABLE_PIECE, grad_VD.shape[0], TABLE_PIECE)))
    return jax.lax.psum(jnp.concatenate([_scatter(piece, (FSDP, TENSOR), dim=1) for piece in pieces]), COPIES)


def own_part(x_M: jax.Array) -> jax.Array:
    """Return this device's part of a vector along the tensor axis."""
    part = x_M.shape[0] // jax.lax.axis_size(TENSOR)
    return jax.lax.dynamic_slice_in_dim(x_M, jax.lax.axis_index(TENSOR) * part, part)


def put_parts_together(x_M: jax.Array) -> jax.Array:
    """Return the whole vector of which `own_part` takes parts, zero but for this device's."""
    ways = jax.lax.axis_size(TENSOR)
    whole_M = jnp.zeros(x_M.shape[0] * ways, x_M.dtype)
    return jax.lax.dynamic_update_slice_in_dim(whole_M, x_M, jax.lax.axis_index(TENSOR) * x_M.shape[0], axis=0)


def in_order(x: jax.Array) -> jax.Array:
    """Have a TPU keep x with its last dim innermost: left to itself it may choose another, and copy later."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))) if platform() == "tpu" else x


# An exchange of a device with itself is left out here: XLA:CPU would copy (10 % of a step).


def _gather(part_XX: jax.Array, axes, *, dim: int) -> jax.Array:
    if jax.lax.axis_size(axes) == 1:
        return part_XX
    return jax.lax.all_gather(part_XX, axes, axis=dim, tiled=True)


def _scatter(grad_XX: jax.Array, axes, *, dim: int) -> jax.Array:
    """Sum a matrix over the devices of mesh axes and give each its part of `dim`.

    A TPU scatters along the outer dim in memory; along the inner one XLA has it send everything to everyone instead.
    """
    if jax.lax.axis_size(axes) == 1:
        return grad_XX
    if platform() == "tpu":
        grad_XX = with_layout_constraint(grad_XX, Layout(major_to_minor=(dim, 1 - dim)))
    return jax.lax.psum_scatter(grad_XX, axes, scatter_dimension=dim, tiled=True)


def _exchange(part_XX: jax.Array, *, split_dim: int, join_dim: int) -> jax.Array:
    """Go from a matrix split over the tensor axis along `join_dim` to one split along `split_dim`."""
    if jax.lax.axis_size(TENSOR) == 1:
        return part_XX
    return jax.lax.all_to_all(part_XX, TENSOR, split_axis=split_dim, concat_axis=join_dim, tiled=True)
