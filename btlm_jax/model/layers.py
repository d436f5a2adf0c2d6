"""The four layers everything is built from. Each declares its parameters once: shape, logical axes, rule.

Parameters are float32; each layer casts to the dtype of its input in plain sight. A kernel is gathered along the fsdp
axis where it is used, after the cast, and its gradient goes back the same way.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from btlm_jax.mup import Parametrization
from btlm_jax.sharding import AxisRules


class Einsum(nn.Module):
    """Multiply by a kernel along `equation` and add a bias along the output's own axes."""

    equation: str
    kernel_shape: tuple[int, ...]
    kernel_axes: tuple[str, ...]
    bias_shape: tuple[int, ...]
    bias_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, x):
        kernel = declare(self, "kernel", self.kernel_shape, self.kernel_axes)
        bias = declare(self, "bias", self.bias_shape, self.bias_axes)
        kernel = gather(kernel.astype(x.dtype), self.kernel_axes, self.rules)
        y = jnp.einsum(self.equation, x, kernel, out_sharding=self.rules.spec(*self.out_axes))
        return y + jnp.expand_dims(bias.astype(x.dtype), tuple(range(y.ndim - bias.ndim)))


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
        # Look up, then cast: the lookup's gradient is a scatter-add over tokens, which bfloat16 would round at each add.
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
