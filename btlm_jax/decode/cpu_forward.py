"""The network over a cache, with tiled weights and float32 activations: the same arithmetic as model/transformer.py.

Where the processor multiplies bfloat16, products of several rows with bfloat16 weights round the activations to it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.decode.cpu_cache import Cache, CacheLayout, attend
from btlm_jax.kernels.build import has_kernels
from btlm_jax.kernels.tiles import columns, matmul, target_scores
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm
from btlm_jax.model.layers import normalise
from btlm_jax.model.loss import score_logits


@functools.partial(jax.jit, static_argnames=("model", "layout"), donate_argnames="cache")
def extend(
    model: Btlm, weights: Weights, cache: Cache, *, layout: CacheLayout, inputs_BT, starts_B, counts_B, lengths_B
):
    """Run counts_B[b] new tokens of row b at positions starts_B[b], starts_B[b] + 1, ...; cache their keys and values.

    lengths_B are the tokens of each row at the end of the call of which this is a piece.

    Returns the float32 logits_BV after each row's last new token, the cache, and a bound on the share of attention
    outside the cache's windows (cpu_cache.py).
    """
    x_XD, cache, dropped = _run_blocks(model, weights, cache, layout, inputs_BT, starts_B, counts_B, lengths_B, None)
    x_BTD = x_XD.reshape(*inputs_BT.shape, -1)
    last_BD = jnp.take_along_axis(x_BTD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return _read_out(model, weights, _norm_last(model, weights, last_BD)), cache, dropped


def extend_hidden(
    model: Btlm, weights: Weights, cache: Cache, *, layout: CacheLayout, inputs_BT: np.ndarray, starts_B: np.ndarray,
    counts_B: np.ndarray, lengths_B: np.ndarray,
):  # fmt: skip
    """Do what `extend` does, but return the normed float32 hidden_BTD of all new tokens, for `score_hidden`.

    Beyond counts_B[b] it has values of other tokens: products take the new tokens side by side, without the padding but
    for what rounds their number up to a power of two or three quarters of one.
    """
    return _extend_hidden(
        model, weights, cache, layout=layout,
        num_packed=min(padded_size(int(counts_B.sum()), least=4), inputs_BT.size), inputs_BT=inputs_BT,
        starts_B=starts_B, counts_B=counts_B, lengths_B=lengths_B,
    )  # fmt: skip


def padded_size(number: int, *, least: int) -> int:
    """Return a size that is not below a number: a power of two from `least`, one itself, on, or three quarters of one.

    So few sizes are compiled, and a third or less is padding.
    """
    power = max(least, 1 << (number - 1).bit_length())
    return power * 3 // 4 if least < power and number <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnames=("model", "layout", "num_packed"), donate_argnames="cache")
def _extend_hidden(
    model: Btlm, weights: Weights, cache: Cache, *, layout: CacheLayout, num_packed: int, inputs_BT, starts_B, counts_B,
    lengths_B,
):  # fmt: skip
    packing = None if num_packed == inputs_BT.size else _Packing.of(counts_B, inputs_BT.shape[1], num_packed)
    x_RD, cache, dropped = _run_blocks(model, weights, cache, layout, inputs_BT, starts_B, counts_B, lengths_B, packing)
    hidden_RD = _norm_last(model, weights, x_RD)
    hidden_XD = packing.unpack(hidden_RD) if packing else hidden_RD
    return hidden_XD.reshape(*inputs_BT.shape, -1), cache, dropped


class _Packing(NamedTuple):
    """Which of the B * T positions of padded rows the R packed ones are, and where each of the former is packed."""

    from_R: jax.Array
    at_X: jax.Array

    @classmethod
    def of(cls, counts_B: jax.Array, T: int, num_packed: int) -> _Packing:
        """Pack the first counts_B[b] positions of each row b, one row after another."""
        ends_B = jnp.cumsum(counts_B)
        begins_B, packed_R = ends_B - counts_B, jnp.arange(num_packed)
        row_R = jnp.minimum(jnp.searchsorted(ends_B, packed_R, side="right"), len(counts_B) - 1)
        from_R = row_R * T + jnp.minimum(packed_R - begins_B[row_R], T - 1)
        at_BT = jnp.minimum(begins_B[:, None] + jnp.arange(T), num_packed - 1)
        return cls(from_R, at_BT.reshape(-1))

    def pack(self, x_X: jax.Array) -> jax.Array:
        return jnp.take(x_X, self.from_R, axis=0, mode="clip")

    def unpack(self, x_R: jax.Array) -> jax.Array:
        return jnp.take(x_R, self.at_X, axis=0, mode="clip")


def score_hidden(model: Btlm, weights: Weights, hidden_RD: jax.Array, targets_R) -> tuple[jax.Array, jax.Array]:
    """Return the losses_R of targets after what `extend_hidden` returns, and whether each is the likeliest token."""
    if not has_kernels():
        return score_logits(_read_out(model, weights, hidden_RD), targets_R)
    return target_scores(hidden_RD, weights.embedding, targets_R, scale=model.parametrization.output_scale)


def _read_out(model: Btlm, weights: Weights, hidden_RD: jax.Array) -> jax.Array:
    """Return the float32 logits_RV of normed hidden vectors."""
    return matmul(hidden_RD, weights.embedding, layer=0) * model.parametrization.output_scale


def _run_blocks(
    model: Btlm, weights: Weights, cache: Cache, layout: CacheLayout, inputs_BT, starts_B, counts_B, lengths_B,
    packing: _Packing | None,
):  # fmt: skip
    """Return x_RD after the last layer, of all B * T positions or of those that are packed, the cache and the bound."""
    config, parametrization = model.config, model.parametrization
    (B, T), N, H, F = inputs_BT.shape, config.num_heads, config.head_dim, config.d_ff
    ids_X = inputs_BT.reshape(-1)
    x_RD = columns(weights.embedding, packing.pack(ids_X) if packing else ids_X) * parametrization.embedding_scale
    blocks = {name: vector for name, vector in weights.vectors.items() if not name.startswith("ln_f")}

    def block(carry, scanned):
        x_RD, cache, dropped = carry
        layer, own = scanned  # this layer's vectors
        normed_RD = _norm(x_RD, own["ln_1.scale"], own["ln_1.bias"], eps=config.layer_norm_eps)
        qkv_RM = matmul(normed_RD, weights.qkv, layer=layer) + _without_key_bias(own["qkv.bias"])
        qkv_XM = packing.unpack(qkv_RM) if packing else qkv_RM
        q_BTNH, k_BTNH, v_BTNH = (part.reshape(B, T, N, H) for part in jnp.split(qkv_XM, 3, axis=1))
        o_BTNH, cache, dropped_B = attend(
            q_BTNH, k_BTNH, v_BTNH, cache, layout=layout, layer=layer, starts_B=starts_B, counts_B=counts_B,
            lengths_B=lengths_B, scale=parametrization.attention_scale,
        )  # fmt: skip
        o_XM = o_BTNH.reshape(B * T, N * H)
        branch_RD = matmul(packing.pack(o_XM) if packing else o_XM, weights.out, layer=layer) + own["out.bias"]
        x_RD = x_RD + parametrization.residual_scale * branch_RD
        normed_RD = _norm(x_RD, own["ln_2.scale"], own["ln_2.bias"], eps=config.layer_norm_eps)
        wide_RM = matmul(normed_RD, weights.up_gate, layer=layer) + own["up_gate.bias"]
        up_RM, gate_RM = jnp.split(wide_RM, 2, axis=1)
        branch_RD = matmul((up_RM * jax.nn.silu(gate_RM))[:, :F], weights.down, layer=layer) + own["down.bias"]
        x_RD = x_RD + parametrization.residual_scale * branch_RD
        return (x_RD, cache, jnp.maximum(dropped, dropped_B.max())), None

    layers = jnp.arange(config.num_layers)
    (x_RD, cache, dropped), _ = jax.lax.scan(block, (x_RD, cache, jnp.float32(0)), (layers, blocks))
    return x_RD, cache, dropped


def _norm_last(model: Btlm, weights: Weights, x_RD):
    vectors = weights.vectors
    return _norm(x_RD, vectors["ln_f.scale"], vectors["ln_f.bias"], eps=model.config.layer_norm_eps)


def _norm(x_RD, scale_D, bias_D, *, eps: float):
    return cast(jax.Array, normalise(eps, x_RD[None], scale_D, bias_D))[0]  # partial hides custom_vjp's type


def _without_key_bias(bias_M):
    """Return a bias of queries, keys and values with zeros for the keys.

    q.b is the same in every score of a row, which softmax ignores. Without it the cache bounds what it drops from the
    keys' own norms, and has their range to itself in int8.
    """
    query, key, value = jnp.split(bias_M, 3)
    return jnp.concatenate([query, jnp.zeros_like(key), value])
