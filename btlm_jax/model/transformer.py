"""The BTLM decoder: embedding, scanned pre-LayerNorm blocks of attention and SwiGLU, final LayerNorm.

    x = E[inputs] * embedding_scale
    for each block:  x = x + attention(LN(x));  x = x + mlp(LN(x))
    logits = (LN_f(x) @ E^T) * output_scale          (in loss.py, which never forms all of them)

Source: arXiv 2309.11568 and the published model code (`modeling_btlm.py`). HF's c_fc is `up` here, c_fc2 `gate`.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from btlm_jax.attention import attend
from btlm_jax.model.layers import Embedding, LayerNorm, Linear
from btlm_jax.model.projection import slopes_as_held
from btlm_jax.parallel.mesh import RULES, AxisRules
from btlm_jax.recipe.config import ModelConfig
from btlm_jax.recipe.mup import Parametrization

# What the backward pass finds saved of each block; the rest it computes again. Names are given in attention/, by norms
# and by the projections, which carry their own.
_NORM = ("norm_mean", "norm_inverse")
_ATTENTION = (*_NORM, *(f"attention_{name}" for name in ("query", "key", "value", "out", "lse", "reach")))
_SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention_saved": jax.checkpoint_policies.save_only_these_names(*_ATTENTION),
    "out_recomputed": jax.checkpoint_policies.save_only_these_names(*_ATTENTION, "up", "gate"),
    "matmuls_saved": jax.checkpoint_policies.save_only_these_names(*_ATTENTION, "out", "up", "gate"),
    "none": jax.checkpoint_policies.everything_saveable,
}


class Attention(nn.Module):
    """Causal multi-head attention with ALiBi."""

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules
    attend: Callable  # (q_BTNH, k_BTNH, v_BTNH) -> o_BTNH, heads in the order of `heads_as_held`

    @nn.compact
    def __call__(self, x_BTD):
        D, N, H = self.config.d_model, self.config.num_heads, self.config.head_dim

        def project(name: str):
            return Linear(
                in_shape=(D,),
                in_axes=("embed",),
                out_shape=(N, H),
                out_axes=("heads", "head_dim"),
                parametrization=self.parametrization,
                rules=self.rules,
                name=name,
            )(x_BTD)

        with jax.named_scope("attend"):
            o_BTNH = self.attend(project("query"), project("key"), project("value"))
        return Linear(
            in_shape=(N, H),
            in_axes=("heads", "head_dim"),
            out_shape=(D,),
            out_axes=("embed",),
            parametrization=self.parametrization,
            rules=self.rules,
            name="out",
        )(o_BTNH)


class Mlp(nn.Module):
    """SwiGLU: down(up(x) * silu(gate(x)))."""

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, x_BTD):
        D, F = self.config.d_model, self.config.d_ff

        def widen(name: str):
            return Linear(
                in_shape=(D,),
                in_axes=("embed",),
                out_shape=(F,),
                out_axes=("mlp",),
                parametrization=self.parametrization,
                rules=self.rules,
                name=name,
            )(x_BTD)

        hidden_BTF = widen("up") * jax.nn.silu(widen("gate"))
        return Linear(
            in_shape=(F,),
            in_axes=("mlp",),
            out_shape=(D,),
            out_axes=("embed",),
            parametrization=self.parametrization,
            rules=self.rules,
            name="down",
        )(hidden_BTF)


class Block(nn.Module):
    """One pre-LayerNorm decoder block; returns (x_BTD, None) as nn.scan wants."""

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules
    attend: Callable

    @nn.compact
    def __call__(self, x_BTD):
        parts = dict(parametrization=self.parametrization, rules=self.rules)
        scale = self.parametrization.residual_scale

        def norm(name: str):
            return LayerNorm(eps=self.config.layer_norm_eps, name=name, **parts)(x_BTD)

        x_BTD = x_BTD + scale * Attention(config=self.config, attend=self.attend, name="attention", **parts)(
            norm("ln_1")
        )
        x_BTD = x_BTD + scale * Mlp(config=self.config, name="mlp", **parts)(norm("ln_2"))
        return x_BTD, None


class Btlm(nn.Module):
    """The decoder up to and including the final LayerNorm: inputs_BT -> hidden_BTD."""

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules

    @nn.compact
    def __call__(self, inputs_BT):
        parts = dict(parametrization=self.parametrization, rules=self.rules)
        dtype = jnp.dtype(self.config.dtype)
        x_BTD = Embedding(
            vocab_size=self.config.vocab_size, d_model=self.config.d_model, dtype=dtype, name="embedding", **parts
        )(inputs_BT)
        x_BTD = x_BTD * self.parametrization.embedding_scale
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=_SAVED[self.config.remat]),
            variable_axes={"params": 0, "intermediates": 0},  # so that capture_intermediates sees every block
            split_rngs={"params": True},
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, _ = blocks(config=self.config, attend=self._attend, name="blocks", **parts)(x_BTD)
        return LayerNorm(eps=self.config.layer_norm_eps, name="ln_f", **parts)(x_BTD)

    def _attend(self, q_BTNH, k_BSNH, v_BSNH):
        slopes_N = slopes_as_held(self.config, self.rules, mesh=jax.sharding.get_abstract_mesh())
        scale = self.parametrization.attention_scale
        return attend(q_BTNH, k_BSNH, v_BSNH, slopes_N, scale=scale, implementation=self.config.attention)


def make_model(config: ModelConfig, parametrization: Parametrization, *, rules: AxisRules = RULES) -> Btlm:
    """Make the network; it holds no arrays. `rules` say how its activations are split over the mesh."""
    return Btlm(config=config, parametrization=parametrization, rules=rules)
