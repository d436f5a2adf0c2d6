"""Trainers in the style of nanoGPT and of nanochat, in PyTorch on a CPU, for a budget of seconds: the peers of
time_to_loss.py. Not part of the package.

The recipes are those of github.com/karpathy/nanoGPT (2025-11) and github.com/karpathy/nanochat (2026-07): numbers and
formulas, no code. Schedules run over the budget instead of over steps, so that they end when it does. What nanochat has
besides and this lacks: value embeddings, which would double the parameters at this size, and windows of attention,
which its own run for CPUs leaves out too.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NANOGPT, NANOCHAT = "nanoGPT style", "nanochat style"
EVALUATION_ROWS = 8
# arXiv 2505.16932, five iterations, as nanochat has them.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a peer's model."""

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    block_len: int


class GptBlock(nn.Module):
    """GPT-2's block without biases: LayerNorm, causal attention, GELU."""

    def __init__(self, shape: Shape):
        super().__init__()
        D = shape.d_model
        self.num_heads = shape.num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x_BTD):
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.ln_1(x_BTD)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BNTH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BNTH.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.ln_2(x_BTD))))


class Gpt(nn.Module):
    """nanoGPT's model: learned positions, tied embedding, N(0, 0.02), residual projections / sqrt(2 L)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.block_len, shape.d_model)
        self.blocks = nn.ModuleList(GptBlock(shape) for _ in range(shape.num_layers))
        self.ln_f = nn.LayerNorm(shape.d_model, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.num_layers) if is_residual else 0.02)

    def forward(self, inputs_BT, targets_BT, reduction: str = "mean"):
        x_BTD = self.embedding(inputs_BT) + self.positions.weight[: inputs_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.ln_f(x_BTD), self.embedding.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction=reduction)


def rms_norm(x):
    """Return x over the root of its mean square along the last dim; without weights."""
    return F.rms_norm(x, (x.shape[-1],))


class ChatBlock(nn.Module):
    """nanochat's block: RoPE of base 100,000, normalized queries and keys times 1.2, squared ReLU, no biases."""

    def __init__(self, shape: Shape):
        super().__init__()
        D = shape.d_model
        self.num_heads = shape.num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x_BTD, cos_TH, sin_TH):
        B, T, D = x_BTD.shape
        normed_BTD = rms_norm(x_BTD)
        q, k, v = (
            project(normed_BTD).view(B, T, self.num_heads, -1).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        q, k = (1.2 * rms_norm(rotate(x, cos_TH, sin_TH)) for x in (q, k))
        mixed_BNTH = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BNTH.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.relu(self.up(rms_norm(x_BTD))).square())


def rotate(x_BNTH, cos_TH, sin_TH):
    """Return x with the pairs of dims (h, h + H/2) turned by their angles."""
    first, second = x_BNTH.chunk(2, -1)
    return torch.cat([first * cos_TH - second * sin_TH, first * sin_TH + second * cos_TH], -1)


class Chat(nn.Module):
    """nanochat's model: untied, logits capped at 15, a share of the embedding in every layer and of the token before.

    `smear` adds a gated share of the embedding before; `backout` takes the middle layer's output off the last one's.
    """

    SMEAR_CHANNELS = 24

    def __init__(self, shape: Shape):
        super().__init__()
        D, layers = shape.d_model, shape.num_layers
        self.embedding = nn.Embedding(shape.vocab_size, D)
        self.blocks = nn.ModuleList(ChatBlock(shape) for _ in range(layers))
        self.readout = nn.Linear(D, shape.vocab_size, bias=False)
        self.smear_gate = nn.Linear(self.SMEAR_CHANNELS, 1, bias=False)
        self.smear, self.backout = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 0.2))
        depth = torch.arange(layers) / max(layers - 1, 1)
        self.residual_scales, self.first_scales = nn.Parameter(1.15 - 0.1 * depth), nn.Parameter(0.2 - 0.15 * depth)
        nn.init.normal_(self.embedding.weight, std=0.8)
        nn.init.normal_(self.readout.weight, std=0.001)
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        bound = math.sqrt(3 / D)  # of a uniform distribution whose deviation is 1 / sqrt(D)
        for block in self.blocks:
            for layer in (block.query, block.key, block.value):
                nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(block.up.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)
        head_dim = D // shape.num_heads
        frequencies_H = 100_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles_TH = torch.arange(shape.block_len)[:, None] * frequencies_H
        self.register_buffer("cos_TH", angles_TH.cos(), persistent=False)
        self.register_buffer("sin_TH", angles_TH.sin(), persistent=False)

    def forward(self, inputs_BT, targets_BT, reduction: str = "mean"):
        T = inputs_BT.shape[1]
        x_BTD = rms_norm(self.embedding(inputs_BT))
        gate = self.smear * torch.sigmoid(self.smear_gate(x_BTD[:, 1:, : self.SMEAR_CHANNELS]))
        first_BTD = x_BTD = torch.cat([x_BTD[:, :1], x_BTD[:, 1:] + gate * x_BTD[:, :-1]], 1)
        middle_BTD = first_BTD
        for number, block in enumerate(self.blocks):
            x_BTD = self.residual_scales[number] * x_BTD + self.first_scales[number] * first_BTD
            x_BTD = block(x_BTD, self.cos_TH[:T], self.sin_TH[:T])
            if number == len(self.blocks) // 2:
                middle_BTD = x_BTD
        logits_BTV = self.readout(rms_norm(x_BTD - self.backout * middle_BTD)).float()
        logits_BTV = 15 * torch.tanh(logits_BTV / 15)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction=reduction)


