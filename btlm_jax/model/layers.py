"""The three layers everything is built from: Linear, Embedding, LayerNorm; and how a layer declares a parameter.

A parameter is declared once, by its shape and logical axes, from which its initializer and its sharding follow. It is
float32 and split over devices; projection.py and `look_up` turn it into what is used on a device.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.attention.remat_names import name_value
from btlm_jax.model.projection import Project, make_projection
from btlm_jax.parallel.collectives import gather_table, scatter_table_gradient
from btlm_jax.parallel.mesh import TENSOR, AxisRules
from btlm_jax.recipe.mup import Parametrization

SHIFT_DIMS = 128  # elements of a row whose mean LayerNorm subtracts first: one tile of a TPU's lanes


class Linear(nn.Module):
    """Project x [B, T, *in_shape] to [B, T, *out_shape]: x @ kernel + bias (see projection.py)."""

    in_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_shape: tuple[int, ...]
    out_axes: tuple[str, ...]
    parametrization: Parametrization
    rules: AxisRules
    project: Project

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = declare(self, "kernel", (*self.in_shape, *self.out_shape), (*self.in_axes, *self.out_axes))
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in self.out_axes)
        bias = declare(self, "bias", self.out_shape, bias_axes)
        projection = make_projection(
            in_shape=self.in_shape,
            in_axes=self.in_axes,
            out_shape=self.out_shape,
            out_axes=self.out_axes,
            rules=self.rules,
        )
        return name_value(self.project(projection, x, kernel, bias), self.name or "")


class Embedding(nn.Module):
    """Look tokens up in the embedding table, which the readout shares: inputs_BT -> x_BTD."""

    vocab_size: int
    d_model: int
    dtype: jnp.dtype
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, inputs_BT: jax.Array) -> jax.Array:
        table_VD = declare(self, "embedding", (self.vocab_size, self.d_model), ("vocab", "embed"))
        inputs_BT = jax.sharding.reshard(inputs_BT, self.rules.spec("batch", "length"))
        return look_up(self.rules, self.dtype, table_VD, inputs_BT)


class LayerNorm(nn.Module):
    """Normalise over the model dim with float32 statistics; scale and bias (arXiv:1607.06450)."""

    eps: float
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scale_D = declare(self, "scale", (x_BTD.shape[-1],), ("norm",))
        bias_D = declare(self, "bias", (x_BTD.shape[-1],), ("norm",))
        return normalise(self.eps, x_BTD, scale_D, bias_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(eps: float, x_BTD, scale_D, bias_D):
    """Return LayerNorm of x over its last dim, in x's dtype."""
    return _normalise_forward(eps, x_BTD, scale_D, bias_D)[0]


def _normalise_forward(eps: float, x_BTD, scale_D, bias_D):
    """Take both moments of d = x - shift in one pass over x: the variance is E[d^2] - E[d]^2 for any shift.

    The shift is the mean of the row's first SHIFT_DIMS elements. x - shift is exact where both are of one size, so a
    mean of thousands of deviations costs nothing; and it is at most sqrt(D / SHIFT_DIMS - 1) deviations from the mean,
    whatever the row, so the difference loses no more than D / SHIFT_DIMS units in the last place. Neither x - mean nor
    shift + E[d] may be formed first: float32 rounds a mean of 3,000 deviations by 1e-4 of one.
    """
    # Cut before the conversion: a TPU would write all of x to memory in float32 for it.
    shift_BT1 = checkpoint_name(x_BTD[..., :SHIFT_DIMS].mean(-1, keepdims=True, dtype=jnp.float32), "norm_shift")
    d_BTD = x_BTD.astype(jnp.float32) - shift_BT1
    mean_BT1 = d_BTD.mean(-1, keepdims=True)
    variance_BT1 = jnp.maximum(jnp.square(d_BTD).mean(-1, keepdims=True) - jnp.square(mean_BT1), 0)
    mean_BT1 = checkpoint_name(mean_BT1, "norm_mean")
    inverse_BT1 = checkpoint_name(jax.lax.rsqrt(variance_BT1 + eps), "norm_inverse")
    y_BTD = (d_BTD - mean_BT1) * inverse_BT1 * scale_D[None, None] + bias_D[None, None]
    return y_BTD.astype(x_BTD.dtype), (x_BTD, scale_D, shift_BT1, mean_BT1, inverse_BT1)


