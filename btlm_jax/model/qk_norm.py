"""RMS norm of queries and keys, of each head by itself: networks with model.qk_norm alone load this file.

    x <- x / sqrt(mean(x^2) + layer_norm_eps)        "rms", over the head's dims
    x <- x / sqrt(mean(x^2) + layer_norm_eps) * g    "rms_gain", g [H] one of queries and one of keys, of all heads

A head's mean square is 1 at every width, so the multiplier of scores stays the preset's (mup.py). A score is at most H
times it: 1 where it is 1/H, sqrt(H) where it is 1/sqrt(H). Gains, which start at 1 and learn as LayerNorm's scales do,
lift that. Scores do not grow with the weights, whatever the learning rate (arXiv 2302.05442, 2309.14322).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from btlm_jax.model.layers import declare
from btlm_jax.parallel.mesh import AxisRules
from btlm_jax.recipe.config import ModelConfig
from btlm_jax.recipe.mup import Parametrization


class HeadNorm(nn.Module):
    """Normalise each head of x_BTNH, in float32; its head dim may end in zeros that pad it (model/projection.py)."""

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, x_BTNH: jax.Array) -> jax.Array:
        H, x32_BTNH = self.config.head_dim, x_BTNH.astype(jnp.float32)
        square_BTN1 = jnp.square(x32_BTNH).sum(-1, keepdims=True) / H
        y_BTNH = x32_BTNH * jax.lax.rsqrt(square_BTN1 + self.config.layer_norm_eps)
        if self.config.qk_norm == "rms_gain":
            gain_H = declare(self, "scale", (H,), ("head_dim",))
            y_BTNH *= jnp.pad(gain_H, (0, x_BTNH.shape[-1] - H))[None, None, None]
        return y_BTNH.astype(x_BTNH.dtype)
