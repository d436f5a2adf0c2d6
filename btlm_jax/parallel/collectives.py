"""Exchanges between devices that turn stored weights into weights in use and back; called inside `jax.shard_map`.

A weight is stored in float32, split along its model dim over (fsdp, tensor). In use it has the activations' dtype, is
whole along the model dim and split along its hidden dim over tensor. Its gradient is never whole on all devices: a
reduce-scatter over fsdp, in float32 or bfloat16 (mesh.gradient_dtype), leaves each the sum of its own part. That is
summed in float32 over the axes that hold replicas of the part, and last over slices: all else stays within one.

A collective over a single device is left out: XLA:CPU would copy its operand (10 % of the local step, see LOG.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from btlm_jax.parallel.mesh import BATCH_OR_CONTEXT, CONTEXT, FSDP, SLICE, TENSOR, platform

REPLICA_AXES = (BATCH_OR_CONTEXT, CONTEXT)  # the axes whose devices store the same part of every weight
TABLE_PIECE = 8192  # tokens whose gradients are scattered at a time


def gather_kernel(stored_XX: jax.Array, *, dtype: jnp.dtype, embed_dim: int) -> jax.Array:
    """Return a stored matrix as it is used on this device; `embed_dim` (0 or 1) is the dim that is split."""
    kernel_XX = stored_XX.astype(dtype)
    if jax.lax.axis_size(TENSOR) > 1:
        kernel_XX = jax.lax.all_to_all(kernel_XX, TENSOR, split_axis=1 - embed_dim, concat_axis=embed_dim, tiled=True)
    if jax.lax.axis_size(FSDP) > 1:
        kernel_XX = jax.lax.all_gather(kernel_XX, FSDP, axis=embed_dim, tiled=True)
    return kernel_XX


def scatter_kernel_gradient(grad_XX: jax.Array, *, embed_dim: int, dtype: str) -> jax.Array:
    """Return the float32 sum over all devices of a matrix' gradients, split as it is stored; scattered in `dtype`."""
    if jax.lax.axis_size(FSDP) > 1:
        grad_XX = _reduce_scatter(grad_XX.astype(dtype), FSDP, dim=embed_dim)
    if jax.lax.axis_size(TENSOR) > 1:
        grad_XX = jax.lax.all_to_all(grad_XX, TENSOR, split_axis=embed_dim, concat_axis=1 - embed_dim, tiled=True)
    return sum_gradient(grad_XX.astype(jnp.float32), REPLICA_AXES)


def gather_table(stored_VD: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Return the whole embedding table on every device."""
    table_VD = stored_VD.astype(dtype)
    if jax.lax.axis_size((FSDP, TENSOR)) > 1:
        table_VD = jax.lax.all_gather(table_VD, (FSDP, TENSOR), axis=1, tiled=True)
    return table_VD


def scatter_table_gradient(grad_VD: jax.Array, *, dtype: str) -> jax.Array:
    """Do so for the whole table; in pieces, as XLA:TPU lowers a very large reduce-scatter to an all-reduce."""
    pieces = jnp.split(grad_VD, list(range(TABLE_PIECE, grad_VD.shape[0], TABLE_PIECE)))
    if jax.lax.axis_size((FSDP, TENSOR)) > 1:
        pieces = [_reduce_scatter(piece.astype(dtype), (FSDP, TENSOR), dim=1) for piece in pieces]
    return sum_gradient(jnp.concatenate(pieces).astype(jnp.float32), REPLICA_AXES)


def sum_gradient(grad, axes: tuple[str, ...]):
    """Return the sum of a gradient over these axes of the mesh, and then over slices, of which `axes` has none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1:
        return grad
    grad = jax.lax.psum(grad, axes)
    return jax.lax.psum(grad, SLICE) if SLICE in mesh.axis_names else grad


def with_row_major_layout(x: jax.Array) -> jax.Array:
    """Have a TPU store x with its last dim innermost; XLA might choose another layout there, and copy later."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))) if platform() == "tpu" else x


def _reduce_scatter(grad_XX: jax.Array, axes: str | tuple[str, ...], *, dim: int) -> jax.Array:
    """Sum a matrix over the devices of mesh axes and give each its part of `dim`.

    XLA:TPU scatters along the outer dim in memory; along the inner one it would lower to an all-reduce.
    """
    if platform() == "tpu":
        grad_XX = with_layout_constraint(grad_XX, Layout(major_to_minor=(dim, 1 - dim)))
    return jax.lax.psum_scatter(grad_XX, axes, scatter_dimension=dim, tiled=True)
