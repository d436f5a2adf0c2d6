"""y = x @ kernel + bias between the model dim and a hidden one, with its gradients and what devices exchange for them.

The kernel is gathered in the activations' dtype for each use, forward and backward, and its gradient is computed,
summed over devices (reduce-scatter) and returned in float32. The hidden dim is split over `tensor`: a projection into
it needs no exchange forward, one out of it sums partial products. Heads lie in activations in another order than in
what is stored: as `heads_as_held` deals them to devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.alibi_lanes import TILE
from btlm_jax.parallel.collectives import (
    COPIES,
    gather_kernel,
    in_order,
    own_part,
    put_parts_together,
    scatter_kernel_gradient,
)
from btlm_jax.parallel.head_order import dealt
from btlm_jax.parallel.mesh import FSDP, TENSOR, AxisRules, num_ways, platform
from btlm_jax.recipe.config import ModelConfig


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
        """Return this device's part of the stored kernel as a matrix, its hidden dims as they are in use."""
        used = self.used()
        if self.is_from_model_dim:
            kernel = self.dealt(_padded(kernel, (kernel.shape[0], *used)), dim=1)
            return kernel.reshape(kernel.shape[0], math.prod(used))
        kernel = self.dealt(_padded(kernel, (*used, kernel.shape[-1])), dim=0)
        return kernel.reshape(math.prod(used), kernel.shape[-1])

    def as_stored(self, matrix: jax.Array) -> jax.Array:
        """Return what `matrix` was made of."""
        if self.is_from_model_dim:
            kernel = self.collected(matrix.reshape(matrix.shape[0], *self.used()), dim=1)
            return _cut(kernel, (matrix.shape[0], *self.hidden_shape))
        kernel = self.collected(matrix.reshape(*self.used(), matrix.shape[1]), dim=0)
        return _cut(kernel, (*self.hidden_shape, matrix.shape[1]))

    def dealt(self, x: jax.Array, *, dim: int) -> jax.Array:
        """Return a dim of heads in the order in which devices hold them; another hidden dim as it is."""
        heads = self._heads_as_held()
        return x if heads is None else jnp.take(x, heads, axis=dim)

    def collected(self, x: jax.Array, *, dim: int) -> jax.Array:
        """Undo `dealt`."""
        heads = self._heads_as_held()
        return x if heads is None else jnp.take(x, np.argsort(heads), axis=dim)

    def _heads_as_held(self) -> np.ndarray | None:
        """Return the order of heads in activations, or None where it is the stored one, which needs no copy."""
        if len(self.hidden_shape) == 1:
            return None
        heads = heads_as_held(self.hidden_shape[0], self.rules, mesh=jax.sharding.get_abstract_mesh())
        return None if (heads == np.arange(len(heads))).all() else heads

    def product(self) -> _Product:
        """Return how x, kernel and y are laid out when they are multiplied."""
        if platform() != "tpu":
            return _Product(x="RK", kernel="KM", y="RM")
        pieces = num_ways(jax.sharding.get_abstract_mesh(), self.rules.length) if len(self.hidden_shape) == 2 else 1
        if pieces == 1:
            return _Product(x="BTK", kernel="KM", y="BTM")
        if self.is_from_model_dim:
            return _Product(x="BTK", kernel="KSM", y="SBTM", pieces=pieces)
        return _Product(x="SBTK", kernel="SKM", y="BTM", pieces=pieces)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Product:
    """The dims of x, kernel and y in the product.

    XLA:CPU takes transposed matrices as they are in the backward pass, but copies operands of higher rank into new
    layouts first (measured: 1.2 times the whole step), so rows R are batch x length there. XLA:TPU writes [B, T, ...]
    into what remat saves of all layers at once, but copies matrices there. Heads lie side by side on both; on a TPU in
    S groups of them where attention exchanges positions for heads (attention/exchange.py), which saves the copies.
    """

    x: str
    kernel: str
    y: str
    pieces: int = 1  # S

    def forward(self, x, kernel):
        return jnp.einsum(f"{self.x},{self.kernel}->{self.y}", x, kernel)

    def x_gradient(self, dy, kernel):
        return jnp.einsum(f"{self.y},{self.kernel}->{self.x}", dy, kernel)

    def kernel_gradient(self, x, dy):
        return jnp.einsum(f"{self.x},{self.y}->{self.kernel}", x, dy, preferred_element_type=jnp.float32)

    def bias_gradient(self, dy):
        over = tuple(dim for dim, letter in enumerate(self.y) if letter in "BTR")
        return dy.sum(over, dtype=jnp.float32).reshape(-1)

    def bias_gradient_as_product(self, dy):
        """Sum dy over its rows in the matrix unit of a TPU: for a dy that is not just being made by a product.

        Rows of ones as many as a tile has, for XLA takes a single one for a sum, which it says is 20 times as slow.
        """
        B, T = (dy.shape[self.y.index(dim)] for dim in "BT")
        columns = self.y.replace("BT", "")
        sums = jnp.einsum(
            f"XBT,{self.y}->X{columns}",
            jnp.ones((8, B, T), dy.dtype),
            dy,
            precision="highest" if dy.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        return sums[0].reshape(-1)

    def arranged_kernel(self, kernel_KM: jax.Array) -> jax.Array:
        if "S" not in self.kernel:
            return kernel_KM
        split, shape = self.kernel.index("S"), list(kernel_KM.shape)
        shape[split : split + 1] = [self.pieces, shape[split] // self.pieces]
        return kernel_KM.reshape(shape)

    def arranged(self, x: jax.Array, dims: str) -> jax.Array:
        """[B, T, ...] -> as the product's `dims`."""
        B, T, *rest = x.shape
        if "R" in dims:
            return x.reshape(B * T, math.prod(rest))
        if "S" in dims:
            return jnp.moveaxis(x.reshape(B, T, self.pieces, math.prod(rest) // self.pieces), 2, 0)
        return x.reshape(B, T, math.prod(rest))

    def restored(self, x: jax.Array, dims: str, shape: tuple[int, ...]) -> jax.Array:
        """Undo `arranged`."""
        return (jnp.moveaxis(x, 0, 2) if "S" in dims else x).reshape(shape)


def heads_as_held(num_heads: int, rules: AxisRules, *, mesh: Mesh | AbstractMesh) -> np.ndarray:
    """Return the heads in the order in which activations hold them; each device attends with a run of them."""
    return dealt(num_heads, ways=num_ways(mesh, rules.heads_in_attention))


def slopes_as_held(config: ModelConfig, rules: AxisRules, *, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Return ALiBi's slopes of the heads as activations hold them, float32 [N]."""
    slopes_N = jnp.asarray(alibi_slopes(config.num_heads, scaling=config.alibi_scaling))
    return slopes_N[heads_as_held(config.num_heads, rules, mesh=mesh)]


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

    Heads of x or y are those of kernel and bias in the order of `heads_as_held`.
    Kernel and bias are float32, as stored. Hidden dims of x and y have their `used_shape`: what is beyond the kernel is
    0 in y, and ignored in x.
    """

    def local(x, kernel, bias):
        product, used = projection.product(), projection.used()
        kernel_KM = gather_kernel(projection.matrix(kernel), dtype=x.dtype, embed_dim=projection.embed_dim)
        y = in_order(product.forward(product.arranged(x, product.x), product.arranged_kernel(kernel_KM)))
        if projection.is_from_model_dim:
            bias = own_part(projection.dealt(_padded(bias, used), dim=0).reshape(-1))
            last = (bias.shape[0] // math.prod(used[1:]), *used[1:])
        else:
            y, last = jax.lax.psum(y, TENSOR), bias.shape
        y = y + product.arranged(bias.astype(x.dtype)[None, None], product.y)
        return product.restored(y, product.y, (*x.shape[:2], *last))

    x_spec, kernel_spec, bias_spec, y_spec = projection.specs()
    return jax.shard_map(local, in_specs=(x_spec, kernel_spec, bias_spec), out_specs=y_spec)(x, kernel, bias)


def _forward(projection: Projection, x: jax.Array, kernel: jax.Array, bias: jax.Array):
    return project(projection, x, kernel, bias), (x, kernel)


def _backward(projection: Projection, residuals: tuple, dy: jax.Array) -> tuple:
    def local(x, kernel, dy):
        product, used = projection.product(), projection.used()
        kernel_KM = gather_kernel(projection.matrix(kernel), dtype=x.dtype, embed_dim=projection.embed_dim)
        x_product, dy_product = product.arranged(x, product.x), product.arranged(dy, product.y)
        dx = in_order(product.x_gradient(dy_product, product.arranged_kernel(kernel_KM)))
        dkernel_KM = product.kernel_gradient(x_product, dy_product).reshape(kernel_KM.shape)
        dkernel_KM = scatter_kernel_gradient(dkernel_KM, embed_dim=projection.embed_dim)
        # The products that make the gradients of `up` and `gate` take the sums on their way.
        is_product = platform() == "tpu" and projection.out_axes != ("mlp",)
        bias_gradient = product.bias_gradient_as_product if is_product else product.bias_gradient
        dbias, axes = bias_gradient(dy_product), (FSDP, *COPIES)
        if projection.is_from_model_dim:
            dx = jax.lax.psum(dx, TENSOR)
            dbias = projection.collected(put_parts_together(dbias).reshape(used), dim=0)
            dbias = _cut(dbias, projection.out_shape)
            axes = (*axes, TENSOR)
        return product.restored(dx, product.x, x.shape), projection.as_stored(dkernel_KM), jax.lax.psum(dbias, axes)

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
