"""What benchmarks/attention.py compares: forward and backward of causal ALiBi attention, each way it can be had.

A contender is made in its own process and called there; the inputs are the same for all, drawn from one seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from btlm_jax.attention.alibi import alibi_slopes

HEAD_DIM = 80
SCALE = 1 / HEAD_DIM
OURS = "btlm_jax"
EVERY_KEY = "btlm_jax, every key in reach"
BLOCKWISE = "btlm_jax, blockwise (XLA)"
CHUNKED = "btlm_jax, chunked (XLA)"
NO_ALIBI = "btlm_jax, every key, no ALiBi"
FLASH_FOLDED, CUDNN_FOLDED = "torch SDPA flash, ALiBi folded", "torch SDPA cuDNN, ALiBi folded"
FLEX = "torch FlexAttention, ALiBi"
PEERS = (
    "torch SDPA, mask",
    FLASH_FOLDED,
    "torch eager, bias",
    "jax.nn.dot_product_attention, bias",
    "jax naive, bias",
)
CONTENDERS = {
    "cpu": (OURS, EVERY_KEY, BLOCKWISE, *PEERS),
    "cuda": (OURS, EVERY_KEY, NO_ALIBI, CHUNKED, *PEERS, CUDNN_FOLDED, FLEX),
}
# How many [N, T, T] arrays exist at once, mask and bias included; the others hold none.
SQUARES = {
    "torch SDPA, mask": 1,
    "torch eager, bias": 4,
    "jax.nn.dot_product_attention, bias": 8,
    "jax naive, bias": 8,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of q, k, v and do, [batch, length, heads, HEAD_DIM], on a device: "cpu" (float32) or "cuda" (bfloat16)."""

    batch: int
    length: int
    heads: int
    device: str

    @property
    def itemsize(self) -> int:
        return 4 if self.device == "cpu" else 2

    @property
    def input_bytes(self) -> int:
        return 4 * self.batch * self.length * self.heads * HEAD_DIM * self.itemsize

    def needed_bytes(self, name: str) -> int:
        """Return roughly what the [N, T, T] arrays of a contender take; a mask has no batch."""
        batch = 1 if name == "torch SDPA, mask" else self.batch
        return SQUARES.get(name, 0) * batch * self.heads * self.length**2 * self.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A call that returns (o, dq, dk, dv), what waits for them, and the bytes of a bias that is kept for it."""

    call: Callable
    wait: Callable
    to_numpy: Callable
    bias_bytes: int = 0


def make_contender(name: str, shape: Shape) -> Contender:
    """Make one of CONTENDERS in this process."""
    rng = np.random.default_rng(0)
    size = (shape.batch, shape.length, shape.heads, HEAD_DIM)
    inputs = [rng.standard_normal(size, np.float32) for _ in range(4)]
    slopes_N = alibi_slopes(shape.heads, scaling=1.0)
    return (_make_torch if name.startswith("torch") else _make_jax)(name, shape, inputs, slopes_N)


def _make_jax(name: str, shape: Shape, inputs, slopes_N) -> Contender:
    import jax
    import jax.numpy as jnp

    dtype = jnp.float32 if shape.device == "cpu" else jnp.bfloat16
    arrays = [jax.device_put(x.astype(dtype)) for x in inputs]
    bias_NTT = _jax_bias(slopes_N, shape.length, dtype) if name in SQUARES else None
    function = _jax_function(name, shape, slopes_N)

    @jax.jit
    def run(q, k, v, do, bias_NTT):
        o, vjp = jax.vjp(functools.partial(function, bias_NTT=bias_NTT), q, k, v)
        return o, *vjp(do)

    return Contender(
        call=lambda: run(*arrays, bias_NTT),
        wait=jax.block_until_ready,
        to_numpy=lambda x: np.asarray(x, np.float32),
        bias_bytes=0 if bias_NTT is None else bias_NTT.nbytes,
    )


def _jax_bias(slopes_N, length: int, dtype):
    import jax
    import jax.numpy as jnp

    @jax.jit
    def make():
        offset_TT = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
        bias_NTT = slopes_N[:, None, None] * offset_TT[None].astype(jnp.float32)
        return jnp.where(offset_TT[None] <= 0, bias_NTT, -1e30).astype(dtype)

    return make().block_until_ready()


def _jax_function(name: str, shape: Shape, slopes_N) -> Callable:
    import jax
    import jax.numpy as jnp

    from btlm_jax.attention import attend

    def naive(q, k, v, bias_NTT):
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * SCALE + bias_NTT[None]
        return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores).astype(q.dtype), v)

    def library(q, k, v, bias_NTT):
        return jax.nn.dot_product_attention(q, k, v, bias=bias_NTT[None], scale=SCALE)

    def ours(q, k, v, bias_NTT, slopes_N=slopes_N, implementation="auto"):
        return attend(q, k, v, slopes_N, scale=SCALE, implementation=implementation)

    def no_alibi(q, k, v, bias_NTT):
        return jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=True, implementation="cudnn")

    return {
        OURS: ours,
        EVERY_KEY: functools.partial(ours, slopes_N=slopes_N * 1e-9),
        BLOCKWISE: functools.partial(ours, implementation="blockwise"),
        CHUNKED: functools.partial(ours, implementation="chunked"),
        NO_ALIBI: no_alibi,
        "jax.nn.dot_product_attention, bias": library,
        "jax naive, bias": naive,
    }[name]


def _make_torch(name: str, shape: Shape, inputs, slopes_N) -> Contender:
    import os

    import torch

    torch.set_num_threads(os.cpu_count())
    dtype = torch.float32 if shape.device == "cpu" else torch.bfloat16
    # [B, N, T, H] seen through [B, T, N, H], as a model's projections give it.
    q, k, v, do = (torch.tensor(x).to(shape.device, dtype).transpose(1, 2) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    bias = _torch_bias(slopes_N, shape.length, dtype, shape.device) if name in SQUARES else None
    attend = _torch_function(name, shape, slopes_N, bias)

    def call():
        o = attend(q, k, v)
        return tuple(x.detach() for x in (o, *torch.autograd.grad(o, (q, k, v), do)))

    def wait(_):
        if shape.device == "cuda":
            torch.cuda.synchronize()

    return Contender(
        call=call,
        wait=wait,
        to_numpy=lambda x: x.float().cpu().numpy(),
        bias_bytes=0 if bias is None else bias.nbytes,
    )


def _torch_bias(slopes_N, length: int, dtype, device: str):
    import torch

    position = torch.arange(length, device=device, dtype=torch.float32)
    offset = position[None, :] - position[:, None]
    bias = torch.empty(1, len(slopes_N), length, length, dtype=dtype, device=device)
    for head, slope in enumerate(slopes_N):
        bias[0, head] = torch.where(offset <= 0, float(slope) * offset, float("-inf"))
    return bias


def _torch_function(name: str, shape: Shape, slopes_N, bias) -> Callable:
    import torch
    import torch.nn.functional as F
    from torch_btlm import attend_cudnn, attend_flex, attend_folded, folded_lanes, make_flex_mask

    slopes = torch.tensor(slopes_N, device=shape.device)
    if name == "torch SDPA, mask":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)
    if name == "torch eager, bias":
        return lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) * SCALE + bias, -1) @ v
    if name in (FLASH_FOLDED, CUDNN_FOLDED):
        dtype = torch.float32 if shape.device == "cpu" else torch.bfloat16
        lanes = [x.to(shape.device) for x in folded_lanes(slopes_N, shape.length, scale=SCALE, dtype=dtype)]
        attend = attend_folded if name == FLASH_FOLDED else attend_cudnn
        return lambda q, k, v: attend(q, k, v, lanes, scale=SCALE)
    assert name == FLEX
    mask = make_flex_mask(shape.length, device=shape.device)
    flex = torch.compile(attend_flex, dynamic=False)
    return lambda q, k, v: flex(q, k, v, slopes, mask, scale=SCALE)
