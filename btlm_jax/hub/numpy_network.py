"""The network in NumPy, float32, from the published tensors: the page to read first.

    ids -> embed -> n_layer x block (attention, then a gated MLP, both added to x) -> layer_norm -> logits

Arrays end in their axes: B sequences, T positions, V tokens, D model width (n_embd), N heads of H = D / N dims,
F feed-forward width (n_inner). Keys and values have positions S, C = 3 D is q, k and v side by side. Source of the
formulas: the published model code of BTLM-3B-8K (arXiv:2309.11568).

Apart from the ALiBi slopes it shares no code with the JAX model, so conversions are proven with it. The weights stay
with the caller, who gives `norm` and `linear`: they can read one tensor at a time, or quantize it before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from btlm_jax.attention.alibi import alibi_slopes, dynamic_factor
from btlm_jax.hub.published import EMBEDDING, FINAL_NORM, HEAD, PublishedConfig, Tensors, block_prefix

# (input [B, T, channels], name of the layer in its block, such as "ln_1" or "attn.c_attn") -> output [B, T, channels]
Layer = Callable[[np.ndarray, str], np.ndarray]


def embed(config: PublishedConfig, table_VD: np.ndarray, ids_BT: np.ndarray) -> np.ndarray:
    """Return the float32 x_BTD that enters the first block; positions enter in attention (ALiBi)."""
    return table_VD[ids_BT].astype(np.float32) * np.float32(config.mup_embeddings_scale)


def block(config: PublishedConfig, x_BTD: np.ndarray, *, norm: Layer, linear: Layer) -> np.ndarray:
    """Return x_BTD after one block; `norm` and `linear` are called in the order of the network."""
    qkv_BTC = linear(norm(x_BTD, "ln_1"), "attn.c_attn")
    x_BTD = x_BTD + linear(attention(config, qkv_BTC), "attn.c_proj")
    normed_BTD = norm(x_BTD, "ln_2")
    up_BTF, gate_BTF = linear(normed_BTD, "mlp.c_fc"), linear(normed_BTD, "mlp.c_fc2")
    return x_BTD + linear(up_BTF * gate_BTF * sigmoid(gate_BTF), "mlp.c_proj")  # SwiGLU: up * silu(gate)


def layer_norm(config: PublishedConfig, x_BTD: np.ndarray, gain_D: np.ndarray, bias_D: np.ndarray) -> np.ndarray:
    """Return x with mean 0 and variance 1 over the model width, times the gain, plus the bias."""
    # Of thousands of deviations a float32 mean is too coarse by 1e-4 of one.
    x_BTD = (x_BTD - x_BTD.mean(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    x_BTD = x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + np.float32(config.layer_norm_epsilon))
    return x_BTD * gain_D + bias_D


def attention(config: PublishedConfig, qkv_BTC: np.ndarray) -> np.ndarray:
    """Return the heads' outputs side by side, [B, T, D]; the scores of one sequence are in memory at a time."""
    return np.stack([attend(config, qkv_TC) for qkv_TC in qkv_BTC])


def attend(config: PublishedConfig, qkv_TC: np.ndarray) -> np.ndarray:
    """Return softmax(q.k * scale - slope * distance) v for one sequence, over the token and those before it, [T, D].

    The scale is 1 / H under muP, else 1 / sqrt(H). ALiBi (arXiv:2108.12409): a slope per head, no other positions.
    """
    T = len(qkv_TC)
    q_TNH, k_SNH, v_SNH = np.moveaxis(qkv_TC.reshape(T, 3, config.n_head, config.head_dim), 1, 0)
    scale = 1 / config.head_dim if config.mup_scale_qk_dot_by_d else 1 / math.sqrt(config.head_dim)
    slopes_N = alibi_slopes(config.n_head, scaling=config.alibi_scaling)
    slopes_N = slopes_N / dynamic_factor(T, config.alibi_train_len, xp=np)
    distance_TS = np.arange(T)[:, None] - np.arange(T)[None]
    scores_NTS = np.einsum("TNH,SNH->NTS", q_TNH, k_SNH, optimize=True) * np.float32(scale)
    scores_NTS -= slopes_N[:, None, None] * distance_TS.astype(np.float32)
    scores_NTS = np.where(distance_TS >= 0, scores_NTS, -np.inf)
    weights_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True))
    weights_NTS /= weights_NTS.sum(-1, keepdims=True)
    return np.einsum("NTS,SNH->TNH", weights_NTS, v_SNH, optimize=True).reshape(T, -1)


def logits(config: PublishedConfig, x_TD: np.ndarray, head_VD: np.ndarray) -> np.ndarray:
    """Return the logits_TV of the normed output; the head is the embedding table, unless a file has its own."""
    return x_TD @ head_VD.T * np.float32(config.output_scale)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), computed by tanh, which does not overflow."""
    return (1 + np.tanh(x / 2)) / 2


def streamed_logits(config: PublishedConfig, tensors: Tensors, ids_T: np.ndarray) -> np.ndarray:
    """Run the whole network on one sequence; return the float32 logits_TV after each token.

    One tensor is in memory at a time. Raises what reading a tensor raises.
    """

    def read(name: str) -> np.ndarray:
        return tensors.read(name).astype(np.float32, copy=False)

    def norm(x_BTD: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(config, x_BTD, read(f"{name}.weight"), read(f"{name}.bias"))

    def linear(x_BTK: np.ndarray, name: str) -> np.ndarray:
        return x_BTK @ read(f"{name}.weight") + read(f"{name}.bias")

    def within(prefix: str, layer: Layer) -> Layer:
        return lambda x, name: layer(x, prefix + name)

    x_BTD = embed(config, tensors.read(EMBEDDING), ids_T[None])
    for number in range(config.n_layer):
        prefix = block_prefix(number)
        x_BTD = block(config, x_BTD, norm=within(prefix, norm), linear=within(prefix, linear))
    x_TD = norm(x_BTD, FINAL_NORM)[0]
    return logits(config, x_TD, read(HEAD if HEAD in tensors.shapes else EMBEDDING))