def _normalise_backward(eps: float, residuals, dy_BTD):
    del eps
    x_BTD, scale_D, shift_BT1, mean_BT1, inverse_BT1 = residuals
    normal_BTD = (x_BTD.astype(jnp.float32) - shift_BT1 - mean_BT1) * inverse_BT1
    dy32_BTD = dy_BTD.astype(jnp.float32)
    dnormal_BTD = dy32_BTD * scale_D[None, None]
    projection_BT1 = (dnormal_BTD * normal_BTD).mean(-1, keepdims=True)
    dx_BTD = inverse_BT1 * (dnormal_BTD - dnormal_BTD.mean(-1, keepdims=True) - normal_BTD * projection_BT1)
    return dx_BTD.astype(x_BTD.dtype), (dy32_BTD * normal_BTD).sum((0, 1)), dy32_BTD.sum((0, 1))


normalise.defvjp(_normalise_forward, _normalise_backward)


def scale(x: jax.Array, multiplier: float) -> jax.Array:
    """Multiply in float32: in bfloat16 a multiplier of 14.6 would be 14.625."""
    return (x.astype(jnp.float32) * multiplier).astype(x.dtype)


def declare(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """Declare a float32 parameter: its initializer follows from its logical axes, which it keeps as metadata."""
    rule = module.parametrization.rule(axes, layer=module.name or "", leaf=name)

    def init(key, shape):
        if rule.init_std == 0:
            return jnp.full(shape, rule.init_mean, jnp.float32)
        return rule.init_std * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)

    parameter = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    # A new parameter is whole on every device, one of a training state is split already.
    return jax.sharding.reshard(parameter, module.rules.spec(*axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(rules: AxisRules, dtype: jnp.dtype, table_VD: jax.Array, inputs_BT: jax.Array) -> jax.Array:
    """Return the rows x_BTD of the stored float32 table in `dtype`; a device sums the table's gradient in float32."""

    def local(table_VD, inputs_BT):
        return gather_table(table_VD, dtype=dtype)[inputs_BT]

    specs = (rules.spec("vocab", "embed"), rules.spec("batch", "length"))
    # All devices of the tensor axis look the same rows up, which the check cannot see.
    mapped = jax.shard_map(local, in_specs=specs, out_specs=rules.spec("batch", "length", "act_embed"), check_vma=False)
    return mapped(table_VD, inputs_BT)


def _look_up_forward(rules: AxisRules, dtype: jnp.dtype, table_VD: jax.Array, inputs_BT: jax.Array):
    return look_up(rules, dtype, table_VD, inputs_BT), (table_VD, inputs_BT)


def _look_up_backward(rules: AxisRules, dtype: jnp.dtype, residuals: tuple, dx_BTD: jax.Array):
    del dtype
    table_VD, inputs_BT = residuals

    def local(inputs_BT, dx_BTD):
        zeros_VD = jnp.zeros((table_VD.shape[0], dx_BTD.shape[-1]), jnp.float32)
        # The devices of the tensor axis hold the same dx, so the sum over them counts it that many times.
        grad_VD = zeros_VD.at[inputs_BT].add(dx_BTD.astype(jnp.float32) / jax.lax.axis_size(TENSOR))
        return scatter_table_gradient(jax.lax.pcast(grad_VD, TENSOR, to="varying"), dtype=rules.gradient_dtype)

    specs = (rules.spec("batch", "length"), rules.spec("batch", "length", "act_embed"))
    check = jax.sharding.get_abstract_mesh().size > 1
    mapped = jax.shard_map(local, in_specs=specs, out_specs=rules.spec("vocab", "embed"), check_vma=check)
    return mapped(inputs_BT, dx_BTD), None


look_up.defvjp(_look_up_forward, _look_up_backward)