MODELS = {NANOGPT: Gpt, NANOCHAT: Chat}


def orthogonalize(x_KMN, dtype: torch.dtype):
    """Return the orthogonal factor of each of K matrices, about, of Frobenius norm sqrt(min(M, N)); products in dtype.

    Rows are brought to one norm first (arXiv 2603.28254); then five iterations of Polar Express (arXiv 2505.16932).
    """
    num_rows, num_columns = x_KMN.shape[-2:]
    norm_K11 = x_KMN.norm(dim=(-2, -1), keepdim=True)
    row_norm_KM1 = x_KMN.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    x = x_KMN / row_norm_KM1 * (norm_K11 / num_rows**0.5)
    x = (x / (1.01 * norm_K11 + 1e-6)).to(dtype)
    x = x.mT if num_rows > num_columns else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = (x.mT if num_rows > num_columns else x).float()
    return x * (min(num_rows, num_columns) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))


def muon_update(grad_KMN, param_KMN, first_KMN, second, rate, momentum, decay, dtype: torch.dtype):
    """Return K matrices after a step of Muon, with their two moments; rate, momentum and decay are tensors.

    Nesterov's momentum, `orthogonalize`, a second moment of 0.9 a row (a column of wide matrices) that keeps the
    update's norm (NorMuon, arXiv 2510.05491), decay only where it goes with the update, rate x sqrt(max(1, M / N)).
    """
    num_rows, num_columns = grad_KMN.shape[-2:]
    first_KMN = torch.lerp(first_KMN, grad_KMN, 1 - momentum)
    update_KMN = orthogonalize(torch.lerp(grad_KMN, first_KMN, momentum), dtype)
    square = update_KMN.square().mean(dim=-1 if num_rows >= num_columns else -2, keepdim=True)
    second = torch.lerp(second, square, 0.1)
    scaled_KMN = update_KMN * second.clamp_min(1e-10).rsqrt()
    norms = [x.norm(dim=(-2, -1), keepdim=True) for x in (update_KMN, scaled_KMN)]
    update_KMN = scaled_KMN * (norms[0] / norms[1].clamp_min(1e-10))
    rate = rate * max(1.0, num_rows / num_columns) ** 0.5
    decayed_KMN = decay * param_KMN * (update_KMN * param_KMN >= 0)
    return param_KMN - rate * (update_KMN + decayed_KMN), first_KMN, second


class Muon:
    """Muon for a model's matrices, those of one shape together."""

    def __init__(self, matrices: list[nn.Parameter], *, dtype: torch.dtype, wrap: Callable):
        self._update, self._dtype = wrap(muon_update), dtype
        self._groups = []
        for rows, columns in sorted({tuple(matrix.shape) for matrix in matrices}):
            group = [matrix for matrix in matrices if matrix.shape == (rows, columns)]
            second = (len(group), rows, 1) if rows >= columns else (len(group), 1, columns)
            self._groups.append([group, torch.zeros(len(group), rows, columns), torch.zeros(second)])

    @torch.no_grad()
    def step(self, *, rate: float, momentum: float, decay: float) -> None:
        """Update the matrices by their gradients."""
        numbers = [torch.tensor(x) for x in (rate, momentum, decay)]  # of floats each value would be compiled anew
        for group in self._groups:
            matrices, first, second = group
            gradients, values = (torch.stack(x) for x in ([m.grad for m in matrices], matrices))
            values, group[1], group[2] = self._update(gradients, values, first, second, *numbers, self._dtype)
            torch._foreach_copy_(matrices, list(values.unbind()))


