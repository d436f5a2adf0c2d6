"""y = x @ kernel + bias between the model dim and a hidden one, with its gradients and what devices exchange for them.

The kernel is gathered in the activations' dtype for each use, forward and backward, and its gradient is computed,
summed over devices (reduce-scatter) and returned in float32. The hidden dim is split over `tensor`: a projection into
it needs no exchange forward, one out of it sums partial products.

The products are of two matrices, rows R being batch x length: XLA:CPU takes transposed matrices as they are in the
backward pass, but copies operands of higher rank into new layouts first (measured: 1.2 times the whole step).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from btlm_jax.collectives import COPIES, gather_kernel, own_part, scatter_kernel_gradient
from btlm_jax.sharding import FSDP, TENSOR, AxisRules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """A projection's shapes, without batch and length, and the kernel's logical axes; one side is ("embed",)."""

    in_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_shape: tuple[int, ...]
    out_axes: tuple[str, ...]
    rules: AxisRules

    @property
    def is_from_model_dim(self) -> bool:
        return self.in_axes == ("embed",)

    @property
    def embed_dim(self) -> int:
        """Return which dim of the kernel as a matrix is the model dim."""
        return 0 if self.is_from_model_dim else 1

    @property
    def hidden_size(self) -> int:
        return math.prod(self.out_shape if self.is_from_model_dim else self.in_shape)

    def specs(self) -> tuple:
        """Return the specs of x, kernel, bias and y."""
        spec = self.rules.spec
        return (
            spec("batch", "length", *map(_as_activation, self.in_axes)),
            spec(*self.in_axes, *self.out_axes),
            PartitionSpec(*(None for _ in self.out_shape)),
            spec("batch", "length", *map(_as_activation, self.out_axes)),
        )

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """Return this device's part of the stored kernel as a matrix."""
        rows = math.prod(kernel.shape[: len(self.in_shape)])
        return kernel.reshape(rows, kernel.size // rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(projection: Projection, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x [B, T, *in] @ kernel [*in, *out] + bias [*out] as [B, T, *out] in x's dtype.

    Kernel and bias are float32, as stored. Where `tensor` does not divide a hidden dim of one axis, that dim is padded
    in y, and must be in x, to the next size that it does; there y is 0 and x must be.
    """

    def local(x, kernel, bias):
        kernel_KM = gather_kernel(projection.matrix(kernel), dtype=x.dtype, embed_dim=projection.embed_dim)
        y_RM = _rows(x) @ kernel_KM
        if projection.is_from_model_dim:
            bias_M = own_part(bias.reshape(-1), dim=0, size=projection.hidden_size)
        else:
            y_RM, bias_M = jax.lax.psum(y_RM, TENSOR), bias
        y_RM = y_RM + bias_M.astype(x.dtype)
        return y_RM.reshape(*x.shape[:2], *_local_shape(projection, y_RM.shape[1]))

    x_spec, kernel_spec, bias_spec, y_spec = projection.specs()
    return jax.shard_map(local, in_specs=(x_spec, kernel_spec, bias_spec), out_specs=y_spec)(x, kernel, bias)


def _forward(projection: Projection, x: jax.Array, kernel: jax.Array, bias: jax.Array):
    return project(projection, x, kernel, bias), (x, kernel, bias)


def _backward(projection: Projection, residuals: tuple, dy: jax.Array) -> tuple:
    def local(x, kernel, dy):
        x_RK, dy_RM = _rows(x), _rows(dy)
        kernel_KM = gather_kernel(projection.matrix(kernel), dtype=x.dtype, embed_dim=projection.embed_dim)
        dx_RK = dy_RM @ kernel_KM.T
        if projection.is_from_model_dim:
            dx_RK = jax.lax.psum(dx_RK, TENSOR)
        dkernel_KM = jax.lax.dot_general(x_RK, dy_RM, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        dkernel = scatter_kernel_gradient(
            dkernel_KM, embed_dim=projection.embed_dim, other_size=projection.hidden_size
        ).reshape(kernel.shape)
        return dx_RK.reshape(x.shape), dkernel, _bias_gradient(projection, dy_RM)

    x, kernel, bias = residuals
    x_spec, kernel_spec, bias_spec, y_spec = projection.specs()
    mapped = jax.shard_map(local, in_specs=(x_spec, kernel_spec, y_spec), out_specs=(x_spec, kernel_spec, bias_spec))
    dx, dkernel, dbias = mapped(x, kernel, dy)
    return dx, dkernel, dbias


project.defvjp(_forward, _backward)


def _bias_gradient(projection: Projection, dy_RM: jax.Array) -> jax.Array:
    dbias_M = dy_RM.sum(0, dtype=jnp.float32)
    if projection.is_from_model_dim and (ways := jax.lax.axis_size(TENSOR)) > 1:
        part = dbias_M.shape[0]
        whole_M = jnp.zeros(part * ways, jnp.float32)
        dbias_M = jax.lax.dynamic_update_slice_in_dim(whole_M, dbias_M, jax.lax.axis_index(TENSOR) * part, axis=0)
        dbias_M = dbias_M[: projection.hidden_size]
    axes = (FSDP, *COPIES, TENSOR) if projection.is_from_model_dim else (FSDP, *COPIES)
    return jax.lax.psum(dbias_M, axes).reshape(projection.out_shape)


def _local_shape(projection: Projection, width: int) -> tuple[int, ...]:
    """Return the shape of y's dims after batch and length on one device: of several, only the first is split."""
    return (width // math.prod(projection.out_shape[1:]), *projection.out_shape[1:])


def _as_activation(axis: str) -> str:
    return axis if axis == "head_dim" else f"act_{axis}"


def _rows(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [R, ...as one dim]."""
    rows = x.shape[0] * x.shape[1]
    return x.reshape(rows, x.size // rows)
