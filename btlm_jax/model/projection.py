"""y = x @ kernel + bias between the model dim and a hidden one, with its gradients and what devices exchange for them.

The kernel is gathered in the activations' dtype for each use, forward and backward, and its gradient is computed,
summed over devices (reduce-scatter) and returned in float32. The hidden dim is split over `tensor`: a projection into
it needs no exchange forward, one out of it sums partial products.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from btlm_jax.collectives import COPIES, gather_kernel, own_part, put_parts_together, scatter_kernel_gradient
from btlm_jax.sharding import FSDP, TENSOR, AxisRules, platform

TILE = 128  # lanes of a TPU's vectors


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
    def hidden_shape(self) -> tuple[int, ...]:
        return self.out_shape if self.is_from_model_dim else self.in_shape

    def specs(self) -> tuple[PartitionSpec, ...]:
        """Return the specs of x, kernel, bias and y."""
        spec = self.rules.spec
        return (
            spec("batch", "length", *map(_as_activation, self.in_axes)),
            spec(*self.in_axes, *self.out_axes),
            PartitionSpec(*(None for _ in self.out_shape)),
            spec("batch", "length", *map(_as_activation, self.out_axes)),
        )

    def used(self) -> tuple[int, ...]:
        """Return the hidden shape as all devices together use it; inside shard_map."""
        return used_shape(self.hidden_shape, tensor=jax.lax.axis_size(TENSOR))

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """Return this device's part of the stored kernel as a matrix, its hidden dims padded for use."""
        used = self.used()
        if self.is_from_model_dim:
            return _padded(kernel, (kernel.shape[0], *used)).reshape(kernel.shape[0], math.prod(used))
        return _padded(kernel, (*used, kernel.shape[-1])).reshape(math.prod(used), kernel.shape[-1])

    def as_stored(self, matrix: jax.Array) -> jax.Array:
        """Return what `matrix` was made of."""
        if self.is_from_model_dim:
            return _cut(matrix.reshape(matrix.shape[0], *self.used()), (matrix.shape[0], *self.hidden_shape))
        return _cut(matrix.reshape(*self.used(), matrix.shape[1]), (*self.hidden_shape, matrix.shape[1]))

    def product(self) -> _Product:
        """Return how x, kernel and y are laid out when they are multiplied."""
        if platform() != "tpu":
            return _Product(x="RK", kernel="KM", y="RM")
        return _Product(x="BTK", kernel="KM", y="BTM")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Product:
    """The dims of x, kernel and y in the product.

    XLA:CPU takes transposed matrices as they are in the backward pass, but copies operands of higher rank into new
    layouts first (measured: 1.2 times the whole step), so rows R are batch x length there. XLA:TPU writes [B, T, ...]
    into what remat saves of all layers at once, but copies matrices there. Heads lie side by side on both.
    """

    x: str
    kernel: str
    y: str

    def forward(self, x, kernel):
        return jnp.einsum(f"{self.x},{self.kernel}->{self.y}", x, kernel)

    def x_gradient(self, dy, kernel):
        return jnp.einsum(f"{self.y},{self.kernel}->{self.x}", dy, kernel)

    def kernel_gradient(self, x, dy):
        return jnp.einsum(f"{self.x},{self.y}->{self.kernel}", x, dy, preferred_element_type=jnp.float32)

    def bias_gradient(self, dy):
        over = tuple(dim for dim, letter in enumerate(self.y) if letter in "BTR")
        return dy.sum(over, dtype=jnp.float32)


def _arranged(x: jax.Array, dims: str) -> jax.Array:
    """[B, T, ...] -> as a product's `dims`."""
    rows = x.shape[:2] if dims[0] == "B" else (x.shape[0] * x.shape[1],)
    return x.reshape(*rows, math.prod(x.shape[2:]))


def used_shape(hidden_shape: tuple[int, ...], *, tensor: int) -> tuple[int, ...]:
    """Return a hidden shape, (d_ff,) or (heads, head dim), as it is in use: padded for the hardware.

    A TPU keeps the last dim in tiles of 128 and lays an activation whose last dim is none of them out the other way
    round, which costs a copy at every turn. Heads lie side by side and need no padding of their own.
    """
    *outer, last = hidden_shape
    if outer:
        return hidden_shape
    tile = TILE if platform() == "tpu" and last > TILE // 2 else 1
    multiple = tile * tensor
    return (-(-last // multiple) * multiple,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(projection: Projection, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x [B, T, *in] @ kernel [*in, *out] + bias [*out] as [B, T, *out] in x's dtype.

    Kernel and bias are float32, as stored. Hidden dims of x and y have their `used_shape`: what is beyond the kernel is
    0 in y, and ignored in x.
    """

    def local(x, kernel, bias):
        product, used = projection.product(), projection.used()
        kernel_KM = gather_kernel(projection.matrix(kernel), dtype=x.dtype, embed_dim=projection.embed_dim)
        y = product.forward(_arranged(x, product.x), kernel_KM)
        if projection.is_from_model_dim:
            last = used[1:]
            bias = own_part(_padded(bias, used).reshape(-1))
        else:
            last = ()
            y = jax.lax.psum(y, TENSOR)
        y = y + bias.astype(x.dtype)
        return y.reshape(*x.shape[:2], y.shape[-1] // math.prod(last), *last)

    x_spec, kernel_spec, bias_spec, y_spec = projection.specs()
    return jax.shard_map(local, in_specs=(x_spec, kernel_spec, bias_spec), out_specs=y_spec)(x, kernel, bias)


def _forward(projection: Projection, x: jax.Array, kernel: jax.Array, bias: jax.Array):
    return project(projection, x, kernel, bias), (x, kernel)


def _backward(projection: Projection, residuals: tuple, dy: jax.Array) -> tuple:
    def local(x, kernel, dy):
        product, used = projection.product(), projection.used()
        kernel_KM = gather_kernel(projection.matrix(kernel), dtype=x.dtype, embed_dim=projection.embed_dim)
        x_product, dy_product = _arranged(x, product.x), _arranged(dy, product.y)
        dx = product.x_gradient(dy_product, kernel_KM)
        dkernel_KM = product.kernel_gradient(x_product, dy_product)
        dkernel_KM = scatter_kernel_gradient(dkernel_KM, embed_dim=projection.embed_dim)
        dbias, axes = product.bias_gradient(dy_product), (FSDP, *COPIES)
        if projection.is_from_model_dim:
            dx = jax.lax.psum(dx, TENSOR)
            dbias = _cut(put_parts_together(dbias.reshape(-1)).reshape(used), projection.out_shape)
            axes = (*axes, TENSOR)
        return dx.reshape(x.shape), projection.as_stored(dkernel_KM), jax.lax.psum(dbias, axes)

    x_spec, kernel_spec, bias_spec, y_spec = projection.specs()
    mapped = jax.shard_map(local, in_specs=(x_spec, kernel_spec, y_spec), out_specs=(x_spec, kernel_spec, bias_spec))
    return mapped(*residuals, dy)


project.defvjp(_forward, _backward)


def _padded(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


def _cut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return x[tuple(slice(size) for size in shape)]


def _as_activation(axis: str) -> str:
    return axis if axis == "head_dim" else f"act_{axis}"