class GptRecipe:
    """nanoGPT's: AdamW (0.9, 0.99) at 1e-3, as in its small config, train_shakespeare_char.py; decay 0.1, clip 1.

    Warm-up of 100 steps, then a cosine to a tenth.
    """

    def __init__(self, model: nn.Module, *, rate_scale: float, **_):
        self._parameters = list(model.parameters())
        groups = [
            {"params": [x for x in self._parameters if x.ndim >= 2], "weight_decay": 0.1},
            {"params": [x for x in self._parameters if x.ndim < 2], "weight_decay": 0.0},
        ]
        self._rate = 1e-3 * rate_scale
        self._adam = torch.optim.AdamW(groups, lr=self._rate, betas=(0.9, 0.99), fused=True)

    def step(self, number: int, progress: float) -> None:
        """Update the parameters by their gradients; `progress` is the share of the budget that is over."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        scale = 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for group in self._adam.param_groups:
            group["lr"] = self._rate * scale * min(1.0, (number + 1) / 101)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)


class ChatRecipe:
    """nanochat's: Muon at 0.02 for matrices, AdamW for the rest at its rates, all x sqrt(batch / 2^19 tokens).

    AdamW's rates are x sqrt(768 / D) but for scalars. Warm-up of 40 steps, from 35 % of the budget on linear to 5 %.
    Muon's momentum goes from 0.85 to 0.97 in 400 steps, and to 0.9 with the rate; its decay, 0.28 x sqrt(batch / 2^19)
    x reference tokens / expected tokens, to 0 by a cosine. The reference is 12 tokens a parameter of its 12 layers.
    """

    REFERENCE_BATCH, REFERENCE_TOKENS = 2**19, 12 * (12 * 12 * 768**2 + 32768 * 768)

    def __init__(self, model, *, rate_scale: float, dtype: torch.dtype, wrap: Callable, batch: int, tokens: int):
        batch_scale = math.sqrt(batch / self.REFERENCE_BATCH)
        scale, width_scale = rate_scale * batch_scale, math.sqrt(768 / model.embedding.weight.shape[1])
        small, slow = (0.8, 0.95), (0.8, 0.995)
        groups = [
            (model.readout.weight, 0.008 * width_scale * scale, (0.8, 0.96), 0.01),
            (model.embedding.weight, 0.3 * width_scale * scale, slow, 0.001),
            (model.residual_scales, 0.005 * scale, small, 0.05),
            (model.first_scales, 0.5 * scale, (0.96, 0.95), 0.0),
            *((x, 0.2 * rate_scale, small, 0.0) for x in (model.smear_gate.weight, model.smear, model.backout)),
        ]
        self._adam = torch.optim.AdamW(
            [{"params": [x], "lr": lr, "betas": betas, "weight_decay": decay} for x, lr, betas, decay in groups],
            eps=1e-10, fused=True,
        )  # fmt: skip
        self._rates = [group["lr"] for group in self._adam.param_groups]
        self._matrices = list(model.blocks.parameters())
        self._muon, self._muon_rate = Muon(self._matrices, dtype=dtype, wrap=wrap), 0.02 * scale
        self._decay = 0.28 * batch_scale * self.REFERENCE_TOKENS / tokens

    def step(self, number: int, progress: float) -> None:
        """Update the parameters by their gradients; `progress` is the share of the budget that is over."""
        progress = min(progress, 1.0)
        down = max(0.0, (progress - 0.35) / 0.65)
        scale = min(1.0, (number + 1) / 40) * (1 - 0.95 * down)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * scale
        self._adam.step()
        self._muon.step(
            rate=self._muon_rate * scale,
            momentum=0.97 - 0.07 * down if down else 0.85 + 0.12 * min(1.0, number / 400),
            decay=self._decay * 0.5 * (1 + math.cos(math.pi * progress)),
        )
        self._adam.zero_grad(set_to_none=True)
        for matrix in self._matrices:
            matrix.grad = None


RECIPES = {NANOGPT: GptRecipe, NANOCHAT: ChatRecipe}


class Trainer:
    """A peer's model and optimizer, in one of time_to_loss.py's FORMS; `expected_tokens` are those of the whole run."""

    def __init__(
        self, peer: str, shape: Shape, *, form: str, rows: int, rate_scale: float, expected_tokens: int, seed: int
    ):
        mode, precision = form.split(", ")
        torch.set_float32_matmul_precision("medium" if precision == "medium" else "high")
        torch.manual_seed(seed)
        self.is_bfloat16 = precision == "bfloat16"
        self.model = MODELS[peer](shape)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())

        def wrap(function):
            is_compiled = mode == "compile" or (mode == "compile model" and function is self.model)
            return torch.compile(function, dynamic=False) if is_compiled else function

        self._recipe = RECIPES[peer](
            self.model, rate_scale=rate_scale, dtype=torch.bfloat16 if self.is_bfloat16 else torch.float32, wrap=wrap,
            batch=rows * shape.block_len, tokens=expected_tokens,
        )  # fmt: skip
        self._loss_of = wrap(self.model)

    def step(self, number: int, inputs_BT, targets_BT, *, progress: float) -> float:
        """Make step `number`, counted from 0, and return its loss in nats a token."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bfloat16):
            loss = self._loss_of(inputs_BT, targets_BT)
        loss.backward()
        self._recipe.step(number, progress)
        return loss.item()

    @torch.no_grad()
    def nats(self, tokens_NS, num_targets_N) -> float:
        """Return the loss summed over the first `num_targets` targets of each block of S tokens; not compiled."""
        total = 0.0
        for start in range(0, len(tokens_NS), EVALUATION_ROWS):
            rows_BS = torch.tensor(tokens_NS[start : start + EVALUATION_ROWS].astype(np.int64))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bfloat16):
                losses = self.model(rows_BS[:, :-1], rows_BS[:, 1:].contiguous(), reduction="none")
            losses_BT = losses.double().view(len(rows_BS), -1)
            is_target_BT = (
                torch.arange(losses_BT.shape[1]) < torch.tensor(num_targets_N[start : start + EVALUATION_ROWS])[:, None]
            )
            total += float((losses_BT * is_target_BT).sum())
        return total


