"""The published forward arithmetic in float32 NumPy, a block at a time; it shares no code with the JAX model.

Whoever walks the network gives `norm` and `linear`, which hold or read the weights: to prove them, or to round them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.hub.published import PublishedConfig, Tensors

HEAD = "lm_head.weight"

# (x_BTC, name of the layer in its block, such as "ln_1" or "attn.c_attn") -> x_BTC
Layer = Callable[[np.ndarray, str], np.ndarray]


def embed(config: PublishedConfig, table_VD: np.ndarray, ids_BT: np.ndarray) -> np.ndarray:
    """Return the float32 input_BTD of the first block: wte[ids] * mup_embeddings_scale."""
    return table_VD[ids_BT].astype(np.float32) * np.float32(config.mup_embeddings_scale)


def block(config: PublishedConfig, x_BTD: np.ndarray, *, norm: Layer, linear: Layer) -> np.ndarray:
    """Return x_BTD after one block; the layers are called in the order of the network."""
    qkv_BTC = linear(norm(x_BTD, "ln_1"), "attn.c_attn")
    x_BTD = x_BTD + linear(attention(config, qkv_BTC), "attn.c_proj")
    normed_BTD = norm(x_BTD, "ln_2")
    up_BTF, gate_BTF = linear(normed_BTD, "mlp.c_fc"), linear(normed_BTD, "mlp.c_fc2")
    return x_BTD + linear(up_BTF * gate_BTF * _sigmoid(gate_BTF), "mlp.c_proj")


def layer_norm(config: PublishedConfig, x_BTD: np.ndarray, gain_D: np.ndarray, bias_D: np.ndarray) -> np.ndarray:
    """Normalise over the model dim."""
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    x_BTD = x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + np.float32(config.layer_norm_epsilon))
    return x_BTD * gain_D + bias_D


def attention(config: PublishedConfig, qkv_BTC: np.ndarray) -> np.ndarray:
    """Attend causally with ALiBi; columns are q, k, v. Scores of one sequence exist at a time."""
    return np.stack([_attention(config, qkv_TC) for qkv_TC in qkv_BTC])


def streamed_logits(config: PublishedConfig, tensors: Tensors, ids_T: np.ndarray) -> np.ndarray:
    """Return the float32 logits_TV after each token, as the published code computes them.

    h = wte[ids] * mup_embeddings_scale; scores q.k/d (or /sqrt d) - slope * distance; MLP c_proj(c_fc(x) * silu(
    c_fc2(x))); logits = lm_head(ln_f(h)) * mup_output_alpha * mup_width_scale (conversion facts of arXiv 2309.11568's
    published model). Raises what reading a tensor raises.
    """

    def read(name: str) -> np.ndarray:
        return tensors.read(name).astype(np.float32, copy=False)

    def layers_of(prefix: str) -> tuple[Layer, Layer]:
        def norm(x_BTD: np.ndarray, name: str) -> np.ndarray:
            return layer_norm(config, x_BTD, read(f"{prefix}{name}.weight"), read(f"{prefix}{name}.bias"))

        def linear(x_BTK: np.ndarray, name: str) -> np.ndarray:
            return x_BTK @ read(f"{prefix}{name}.weight") + read(f"{prefix}{name}.bias")

        return norm, linear

    x_BTD = embed(config, tensors.read("transformer.wte.weight"), ids_T[None])
    for layer in range(config.n_layer):
        norm, linear = layers_of(f"transformer.h.{layer}.")
        x_BTD = block(config, x_BTD, norm=norm, linear=linear)
    final_norm, _ = layers_of("transformer.")
    head_VD = read(HEAD if HEAD in tensors.shapes else "transformer.wte.weight")
    return final_norm(x_BTD, "ln_f")[0] @ head_VD.T * np.float32(config.output_scale)


def _attention(config: PublishedConfig, qkv_TC: np.ndarray) -> np.ndarray:
    T = len(qkv_TC)
    q_TNH, k_TNH, v_TNH = np.moveaxis(qkv_TC.reshape(T, 3, config.n_head, config.head_dim), 1, 0)
    scale = 1 / config.head_dim if config.mup_scale_qk_dot_by_d else 1 / math.sqrt(config.head_dim)
    distance_TS = np.arange(T)[:, None] - np.arange(T)[None]
    slopes_N = alibi_slopes(config.n_head, scaling=config.alibi_scaling)
    scores_NTS = np.einsum("TNH,SNH->NTS", q_TNH, k_TNH, optimize=True) * np.float32(scale)
    scores_NTS -= slopes_N[:, None, None] * distance_TS.astype(np.float32)
    scores_NTS = np.where(distance_TS >= 0, scores_NTS, -np.inf)
    weights_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True))
    weights_NTS /= weights_NTS.sum(-1, keepdims=True)
    return np.einsum("NTS,SNH->TNH", weights_NTS, v_TNH, optimize=True).reshape(T, -1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2  # does not overflow
