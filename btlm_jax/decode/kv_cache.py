"""Prefill and decode on a mesh: the blocks of model/ over a cache of the keys and values of earlier tokens.

A row's tokens are in slots 0, 1, ... from the left, independent of the other rows, so batches of different lengths need
no padding on the left and no mask: a token sees the cache up to its own position. Slots beyond a row's end may contain
padding; each is overwritten before any token can see it.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from btlm_jax.attention.alibi import dynamic_factor
from btlm_jax.model.layers import Embedding, LayerNorm, scale
from btlm_jax.model.transformer import Block, Btlm, device_slopes
from btlm_jax.parallel.mesh import WHOLE_SEQUENCES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer, batch row, position slot and head, in the cache's dtype."""

    k_LBSNH: jax.Array
    v_LBSNH: jax.Array

    @property
    def num_slots(self) -> int:
        return self.k_LBSNH.shape[2]


def make_cache(model: Btlm, mesh: Mesh, *, batch_size: int, num_slots: int, dtype: str) -> KVCache:
    """Make an empty cache on the mesh: rows over fsdp, heads over tensor."""
    config = model.config
    shape = (config.num_layers, batch_size, num_slots, config.num_heads, config.head_dim)
    sharding = NamedSharding(mesh, cache_spec())
    return KVCache(
        k_LBSNH=jnp.zeros(shape, jnp.dtype(dtype), device=sharding),
        v_LBSNH=jnp.zeros(shape, jnp.dtype(dtype), device=sharding),
    )


def extend(model: Btlm, params: dict, cache: KVCache, *, inputs_BT, starts_B, lengths_B):
    """Run new tokens, those of row b at positions starts_B[b], starts_B[b] + 1, ...; return hidden_BTD and the cache.

    lengths_B are the tokens of each row at the end of the call, of which this may be a piece: dynamic scaling of ALiBi
    (model.alibi_train_len) follows them.

    Equal to the last T positions of the whole forward pass. A position outside the cache is dropped: the caller makes
    the cache large enough. Memory for scores is O(T * slots) a head, so long prompts come in pieces.
    """
    config, parametrization, rules = model.config, model.parametrization, WHOLE_SEQUENCES
    starts_B = jax.sharding.reshard(starts_B, rules.spec("batch"))
    lengths_B = jax.sharding.reshard(lengths_B, rules.spec("batch"))
    embedding = Embedding(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        dtype=jnp.dtype(config.dtype),
        parametrization=parametrization,
        rules=rules,
    )
    embedded_BTD = cast(jax.Array, embedding.apply({"params": params["embedding"]}, inputs_BT))
    x_BTD = scale(embedded_BTD, parametrization.embedding_scale)

    def block(carry, scanned):
        x_BTD, cache = carry
        layer, layer_params = scanned
        updated_caches = []

        def attend(q_BTNW, k_BTNW, v_BTNW, _):
            # The head dim may be padded for the hardware (model/projection.py); the cache's is not.
            q_BTNH, k_BTNH, v_BTNH = (x[..., : config.head_dim] for x in (q_BTNW, k_BTNW, v_BTNW))
            o_BTNH, updated = _attend_cached(model, q_BTNH, k_BTNH, v_BTNH, cache, starts_B, lengths_B, layer)
            updated_caches.append(updated)
            return jnp.pad(o_BTNH, ((0, 0), (0, 0), (0, 0), (0, q_BTNW.shape[-1] - config.head_dim)))

        module = Block(
            config=config, project=model.project, attend=attend, parametrization=parametrization, rules=rules
        )
        x_BTD, _ = module.apply({"params": layer_params}, x_BTD, None)
        return (x_BTD, updated_caches.pop()), None

    layers = jnp.arange(config.num_layers)
    (x_BTD, cache), _ = jax.lax.scan(block, (x_BTD, cache), (layers, params["blocks"]))
    norm = LayerNorm(eps=config.layer_norm_eps, parametrization=parametrization, rules=rules)
    return norm.apply({"params": params["ln_f"]}, x_BTD), cache


def cache_spec() -> P:
    """Return how keys and values are split: rows over fsdp, heads over tensor."""
    return WHOLE_SEQUENCES.spec("layers", "batch", "length", "act_heads", "head_dim")


def _attend_cached(model: Btlm, q_BTNH, k_BTNH, v_BTNH, cache: KVCache, starts_B, lengths_B, layer):
    """Write keys and values into one layer of the cache and attend to it; each device has its own rows and heads."""
    rules, qk_scale = WHOLE_SEQUENCES, model.parametrization.attention_scale
    slopes_N = device_slopes(model.config, rules, mesh=jax.sharding.get_abstract_mesh())

    def local(q_BTNH, k_BTNH, v_BTNH, k_LBSNH, v_LBSNH, starts_B, lengths_B, slopes_N, layer):
        B, T = q_BTNH.shape[:2]
        position_BT = starts_B[:, None] + jnp.arange(T)[None]
        rows_B1 = jnp.arange(B)[:, None]
        k_LBSNH = k_LBSNH.at[layer, rows_B1, position_BT].set(k_BTNH.astype(k_LBSNH.dtype), mode="drop")
        v_LBSNH = v_LBSNH.at[layer, rows_B1, position_BT].set(v_BTNH.astype(v_LBSNH.dtype), mode="drop")
        k_BSNH = jax.lax.dynamic_index_in_dim(k_LBSNH, layer, keepdims=False).astype(q_BTNH.dtype)
        v_BSNH = jax.lax.dynamic_index_in_dim(v_LBSNH, layer, keepdims=False).astype(q_BTNH.dtype)
        offset_BTS = jnp.arange(k_BSNH.shape[1])[None, None] - position_BT[:, :, None]
        scores_BNTS = qk_scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
        slopes_BN = slopes_N / dynamic_factor(lengths_B, model.alibi_train_len, xp=jnp)[:, None]
        bias_BNTS = slopes_BN[:, :, None, None] * offset_BTS[:, None].astype(jnp.float32)
        scores_BNTS = jnp.where(offset_BTS[:, None] <= 0, scores_BNTS + bias_BNTS, -jnp.inf)
        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNH.dtype)
        o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, preferred_element_type=jnp.float32)
        return o_BTNH.astype(q_BTNH.dtype), k_LBSNH, v_LBSNH

    new, cached = rules.spec("batch", "length", "act_heads", "head_dim"), cache_spec()
    rows, heads = rules.spec("batch"), rules.spec("act_heads")
    mapped = jax.shard_map(
        local, in_specs=(new, new, new, cached, cached, rows, rows, heads, P()), out_specs=(new, cached, cached)
    )
    slopes_N = jax.sharding.reshard(slopes_N, heads)
    arrays = (q_BTNH, k_BTNH, v_BTNH, cache.k_LBSNH, cache.v_LBSNH, starts_B, lengths_B, slopes_N, layer)
    o_BTNH, k_LBSNH, v_LBSNH = mapped(*arrays)
    return o_BTNH, KVCache(k_LBSNH=k_LBSNH, v_LBSNH=v_LBSNH)
