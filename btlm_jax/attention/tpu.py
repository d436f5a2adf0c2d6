"""Causal attention with ALiBi for TPUs: kernels of our own, which take q, k and v as the projections write them.

Several heads lie side by side in the lanes of [batch, length, heads x head dim], which no head of 80 lanes divides into
tiles of 128. A program of the kernels (tpu_kernels.py) reads whole tiles of as many heads as fill them and parts the
heads in vector memory, so that nothing is padded, transposed or copied in HBM. Blocks above the diagonal are not
visited; the backward pass computes the scores once for all three gradients (FlashAttention, arXiv:2205.14135, appendix
B.4). Off a TPU, Pallas interprets the kernels: slow, the same arithmetic.

Letters beside the house's: G heads of one program, M = heads x head dim, X groups of heads, P pairs of blocks.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from btlm_jax.attention.lanes import named
from btlm_jax.attention.tpu_kernels import TILE, Heads, backward_kernel, forward_kernel, parted
from btlm_jax.sharding import device_kind

FORWARD, BACKWARD = "alibi_forward", "alibi_backward"  # the kernels' names in a compiled program
SMALL = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of vector memory a core; later ones have 64 or more
_MIB = 1 << 20


def attend_tpu(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, slopes_N: jax.Array, *, scale: float, interpret: bool
) -> jax.Array:
    """Attend in the kernels (same mathematics as `attend_reference`); products take operands in q's dtype."""
    B, T, N, H = q_BTNH.shape
    padding = -T % block_size(T)

    def flat(x):  # padding comes last: no real query sees its keys, and its outputs are cut off
        return jnp.pad(x.reshape(B, T, N * H), ((0, 0), (0, padding), (0, 0)))

    q_BTM, k_BTM, v_BTM = named(flat(q_BTNH), flat(k_BSNH), flat(v_BSNH))
    heads = Heads(num=N, dim=H, scale=scale)
    return _attend(heads, interpret, q_BTM, k_BTM, v_BTM, slopes_N)[:, :T].reshape(B, T, N, H)


