"""y = x @ kernel + bias between the model dim and a hidden dim: one signature, two implementations that agree.

`project_plain` is one einsum, whose shardings tell XLA what devices must exchange: the page to read, and the oracle of
`project_scheduled`, which runs. That one says itself what is exchanged, when and in which dtype: the kernel is gathered
in the activations' dtype for each use, forward and backward; its gradient is computed and returned in float32, and
summed over devices (reduce-scatter) in the dtype of the rules.

In both the hidden dim is split over the tensor axis: a projection into it exchanges no activations forward, one out of
it sums partial products. Activations hold heads in the order of `device_head_order`, stored weights in their own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from btlm_jax.kernels import are_for_training, transpose
from btlm_jax.parallel.collectives import (
    REPLICA_AXES,
    gather_kernel,
    scatter_kernel_gradient,
    sum_gradient,
    with_row_major_layout,
)
from btlm_jax.parallel.mesh import FSDP, TENSOR, TPU_LANES, AxisRules, device_head_order, num_ways, platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """How a projection is computed on the current mesh: what `make_projection` decides before anything is multiplied.

    As a matrix a kernel has its hidden dims as one. The scheduled product has the dims B batch, T length, R rows (batch
    x length), K and M (the kernel's as a matrix) and S, groups of heads.
    """

    embed_dim: int  # the matrix's model dim: 0 for a projection into the hidden dim, 1 for one out of it
    hidden_shape: tuple[int, ...]  # as stored: (d_ff,) or (heads, head dim)
    padded_shape: tuple[int, ...]  # as activations have it
    head_order: tuple[int, ...]  # of activations; empty where it is the stored one, which needs no copy
    x_spec: PartitionSpec
    kernel_spec: PartitionSpec
    bias_spec: PartitionSpec
    y_spec: PartitionSpec
    x_dims: str
    kernel_dims: str
    y_dims: str
    num_groups: int  # S
    kernel_shape: tuple[int, ...]  # of kernel_dims, on one device
    y_shape: tuple[int, ...]  # on one device, without batch and length
    is_on_tpu: bool
    is_bias_gradient_a_product: bool
    is_alone: bool  # on a mesh of one device, where XLA:CPU would copy what is summed over devices
    result_dtype: jnp.dtype | None  # of products, before they are rounded; None: the operands'
    is_transposed_first: bool  # what is summed over rows
    gradient_dtype: str  # of the rules

    def to_device_order(self, stored: jax.Array, *, dim: int) -> jax.Array:
        """Return a stored kernel or bias with its hidden dims, from `dim` on, merged: padded, heads in device order."""
        end = dim + len(self.hidden_shape)
        shape = (*stored.shape[:dim], *self.padded_shape, *stored.shape[end:])
        x = jnp.pad(stored, [(0, new - old) for old, new in zip(stored.shape, shape, strict=True)])
        if self.head_order:
            x = jnp.take(x, np.array(self.head_order), axis=dim)
        return x.reshape(*shape[:dim], math.prod(self.padded_shape), *shape[end:])

    def to_stored_order(self, x: jax.Array, *, dim: int) -> jax.Array:
        """Undo `to_device_order`."""
        x = x.reshape(*x.shape[:dim], *self.padded_shape, *x.shape[dim + 1 :])
        if self.head_order:
            x = jnp.take(x, np.argsort(self.head_order), axis=dim)
        end = dim + len(self.hidden_shape)
        shape = (*x.shape[:dim], *self.hidden_shape, *x.shape[end:])
        return x[tuple(slice(size) for size in shape)]

    def to_layout(self, x: jax.Array, dims: str) -> jax.Array:
        """[B, T, ...] -> the dims that an activation has in the product."""
        B, T, *rest = x.shape
        if "R" in dims:
            return x.reshape(B * T, math.prod(rest))
        if "S" in dims:
            return jnp.moveaxis(x.reshape(B, T, self.num_groups, math.prod(rest) // self.num_groups), 2, 0)
        return x.reshape(B, T, math.prod(rest))


Project = Callable[[Projection, jax.Array, jax.Array, jax.Array], jax.Array]  # of both implementations


def project_plain(projection: Projection, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x [B, T, *in] @ kernel [*in, *out] + bias [*out] as [B, T, *out] in x's dtype.

    Kernel and bias are float32, as stored. The hidden dims of x or y have their `padded_shape`, heads in the order of
    `device_head_order`: what is beyond the kernel is 0 in y, and ignored in x. The kernel is rounded to x's dtype;
    products and the kernel's gradient are float32.
    """
    hidden = "NH"[-len(projection.hidden_shape) :]
    rounded = kernel + jax.lax.stop_gradient(kernel.astype(x.dtype).astype(jnp.float32) - kernel)
    whole_XX = jax.sharding.reshard(rounded, PartitionSpec(*(None for _ in kernel.shape)))
    whole_XX = projection.to_device_order(whole_XX, dim=1 - projection.embed_dim)
    if projection.embed_dim == 0:
        product, spec = f"BTD,D{hidden}->BT{hidden}", PartitionSpec(None, *projection.y_spec[2:])
        kernel = whole_XX.reshape(whole_XX.shape[0], *projection.padded_shape)
        bias = projection.to_device_order(bias, dim=0).reshape(projection.padded_shape)
    else:
        product, spec = f"BT{hidden},{hidden}D->BTD", PartitionSpec(*projection.x_spec[2:], None)
        kernel = whole_XX.reshape(*projection.padded_shape, whole_XX.shape[1])
    bias = jax.sharding.reshard(bias, PartitionSpec(*projection.y_spec[2:]))
    kernel = jax.sharding.reshard(kernel, spec)
    y = jnp.einsum(product, x.astype(jnp.float32), kernel, out_sharding=projection.y_spec)
    return (y + bias[None, None]).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_scheduled(projection: Projection, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Do as `project_plain`, but multiply in x's dtype and exchange as the module says."""
    into_hidden, x_dims, y_dims = projection.embed_dim == 0, projection.x_dims, projection.y_dims

    def local(x, kernel, bias):
        kernel_KM = projection.to_device_order(kernel, dim=1 - projection.embed_dim)
        kernel_KM = gather_kernel(kernel_KM, dtype=x.dtype, embed_dim=projection.embed_dim)
        x_laid_out, in_use = projection.to_layout(x, x_dims), kernel_KM.reshape(projection.kernel_shape)
        product = f"{x_dims},{projection.kernel_dims}->{y_dims}"
        y = jnp.einsum(product, x_laid_out, in_use, preferred_element_type=projection.result_dtype).astype(x.dtype)
        y = with_row_major_layout(y) if projection.is_on_tpu else y
        if into_hidden:  # each device adds its own part of the bias
            bias = projection.to_device_order(bias, dim=0)
            size = bias.shape[0] // jax.lax.axis_size(TENSOR)
            bias = jax.lax.dynamic_slice_in_dim(bias, jax.lax.axis_index(TENSOR) * size, size)
        else:
            y = y if projection.is_alone else jax.lax.psum(y, TENSOR)
        y = y + projection.to_layout(bias.astype(x.dtype)[None, None], y_dims)
        return (jnp.moveaxis(y, 0, 2) if "S" in y_dims else y).reshape(*x.shape[:2], *projection.y_shape)

    in_specs = projection.x_spec, projection.kernel_spec, projection.bias_spec
    check = not projection.is_alone
    return jax.shard_map(local, in_specs=in_specs, out_specs=projection.y_spec, check_vma=check)(x, kernel, bias)


def _forward(projection: Projection, x: jax.Array, kernel: jax.Array, bias: jax.Array):
    return project_scheduled(projection, x, kernel, bias), (x, kernel)


def _backward(projection: Projection, residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
    into_hidden, x_dims, y_dims = projection.embed_dim == 0, projection.x_dims, projection.y_dims

    def local(x, kernel, dy):
        kernel_KM = projection.to_device_order(kernel, dim=1 - projection.embed_dim)
        kernel_KM = gather_kernel(kernel_KM, dtype=x.dtype, embed_dim=projection.embed_dim)
        x_laid_out, dy_laid_out = projection.to_layout(x, x_dims), projection.to_layout(dy, y_dims)
        in_use, kernel_dims = kernel_KM.reshape(projection.kernel_shape), projection.kernel_dims
        product, result_dtype = f"{y_dims},{kernel_dims}->{x_dims}", projection.result_dtype
        dx = jnp.einsum(product, dy_laid_out, in_use, preferred_element_type=result_dtype).astype(x.dtype)
        dx = with_row_major_layout(dx) if projection.is_on_tpu else dx
        first_dims = x_dims
        if projection.is_transposed_first:
            first_dims, x_laid_out = x_dims[::-1], transpose(x_laid_out)
        product = f"{first_dims},{y_dims}->{kernel_dims}"
        dkernel = jnp.einsum(product, x_laid_out, dy_laid_out, preferred_element_type=jnp.float32)
        dkernel_KM, dtype = dkernel.reshape(kernel_KM.shape), projection.gradient_dtype
        dkernel_KM = scatter_kernel_gradient(dkernel_KM, embed_dim=projection.embed_dim, dtype=dtype)
        if projection.is_bias_gradient_a_product:
            dbias = _sum_rows_by_product(dy_laid_out, y_dims)
        else:
            rows = tuple(dim for dim, letter in enumerate(y_dims) if letter in "BTR")
            dbias = dy_laid_out.sum(rows, dtype=jnp.float32).reshape(-1)
        axes = (FSDP, *REPLICA_AXES)
        if into_hidden:  # each device has the gradient of its own part of the bias
            dx, size = dx if projection.is_alone else jax.lax.psum(dx, TENSOR), dbias.shape[0]
            zeros = jnp.zeros(size * jax.lax.axis_size(TENSOR), dbias.dtype)
            dbias = jax.lax.dynamic_update_slice_in_dim(zeros, dbias, jax.lax.axis_index(TENSOR) * size, axis=0)
            dbias, axes = projection.to_stored_order(dbias, dim=0), (*axes, TENSOR)
        dx = (jnp.moveaxis(dx, 0, 2) if "S" in x_dims else dx).reshape(x.shape)
        dkernel = projection.to_stored_order(dkernel_KM, dim=1 - projection.embed_dim)
        return dx, dkernel, sum_gradient(dbias, axes)

    in_specs = projection.x_spec, projection.kernel_spec, projection.y_spec
    out_specs = projection.x_spec, projection.kernel_spec, projection.bias_spec
    check = not projection.is_alone
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=check)(*residuals, dy)


project_scheduled.defvjp(_forward, _backward)


def make_projection(
    *,
    in_shape: tuple[int, ...],
    in_axes: tuple[str, ...],
    out_shape: tuple[int, ...],
    out_axes: tuple[str, ...],
    rules: AxisRules,
) -> Projection:
    """Decide how x [B, T, *in_shape] and y [B, T, *out_shape] are multiplied on the current mesh.

    Axes are the kernel's logical ones; those of one side are ("embed",).

    XLA:CPU takes transposed matrices as they are in the backward pass, but copies operands of higher rank into new
    layouts first (1.2 times the whole step; LOG.md, 2026-11-23), so batch and length are one dim there. XLA:TPU writes
    [B, T, ...] into what remat saves of all layers at once, but copies matrices there. Heads and their dims are one dim
    on both; on a TPU in S groups of heads where attention exchanges positions for heads (attention/ulysses.py), which
    saves the copies there. In which form XLA:CPU is given its products: docs/internals/cpu-kernels.md.
    """
    mesh = jax.sharding.get_abstract_mesh()
    into_hidden = in_axes == ("embed",)
    hidden_shape, d_model = (out_shape, in_shape[0]) if into_hidden else (in_shape, out_shape[0])
    hidden_used = padded_shape(hidden_shape, tensor=mesh.shape[TENSOR])
    has_heads = len(hidden_shape) == 2
    order = tuple(device_head_order(hidden_shape[0], rules, mesh=mesh).tolist()) if has_heads else ()
    num_groups = num_ways(mesh, rules.length) if has_heads and platform() == "tpu" else 1
    if num_groups > 1:
        dims = ("BTK", "KSM", "SBTM") if into_hidden else ("SBTK", "SKM", "BTM")
    else:
        dims = ("BTK", "KM", "BTM") if platform() == "tpu" else ("RK", "KM", "RM")
    groups = (num_groups,) if num_groups > 1 else ()
    local_hidden = (*groups, math.prod(hidden_used) // mesh.shape[TENSOR] // num_groups)
    local_shape = (hidden_used[0] // mesh.shape[TENSOR], *hidden_used[1:])

    def activation_spec(axes: tuple[str, ...]) -> PartitionSpec:
        return rules.spec("batch", "length", *(axis if axis == "head_dim" else f"act_{axis}" for axis in axes))

    return Projection(
        embed_dim=0 if into_hidden else 1,
        hidden_shape=hidden_shape,
        padded_shape=hidden_used,
        head_order=() if order == tuple(range(len(order))) else order,
        x_spec=activation_spec(in_axes),
        kernel_spec=rules.spec(*in_axes, *out_axes),
        bias_spec=PartitionSpec(*(None for _ in out_shape)),
        y_spec=activation_spec(out_axes),
        x_dims=dims[0],
        kernel_dims=dims[1],
        y_dims=dims[2],
        num_groups=num_groups,
        kernel_shape=(d_model, *local_hidden) if into_hidden else (*local_hidden, d_model),
        y_shape=local_shape if into_hidden else out_shape,
        is_on_tpu=platform() == "tpu",
        # The products that make the gradients of `up` and `gate` take the sums on their way.
        is_bias_gradient_a_product=platform() == "tpu" and out_axes != ("mlp",),
        is_alone=mesh.size == 1,
        result_dtype=jnp.dtype(jnp.float32) if platform() == "cpu" else None,
        is_transposed_first=dims[0] == "RK" and are_for_training(),
        gradient_dtype=rules.gradient_dtype,
    )


def padded_shape(hidden_shape: tuple[int, ...], *, tensor: int) -> tuple[int, ...]:
    """Return a hidden shape, (d_ff,) or (heads, head dim), as activations have it: padded for the hardware.

    A TPU stores the last dim in tiles of 128 and gives an activation whose last dim is no multiple of that another
    layout, which costs a copy at each use. Heads and their dims are one dim there and need no padding.
    """
    *heads, size = hidden_shape
    if heads:
        return hidden_shape
    multiple = tensor * (TPU_LANES if platform() == "tpu" and size > TPU_LANES // 2 else 1)
    return (-(-size // multiple) * multiple,)


def _sum_rows_by_product(dy: jax.Array, dims: str) -> jax.Array:
    """Return the float32 sum of dy over batch and length, in a TPU's matrix unit: for a dy that no product just made.

    As many rows of ones as a tile has, for XLA takes a single one for a sum, 20 times as slow by its own estimate.
    """
    B, T = (dy.shape[dims.index(dim)] for dim in "BT")
    sums = jnp.einsum(
        f"XBT,{dims}->X{dims.replace('BT', '')}",
        jnp.ones((8, B, T), dy.dtype),
        dy,
        precision="highest" if dy.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return sums[0].reshape(-1)
