"""The four layers everything is built from. Each declares its parameters once: shape, logical axes, rule.

Parameters are float32; each layer casts to the dtype of its input in plain sight. A kernel is gathered along the fsdp
axis where it is used, after the cast, and its gradient goes back the same way.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from btlm_jax.mup import Parametrization
from btlm_jax.sharding import AxisRules


class Linear(nn.Module):
    """Multiply the dims of x_BT... after batch and length by a kernel, and add a bias.

    The product is of two matrices, rows being batch x length: XLA:CPU takes transposed matrices as they are in the
    backward pass, but copies operands of higher rank into new layouts first (measured: 1.2 times the whole step).
    """

    in_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_shape: tuple[int, ...]
    out_axes: tuple[str, ...]
    act_axes: tuple[str, ...]  # the output's axes as an activation, which a bias shares
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, x):
        axes = (*self.in_axes, *self.out_axes)
        kernel = declare(self, "kernel", (*self.in_shape, *self.out_shape), axes)
        bias_axes = tuple("norm" if axis == "act_embed" else axis for axis in self.act_axes)
        bias = declare(self, "bias", self.out_shape, bias_axes)
        kernel = gather(kernel.astype(x.dtype), axes, self.rules)
        batch, length = x.shape[:2]
        rows, width_in, width_out = batch * length, math.prod(self.in_shape), math.prod(self.out_shape)
        # Of axes merged into one, only the first is ever split.
        row_axis, in_axis = self.rules.batch, self.rules.gathered_spec(*self.in_axes)[0]
        out_axis = self.rules.spec(*self.act_axes)[0]
        x_RK = jax.lax.reshape(x, (rows, width_in), out_sharding=PartitionSpec(row_axis, in_axis))
        kernel_KM = jax.lax.reshape(kernel, (width_in, width_out), out_sharding=PartitionSpec(in_axis, out_axis))
        y_RM = jnp.matmul(x_RK, kernel_KM, out_sharding=PartitionSpec(row_axis, out_axis))
        y_RM = y_RM + jax.lax.reshape(bias.astype(x.dtype), (1, width_out), out_sharding=PartitionSpec(None, out_axis))
        spec = self.rules.spec("batch", "length", *self.act_axes)
        return jax.lax.reshape(y_RM, (batch, length, *self.out_shape), out_sharding=spec)


class Embedding(nn.Module):
    """Hold the tied table_VD: look tokens up, and hand the table out for the readout."""

    vocab_size: int
    d_model: int
    dtype: jnp.dtype
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, inputs_BT):
        axes = ("vocab", "embed")
        table_VD = declare(self, "embedding", (self.vocab_size, self.d_model), axes)
        # Look up, then cast: the lookup's gradient adds up over tokens, and bfloat16 would round at each addition.
        table_VD = gather(table_VD, axes, self.rules)
        x_BTD = table_VD.at[inputs_BT].get(out_sharding=self.rules.spec("batch", "length", "act_embed"))
        return x_BTD.astype(self.dtype)


class LayerNorm(nn.Module):
    """Normalise over the model dim with float32 statistics; scale and bias."""

    eps: float
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, x_BTD):
        scale_D = declare(self, "scale", (x_BTD.shape[-1],), ("norm",))
        bias_D = declare(self, "bias", (x_BTD.shape[-1],), ("norm",))
        x32_BTD = x_BTD.astype(jnp.float32)
        centred_BTD = x32_BTD - x32_BTD.mean(-1, keepdims=True)
        variance_BT1 = jnp.square(centred_BTD).mean(-1, keepdims=True)
        y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.eps) * scale_D[None, None] + bias_D[None, None]
        return y_BTD.astype(x_BTD.dtype)


def declare(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """Declare a float32 parameter: its initializer follows from its logical axes, which it keeps as metadata."""
    rule = module.parametrization.rule(axes, leaf=name)

    def init(key, shape):
        if rule.init_std == 0:
            return jnp.full(shape, rule.init_mean, jnp.float32)
        return rule.init_std * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)

    return module.param(name, nn.with_logical_partitioning(init, axes), shape)


def gather(kernel, axes: tuple[str, ...], rules: AxisRules):
    """Gather a stored kernel along the fsdp axis for use."""
    return jax.sharding.reshard(kernel, rules.gathered_spec(*axes))