def block_size(length: int) -> int:
    """Return how many positions a block of the kernels holds: whole tiles."""
    return min(256 if device_kind() in SMALL else 512, -(-length // TILE) * TILE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(heads: Heads, interpret: bool, q_BTM, k_BTM, v_BTM, slopes_N):
    return _attend_forward(heads, interpret, q_BTM, k_BTM, v_BTM, slopes_N)[0]


def _attend_forward(heads: Heads, interpret: bool, q_BTM, k_BTM, v_BTM, slopes_N):
    (B, T, M), dtype = q_BTM.shape, q_BTM.dtype
    G, H, C = heads.together, heads.dim, block_size(T)
    # Parted keys and values stay in vector memory for the queries to come, where there is room for all.
    kept = T // C if T * G * (heads.width + H) * dtype.itemsize <= _room() else 1
    queries, keys, rows = _blocks(heads, C)
    o_BTM, lse_BXGT = _call(
        functools.partial(forward_kernel, heads=heads),
        _pairs(T // C),
        name=FORWARD,
        grid=(B, heads.num // G),
        in_specs=[queries, queries, queries] if kept > 1 else [queries, keys, keys],
        out_specs=[queries, rows],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, M), dtype),
            jax.ShapeDtypeStruct((B, heads.num // G, G, T), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM(*parted(dtype, G, C, heads.width)),
            pltpu.VMEM(*parted(dtype, kept, G, C, heads.width)),
            pltpu.VMEM((kept, G, H, C), dtype),
            *2 * [pltpu.VMEM((G, 1, C), jnp.float32)],
            pltpu.VMEM((G, H, C), jnp.float32),
        ],
        interpret=interpret,
    )(slopes_N, q_BTM, k_BTM, v_BTM)
    o_BTM, lse_BXGT = checkpoint_name(o_BTM, "attention_out"), checkpoint_name(lse_BXGT, "attention_lse")
    return o_BTM, (q_BTM, k_BTM, v_BTM, slopes_N, o_BTM, lse_BXGT)


def _attend_backward(heads: Heads, interpret: bool, residuals, do_BTM):
    q_BTM, k_BTM, v_BTM, slopes_N, o_BTM, lse_BXGT = residuals
    T, C = q_BTM.shape[1], block_size(q_BTM.shape[1])
    # A product with zeros and ones sums over each head's lanes, where a reshape to heads would move them all.
    is_of_head_NM = np.repeat(np.eye(heads.num, dtype=np.float32), heads.dim, axis=1)
    product_BTM = do_BTM.astype(jnp.float32) * o_BTM.astype(jnp.float32)
    delta_BNT = jnp.einsum("BTM,NM->BNT", product_BTM, is_of_head_NM, precision="highest")
    inputs = slopes_N, q_BTM, k_BTM, v_BTM, do_BTM, lse_BXGT, delta_BNT.reshape(lse_BXGT.shape)
    # The gradients of so many blocks of queries fit into vector memory at a time.
    num_queries = max(1, min(T // C, _room() // (C * heads.together * heads.dim * 4)))
    spans = [
        _differentiate(heads, range(first, min(first + num_queries, T // C)), inputs, interpret)
        for first in range(0, T // C, num_queries)
    ]
    dq_BTM = jnp.concatenate([dq for dq, _, _ in spans], axis=1)

    def total(parts):  # of keys that a span sees: those up to its end
        whole = [jnp.pad(part, ((0, 0), (0, T - part.shape[1]), (0, 0))) for part in parts]
        return functools.reduce(jnp.add, whole).astype(q_BTM.dtype)

    return dq_BTM, total([dk for _, dk, _ in spans]), total([dv for _, _, dv in spans]), None


_attend.defvjp(_attend_forward, _attend_backward)


def _differentiate(heads: Heads, span: range, inputs: tuple, interpret: bool):
    """Return dq of the blocks of queries in `span`, and their part of dk and dv of the keys that they see."""
    q_BTM = inputs[1]
    (B, T, M), dtype = q_BTM.shape, q_BTM.dtype
    G, H, W, C = heads.together, heads.dim, heads.width, block_size(T)
    queries, keys, rows = _blocks(heads, C)
    of_span = pl.BlockSpec(
        (1, C, G * H), lambda b, x, p, pairs, slopes: (b, jnp.maximum(pairs[1, p] - span.start, 0), x)
    )
    partial = dtype if len(span) == T // C else jnp.float32
    return _call(
        functools.partial(backward_kernel, heads=heads, span=span),
        _pairs(span.stop, first=span.start, by_keys=True),
        name=BACKWARD,
        grid=(B, heads.num // G),
        in_specs=[queries, keys, keys, queries, rows, rows],
        out_specs=[of_span, keys, keys],
        out_shape=[
            jax.ShapeDtypeStruct((B, len(span) * C, M), dtype),
            *2 * [jax.ShapeDtypeStruct((B, span.stop * C, M), partial)],
        ],
        scratch_shapes=[
            *4 * [pltpu.VMEM(*parted(dtype, G, C, W))],
            pltpu.VMEM((G, H, C), dtype),
            *2 * [pltpu.VMEM((G, C, W), jnp.float32)],
            pltpu.VMEM((len(span), G, H, C), jnp.float32),
        ],
        interpret=interpret,
    )(*inputs)


def _blocks(heads: Heads, C: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Return how programs take blocks of queries and of keys out of [B, T, M], and of queries' numbers [B, X, G, T]."""
    shape = (1, C, heads.together * heads.dim)
    return (
        pl.BlockSpec(shape, lambda b, x, p, pairs, slopes: (b, pairs[0, p], x)),
        pl.BlockSpec(shape, lambda b, x, p, pairs, slopes: (b, pairs[1, p], x)),
        pl.BlockSpec((1, 1, heads.together, C), lambda b, x, p, pairs, slopes: (b, x, 0, pairs[0, p])),
    )


def _pairs(num_blocks: int, *, first: int = 0, by_keys: bool = False) -> np.ndarray:
    """Return the blocks (of queries from `first` on, of keys) up to the diagonal, int32 [2, P], in order of visits.

    By queries: the keys of a block of queries from the first to its own. By keys: the queries of a block of keys from
    its own to the last, so that a block of queries meets its own keys last of all.
    """
    pairs = [(i, j) for i in range(first, num_blocks) for j in range(i + 1)]
    return np.asarray(sorted(pairs, key=lambda pair: pair[::-1]) if by_keys else pairs, np.int32).T


def _call(kernel, pairs_2P: np.ndarray, *, name: str, grid, in_specs, out_specs, out_shape, scratch_shapes, interpret):
    needed = sum(2 * 4 * math.prod(spec.block_shape) for spec in (*in_specs, *out_specs))
    needed += sum(ref.dtype.itemsize * math.prod(ref.shape) for ref in scratch_shapes)
    compiled = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*grid, pairs_2P.shape[1]),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=16 * _MIB if device_kind() in SMALL else max(16 * _MIB, min(needed + 8 * _MIB, 60 * _MIB)),
        ),
        interpret=interpret,
        name=name,
    )
    return functools.partial(compiled, jnp.asarray(pairs_2P))


def _room() -> int:
    """Return the bytes of vector memory that may hold something of every position."""
    return (4 if device_kind() in SMALL else 28) * _MIB
