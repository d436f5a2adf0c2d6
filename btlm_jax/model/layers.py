"""The four layers everything is built from. Each declares its parameters once: shape, logical axes, rule.

Parameters are float32 and split over devices; projection.py and lookup.py turn them into what is used.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.model.lookup import look_up
from btlm_jax.model.projection import Projection, project
from btlm_jax.parallel.mesh import AxisRules
from btlm_jax.recipe.mup import Parametrization


class Linear(nn.Module):
    """Project the dims of x_BT... after batch and length (see projection.py)."""

    in_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_shape: tuple[int, ...]
    out_axes: tuple[str, ...]
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, x):
        kernel = declare(self, "kernel", (*self.in_shape, *self.out_shape), (*self.in_axes, *self.out_axes))
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in self.out_axes)
        bias = declare(self, "bias", self.out_shape, bias_axes)
        projection = Projection(
            in_shape=self.in_shape,
            in_axes=self.in_axes,
            out_shape=self.out_shape,
            out_axes=self.out_axes,
            rules=self.rules,
        )
        return checkpoint_name(project(projection, x, kernel, bias), self.name)


class Embedding(nn.Module):
    """Hold the tied table_VD: look tokens up, and hand the table out for the readout."""

    vocab_size: int
    d_model: int
    dtype: jnp.dtype
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, inputs_BT):
        table_VD = declare(self, "embedding", (self.vocab_size, self.d_model), ("vocab", "embed"))
        inputs_BT = jax.sharding.reshard(inputs_BT, self.rules.spec("batch", "length"))
        return look_up(self.rules, self.dtype, table_VD, inputs_BT)


class LayerNorm(nn.Module):
    """Normalise over the model dim with float32 statistics; scale and bias (arXiv:1607.06450)."""

    eps: float
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, x_BTD):
        scale_D = declare(self, "scale", (x_BTD.shape[-1],), ("norm",))
        bias_D = declare(self, "bias", (x_BTD.shape[-1],), ("norm",))
        return _normalise(self.eps, x_BTD, scale_D, bias_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(eps: float, x_BTD, scale_D, bias_D):
    return _normalise_forward(eps, x_BTD, scale_D, bias_D)[0]


def _normalise_forward(eps: float, x_BTD, scale_D, bias_D):
    x32_BTD = x_BTD.astype(jnp.float32)
    # One pass over x for both: E[x^2] - E[x]^2 loses bits only where the mean is many standard deviations from 0.
    mean_BT1 = x32_BTD.mean(-1, keepdims=True)
    variance_BT1 = jnp.maximum(jnp.square(x32_BTD).mean(-1, keepdims=True) - jnp.square(mean_BT1), 0)
    mean_BT1 = checkpoint_name(mean_BT1, "norm_mean")
    inverse_BT1 = checkpoint_name(jax.lax.rsqrt(variance_BT1 + eps), "norm_inverse")
    y_BTD = (x32_BTD - mean_BT1) * inverse_BT1 * scale_D[None, None] + bias_D[None, None]
    return y_BTD.astype(x_BTD.dtype), (x_BTD, scale_D, mean_BT1, inverse_BT1)


def _normalise_backward(eps: float, residuals, dy_BTD):
    del eps
    x_BTD, scale_D, mean_BT1, inverse_BT1 = residuals
    normal_BTD, dy32_BTD = (x_BTD.astype(jnp.float32) - mean_BT1) * inverse_BT1, dy_BTD.astype(jnp.float32)
    slope_BTD = dy32_BTD * scale_D[None, None]
    along_BT1 = (slope_BTD * normal_BTD).mean(-1, keepdims=True)
    dx_BTD = inverse_BT1 * (slope_BTD - slope_BTD.mean(-1, keepdims=True) - normal_BTD * along_BT1)
    return dx_BTD.astype(x_BTD.dtype), (dy32_BTD * normal_BTD).sum((0, 1)), dy32_BTD.sum((0, 1))


_normalise.defvjp(_normalise_forward, _normalise_backward)


def declare(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """Declare a float32 parameter: its initializer follows from its logical axes, which it keeps as metadata."""
    rule = module.parametrization.rule(axes, leaf=name)

    def init(key, shape):
        if rule.init_std == 0:
            return jnp.full(shape, rule.init_mean, jnp.float32)
        return rule.init_std * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)

    parameter = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    return jax.sharding.reshard(parameter, module.rules.spec(*axes))  # it is born whole; in a state it is split already