def random_windows(tokens: np.ndarray, rng: np.random.Generator, *, rows: int, length: int):
    """Return inputs and targets, both [rows, length], of windows that begin anywhere in a stream of tokens."""
    starts = rng.integers(0, len(tokens) - length, rows)
    window_BS = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return window_BS[:, :-1].contiguous(), window_BS[:, 1:].contiguous()


def train(spec: dict, *, tokens: np.ndarray, record, counted: Callable[[], float]) -> dict:
    """Train a peer for spec["seconds"] and return what was done; `counted` says how many of them are over.

    `record(step, nats)` is called of evaluations, in whose time `counted` stands still; `nats` makes the loss.
    """
    shape = Shape(**spec["shape"])
    trainer = Trainer(
        spec["peer"], shape, form=spec["form"], rows=spec["rows"], rate_scale=spec["rate"],
        expected_tokens=spec["expected_tokens"], seed=spec["seed"],
    )  # fmt: skip
    rng = np.random.default_rng(spec["seed"])
    budget, every = spec["seconds"], spec["seconds"] / spec["evaluations"]
    began, number, reading, seconds, next_evaluation = counted(), 0, 0.0, [], every
    while True:
        step_began = counted()
        inputs_BT, targets_BT = random_windows(tokens, rng, rows=spec["rows"], length=shape.block_len)
        reading += counted() - step_began
        loss = trainer.step(number, inputs_BT, targets_BT, progress=counted() / budget)
        number += 1
        seconds.append(counted() - step_began)
        if not math.isfinite(loss):
            return {"diverged": f"the loss of step {number} is {loss}"}
        usual = statistics.median(seconds[-20:])
        is_last = number == spec.get("max_steps") or (len(seconds) > 2 and counted() + usual > budget)
        if is_last or counted() >= next_evaluation:
            next_evaluation = counted() + every
            record(number, trainer.nats)
        if is_last:
            break
    usual = statistics.median(seconds)
    compiling = max(0.0, sum(seconds[:2]) - 2 * usual)
    parts = {"start": began, "compile": compiling, "data": reading, "train": sum(seconds) - compiling - reading}
    return {
        "parts": parts, "steps": number, "tokens": number * inputs_BT.numel(), "step_seconds": usual,
        "parameters": trainer.num_parameters,
    }  # fmt: skip


def run(spec: dict, *, record, counted: Callable[[], float]) -> dict:
    """Run `train` on the tokens of spec["tokens_file"] with as many threads as this process has cores."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return train(spec, tokens=np.load(spec["tokens_file"], mmap_mode="r"), record=record, counted=counted)
