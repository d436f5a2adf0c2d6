"""The BTLM decoder: embedding, scanned pre-LayerNorm blocks of attention and SwiGLU, final LayerNorm.

    x = E[inputs] * embedding_scale
    for each block:  x = x + attention(LN(x));  x = x + mlp(LN(x))
    logits = (LN_f(x) @ E^T) * output_scale          (in loss.py, which never forms all of them)

Source: arXiv 2309.11568 and the published model code (`modeling_btlm.py`). HF's c_fc is `up` here, c_fc2 `gate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from btlm_jax.attention import attend
from btlm_jax.attention.alibi import alibi_slopes, dynamic_factor
from btlm_jax.attention.remat_names import save_attention_and
from btlm_jax.kernels import are_for_training, swiglu
from btlm_jax.model.layers import Embedding, LayerNorm, Linear, scale
from btlm_jax.model.projection import Project, project_scheduled
from btlm_jax.parallel.mesh import RULES, AxisRules, device_head_order
from btlm_jax.recipe.config import ModelConfig
from btlm_jax.recipe.mup import Parametrization

# What is saved of each block for the backward pass, by checkpoint name: of attention/, of norms, and of linear layers.
_NORM = ("norm_shift", "norm_mean", "norm_inverse")
_SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention_saved": save_attention_and(*_NORM),
    "out_recomputed": save_attention_and(*_NORM, "up", "gate"),
    "matmuls_saved": save_attention_and(*_NORM, "out", "up", "gate"),
    "none": jax.checkpoint_policies.everything_saveable,
}


class Attention(nn.Module):
    """Causal multi-head attention with ALiBi: x_BTD -> [B, T, D]."""

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules
    project: Project
    attend: Callable  # (q_BTNH, k_BTNH, v_BTNH, starts_BT) -> o_BTNH, heads in the order of `device_head_order`

    @nn.compact
    def __call__(self, x_BTD: jax.Array, starts_BT: jax.Array | None) -> jax.Array:
        D, N = self.config.d_model, self.config.num_heads
        H = D // N
        linear = functools.partial(Linear, parametrization=self.parametrization, rules=self.rules, project=self.project)
        into_heads = functools.partial(
            linear, in_shape=(D,), in_axes=("embed",), out_shape=(N, H), out_axes=("heads", "head_dim")
        )
        with jax.named_scope("attend"):
            qkv_BTNH = [into_heads(name=name)(x_BTD) for name in ("query", "key", "value")]
            if self.config.qk_norm != "none":
                from btlm_jax.model.qk_norm import HeadNorm  # networks without it load none of it

                norm = functools.partial(HeadNorm, self.config, self.parametrization, self.rules)
                qkv_BTNH[:2] = norm(name="query_norm")(qkv_BTNH[0]), norm(name="key_norm")(qkv_BTNH[1])
            o_BTNH = self.attend(*qkv_BTNH, starts_BT)
        return linear(in_shape=(N, H), in_axes=("heads", "head_dim"), out_shape=(D,), out_axes=("embed",), name="out")(
            o_BTNH
        )


class Mlp(nn.Module):
    """SwiGLU: x_BTD -> down(up(x) * silu(gate(x)))."""

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules
    project: Project

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = self.config.d_model, self.config.d_ff
        linear = functools.partial(Linear, parametrization=self.parametrization, rules=self.rules, project=self.project)
        widen = functools.partial(linear, in_shape=(D,), in_axes=("embed",), out_shape=(F,), out_axes=("mlp",))
        spec = self.rules.spec("batch", "length", "act_mlp")
        up_BTF, gate_BTF = widen(name="up")(x_BTD), widen(name="gate")(x_BTD)
        if are_for_training():
            hidden_BTF = cast(jax.Array, swiglu(spec, up_BTF, gate_BTF))  # custom_vjp hides its type
        else:
            hidden_BTF = up_BTF * jax.nn.silu(gate_BTF)
        return linear(in_shape=(F,), in_axes=("mlp",), out_shape=(D,), out_axes=("embed",), name="down")(hidden_BTF)


class Block(nn.Module):
    """One pre-LayerNorm decoder block: x_BTD -> (x_BTD, None), as nn.scan wants it."""

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules
    project: Project
    attend: Callable  # as Attention's

    @nn.compact
    def __call__(self, x_BTD: jax.Array, starts_BT: jax.Array | None) -> tuple[jax.Array, None]:
        parametrization, rules = self.parametrization, self.rules
        norm = functools.partial(
            LayerNorm, eps=self.config.layer_norm_eps, parametrization=parametrization, rules=rules
        )
        attention = Attention(
            config=self.config,
            parametrization=parametrization,
            rules=rules,
            project=self.project,
            attend=self.attend,
            name="attention",
        )
        mlp = Mlp(config=self.config, parametrization=parametrization, rules=rules, project=self.project, name="mlp")
        x_BTD = x_BTD + scale(attention(norm(name="ln_1")(x_BTD), starts_BT), parametrization.residual_scale)
        x_BTD = x_BTD + scale(mlp(norm(name="ln_2")(x_BTD)), parametrization.residual_scale)
        return x_BTD, None


class Btlm(nn.Module):
    """The decoder up to and including the final LayerNorm: inputs_BT -> hidden_BTD.

    With `starts_BT` (see attention's `attend`) no position sees another document's.
    """

    config: ModelConfig
    parametrization: Parametrization
    rules: AxisRules
    project: Project
    alibi_train_len: int  # > 0: beyond so many keys ALiBi's slopes are divided by keys / this; 0: they are not

    @nn.compact
    def __call__(self, inputs_BT: jax.Array, starts_BT: jax.Array | None = None) -> jax.Array:
        config, parametrization, rules = self.config, self.parametrization, self.rules
        embedding = Embedding(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            dtype=jnp.dtype(config.dtype),
            parametrization=parametrization,
            rules=rules,
            name="embedding",
        )
        x_BTD = scale(embedding(inputs_BT), parametrization.embedding_scale)
        if starts_BT is not None:  # each device needs those of its whole sequences: gathered here, once for all blocks
            starts_BT = jax.sharding.reshard(starts_BT, rules.spec("batch"))
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=_SAVED[config.remat]),
            variable_axes={"params": 0, "intermediates": 0},  # so that capture_intermediates sees every block
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] # its hint is of the ints alone
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, _ = blocks(
            config=config,
            parametrization=parametrization,
            rules=rules,
            project=self.project,
            attend=self._attend,
            name="blocks",
        )(x_BTD, starts_BT)
        norm = LayerNorm(eps=config.layer_norm_eps, parametrization=parametrization, rules=rules, name="ln_f")
        return norm(x_BTD)

    def _attend(
        self, q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, starts_BT: jax.Array | None
    ) -> jax.Array:
        slopes_N = device_slopes(self.config, self.rules, mesh=jax.sharding.get_abstract_mesh())
        if self.alibi_train_len:
            slopes_N /= dynamic_factor(k_BSNH.shape[1], self.alibi_train_len, xp=np)
        return attend(
            q_BTNH,
            k_BSNH,
            v_BSNH,
            slopes_N,
            scale=self.parametrization.attention_scale,
            implementation=self.config.attention,
            starts_BT=starts_BT,
        )


def make_model(
    config: ModelConfig,
    parametrization: Parametrization,
    *,
    rules: AxisRules = RULES,
    project: Project = project_scheduled,  # pyright: ignore[reportArgumentType] # custom_vjp hides its signature
    alibi_train_len: int = 0,
) -> Btlm:
    """Make the network; it holds no arrays.

    `rules` say how its activations are split over the mesh, `project` how they are multiplied with weights (see
    projection.py). `alibi_train_len` is the length of dynamic position interpolation, 0 for none.
    """
    return Btlm(
        config=config, parametrization=parametrization, rules=rules, project=project, alibi_train_len=alibi_train_len
    )


def device_slopes(config: ModelConfig, rules: AxisRules, *, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Return ALiBi's slopes of the heads in the order of `device_head_order`, float32 [N]."""
    slopes_N = jnp.asarray(alibi_slopes(config.num_heads, scaling=config.alibi_scaling))
    return slopes_N[device_head_order(config.num_heads, rules, mesh=mesh)]
