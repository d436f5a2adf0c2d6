"""The BTLM of a config in PyTorch: the peer that benchmarks compare with. Not part of the package."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.alibi_lanes import NUM_LANES, alibi_lanes
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.mup import make_parametrization

# SDPA with a bias; SDPA with ALiBi in lanes of q and k, by its choice and by cuDNN; FlexAttention.
ATTENTIONS = ("mask", "folded", "cudnn", "flex")


def folded_lanes(slopes_N: np.ndarray, length: int, *, scale: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return what to append to q and to k [B, N, T, H], each [1, N, T, W], so that q . k gains slope * s / scale.

    In float32 one lane does, padded to a multiple of 8; bfloat16 needs the parts of btlm_jax/attention/alibi_lanes.py.
    """
    if dtype == torch.bfloat16:
        lanes = alibi_lanes(slopes_N / scale, length=length, head_dim=0, width=NUM_LANES + 4)
        return [torch.tensor(np.asarray(x)).transpose(0, 1)[None].to(dtype).contiguous() for x in lanes]
    extra_q, extra_k = torch.zeros(2, 1, len(slopes_N), length, 8)
    extra_q[..., 0] = torch.tensor(slopes_N / scale)[None, :, None]  # softmax ignores slope * t
    extra_k[..., 0] = torch.arange(length)
    return [extra_q, extra_k]


def attend_folded(q, k, v, lanes, *, scale: float):
    """Attend through SDPA's causal kernel; values are as wide as keys there."""
    extra_q, extra_k = (x.expand(q.shape[0], -1, -1, -1) for x in lanes)
    q, k, v = torch.cat([q, extra_q], -1), torch.cat([k, extra_k], -1), F.pad(v, (0, extra_q.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., : -extra_q.shape[-1]]


def attend_cudnn(q, k, v, lanes, *, scale: float):
    """Attend as `attend_folded` does, through cuDNN's kernel, and fail where it cannot."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend_folded(q, k, v, lanes, scale=scale)


def make_flex_mask(length: int, *, device: str):
    """Return FlexAttention's causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, t, s: s <= t, None, None, length, length, device=device)


def attend_flex(q, k, v, slopes, mask, *, scale: float):
    """Attend through FlexAttention with ALiBi as the score's modification; to be compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    def alibi(score, b, h, t, s):
        return score + slopes[h] * (s - t)

    return flex_attention(q, k, v, score_mod=alibi, block_mask=mask, scale=scale)


class TorchBlock(nn.Module):
    """Pre-LayerNorm attention and SwiGLU, packed projections as the published code has."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        model = config.model
        D, Ff = model.d_model, model.d_ff
        self.num_heads = model.num_heads
        self.ln_1, self.ln_2 = (nn.LayerNorm(D, eps=model.layer_norm_eps) for _ in range(2))
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up_gate, self.down = nn.Linear(D, 2 * Ff), nn.Linear(Ff, D)

    def forward(self, x, attend):
        B, T, D = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(B, T, D))
        up, gate = self.up_gate(self.ln_2(x)).chunk(2, -1)
        return x + self.down(up * F.silu(gate))


class TorchBtlm(nn.Module):
    """Tied embeddings, muP multipliers, mean cross-entropy as the output; activations in the config's dtype.

    Parameters are float32: for bfloat16, call it under torch.autocast.
    """

    def __init__(self, config: TrainConfig, *, attention: str, length: int, device: str):
        super().__init__()
        model = config.model
        self.dtype = getattr(torch, model.dtype)
        self.parametrization = make_parametrization(config.mup, model)
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.blocks = nn.ModuleList(TorchBlock(config) for _ in range(model.num_layers))
        self.ln_f = nn.LayerNorm(model.d_model, eps=model.layer_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = config.mup.init_std
                if name.endswith(("out.weight", "down.weight")):
                    std /= (2 * model.num_layers) ** 0.5
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        slopes_N = alibi_slopes(model.num_heads, scaling=model.alibi_scaling)
        self.attend = self._make_attend(attention, slopes_N, length, device)
        self.to(device)

    def _make_attend(self, attention: str, slopes_N, length: int, device: str):
        scale = self.parametrization.attention_scale
        slopes = torch.tensor(slopes_N, device=device)
        if attention in ("folded", "cudnn"):
            lanes = [x.to(device) for x in folded_lanes(slopes_N, length, scale=scale, dtype=self.dtype)]
            attend = attend_folded if attention == "folded" else attend_cudnn
            return lambda q, k, v: attend(q, k, v, lanes, scale=scale)
        if attention == "flex":
            mask = make_flex_mask(length, device=device)
            return lambda q, k, v: attend_flex(q, k, v, slopes, mask, scale=scale)
        position = torch.arange(length, dtype=torch.float32, device=device)
        distance = position[None, :] - position[:, None]
        bias = torch.where(distance <= 0, slopes[:, None, None] * distance, float("-inf"))[None].to(self.dtype)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    def forward(self, inputs, targets):
        x = (self.embedding(inputs) * self.parametrization.embedding_scale).to(self.dtype)
        for block in self.blocks:
            x = block(x, self.attend)
        logits = F.linear(self.ln_f(x), self.embedding.weight) * self.parametrization.output_scale
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Return AdamW groups: matrices decay and learn at rate / width, the embedding decays, vectors do neither."""
    width = model.parametrization.width
    groups = {"hidden": [], "embedding": [], "vectors": []}
    for name, parameter in model.named_parameters():
        kind = "vectors" if parameter.ndim < 2 else "embedding" if name.startswith("embedding") else "hidden"
        groups[kind].append(parameter)
    decay = config.optimizer.weight_decay
    return [
        {"params": groups["hidden"], "lr": 1e-3 / width, "weight_decay": decay},
        {"params": groups["embedding"], "lr": 1e-3, "weight_decay": decay},
        {"params": groups["vectors"], "lr": 1e-3, "weight_decay": 0.0},
    ]
