"""The BTLM of a config in PyTorch: the peer that benchmarks compare with. Not part of the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from btlm_jax.config import TrainConfig
from btlm_jax.model.alibi import alibi_slopes
from btlm_jax.mup import make_parametrization


class TorchBlock(nn.Module):
    """Pre-LayerNorm attention and SwiGLU, packed projections as the published code has."""

    def __init__(self, config: TrainConfig, *, attention: str):
        super().__init__()
        model = config.model
        D, Ff = model.d_model, model.d_ff
        self.num_heads, self.attention = model.num_heads, attention
        self.scale = make_parametrization(config.mup, model).attention_scale
        self.ln_1, self.ln_2 = (nn.LayerNorm(D, eps=model.layer_norm_eps) for _ in range(2))
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up_gate, self.down = nn.Linear(D, 2 * Ff), nn.Linear(Ff, D)

    def forward(self, x, bias, folded):
        B, T, D = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.attention == "mask":
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:
            # slope * s rides in one more lane of q and k (softmax ignores slope * t); padded to a multiple of 8.
            extra_q, extra_k = (part.expand(B, -1, T, -1) for part in folded)
            H = v.shape[-1]
            q, k = torch.cat([q * self.scale, extra_q], -1), torch.cat([k, extra_k], -1)
            v = F.pad(v, (0, extra_q.shape[-1]))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)[..., :H]
        x = x + self.out(o.transpose(1, 2).reshape(B, T, D))
        up, gate = self.up_gate(self.ln_2(x)).chunk(2, -1)
        return x + self.down(up * F.silu(gate))


class TorchBtlm(nn.Module):
    """Tied embeddings, muP multipliers, mean cross-entropy as the output."""

    def __init__(self, config: TrainConfig, *, attention: str, length: int):
        super().__init__()
        model = config.model
        self.parametrization = make_parametrization(config.mup, model)
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.blocks = nn.ModuleList(TorchBlock(config, attention=attention) for _ in range(model.num_layers))
        self.ln_f = nn.LayerNorm(model.d_model, eps=model.layer_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = config.mup.init_std
                if name.endswith(("out.weight", "down.weight")):
                    std /= (2 * model.num_layers) ** 0.5
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        slopes = torch.tensor(alibi_slopes(model.num_heads, scaling=model.alibi_scaling))
        position = torch.arange(length, dtype=torch.float32)
        distance = position[None, :] - position[:, None]
        bias = torch.where(distance <= 0, slopes[:, None, None] * distance, float("-inf"))
        self.register_buffer("bias", bias[None], persistent=False)
        lanes = torch.zeros(1, model.num_heads, length, 8)
        extra_q, extra_k = lanes.clone(), lanes.clone()
        extra_q[..., 0] = slopes[None, :, None]
        extra_k[..., 0] = position
        self.register_buffer("extra_q", extra_q, persistent=False)
        self.register_buffer("extra_k", extra_k, persistent=False)

    def forward(self, inputs, targets):
        x = self.embedding(inputs) * self.parametrization.embedding_scale
        for block in self.blocks:
            x = block(x, self.bias, (self.extra_q, self.extra_k))
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
