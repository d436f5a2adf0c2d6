"""Causal attention with ALiBi for TPUs: kernels of our own, which take q, k and v as the projections write them.

Several heads lie side by side in the lanes of [batch, length, heads x head dim], which no head of 80 lanes divides into
tiles of 128. A program of the kernels (tpu_kernels.py) reads whole tiles of as many heads as fill them and parts the
heads in vector memory, so that nothing is padded, transposed or copied in HBM. Blocks above the diagonal are not
visited; the backward pass computes the scores once for all three gradients (FlashAttention, arXiv:2205.14135, appendix
B.4). Off a TPU, Pallas interprets the kernels: slow, the same arithmetic.

Letters beside the house's: S pieces of the length, A = S x B, G heads of one program, M = heads x head dim, X groups of
heads, C positions of a block, P pairs of blocks.
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
    q_SBTM: jax.Array, k_SBTM: jax.Array, v_SBTM: jax.Array, slopes_N: jax.Array, *, scale: float, interpret: bool
) -> jax.Array:
    """Attend in the kernels (same mathematics as `attend_reference`); products take operands in q's dtype.

    The length lies in S pieces one after the other, as exchanges between devices leave it (exchange.py).
    """
    S, B, T, M = q_SBTM.shape
    heads = Heads(num=slopes_N.shape[0], dim=M // slopes_N.shape[0], scale=scale)
    if S > 1 and (T % TILE or _queries_at_once(heads, S * T, block_size(T)) * block_size(T) < S * T):
        o_1BTM = attend_tpu(*map(_joined, (q_SBTM, k_SBTM, v_SBTM)), slopes_N, scale=scale, interpret=interpret)
        return jnp.moveaxis(o_1BTM.reshape(B, S, T, M), 1, 0)

    def padded(x):  # padding comes last: no real query sees its keys, and its outputs are cut off
        return jnp.pad(x.reshape(S * B, T, M), ((0, 0), (0, -T % block_size(T)), (0, 0)))

    o_ATM = _attend(heads, S, interpret, *named(padded(q_SBTM), padded(k_SBTM), padded(v_SBTM)), slopes_N)
    return o_ATM[:, :T].reshape(S, B, T, M)


def _joined(x_SBTM: jax.Array) -> jax.Array:
    S, B, T, M = x_SBTM.shape
    return jnp.moveaxis(x_SBTM, 0, 1).reshape(1, B, S * T, M)


def block_size(length: int) -> int:
    """Return how many positions a block of the kernels holds: whole tiles, that make up a length of whole tiles."""
    size = min(256 if device_kind() in SMALL else 512, -(-length // TILE) * TILE)
    while length % TILE == 0 and length % size:
        size -= TILE
    return size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(heads: Heads, S: int, interpret: bool, q_ATM, k_ATM, v_ATM, slopes_N):
    return _attend_forward(heads, S, interpret, q_ATM, k_ATM, v_ATM, slopes_N)[0]


def _attend_forward(heads: Heads, S: int, interpret: bool, q_ATM, k_ATM, v_ATM, slopes_N):
    (A, T, M), dtype = q_ATM.shape, q_ATM.dtype
    G, H, C = heads.together, heads.dim, block_size(T)
    # Parted keys and values stay in vector memory for the queries to come, where there is room for all.
    kept = S * T // C if S * T * G * (heads.width + H) * dtype.itemsize <= _room() else 1
    queries, keys, rows = _blocks(heads, A // S, T // C, C)
    o_ATM, lse_AXGT = _call(
        functools.partial(forward_kernel, heads=heads),
        _pairs(S * T // C),
        name=FORWARD,
        grid=(A // S, heads.num // G),
        in_specs=[queries, queries, queries] if kept > 1 else [queries, keys, keys],
        out_specs=[queries, rows],
        out_shape=[
            jax.ShapeDtypeStruct((A, T, M), dtype),
            jax.ShapeDtypeStruct((A, heads.num // G, G, T), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM(*parted(dtype, G, C, heads.width)),
            pltpu.VMEM(*parted(dtype, kept, G, C, heads.width)),
            pltpu.VMEM((kept, G, H, C), dtype),
            *2 * [pltpu.VMEM((G, 1, C), jnp.float32)],
            pltpu.VMEM((G, H, C), jnp.float32),
        ],
        interpret=interpret,
    )(slopes_N, q_ATM, k_ATM, v_ATM)
    o_ATM, lse_AXGT = checkpoint_name(o_ATM, "attention_out"), checkpoint_name(lse_AXGT, "attention_lse")
    return o_ATM, (q_ATM, k_ATM, v_ATM, slopes_N, o_ATM, lse_AXGT)


def _attend_backward(heads: Heads, S: int, interpret: bool, residuals, do_ATM):
    q_ATM, k_ATM, v_ATM, slopes_N, o_ATM, lse_AXGT = residuals
    T, C = q_ATM.shape[1], block_size(q_ATM.shape[1])
    num_blocks = S * T // C
    # A product with zeros and ones sums over each head's lanes, where a reshape to heads would move them all.
    is_of_head_NM = np.repeat(np.eye(heads.num, dtype=np.float32), heads.dim, axis=1)
    product_ATM = do_ATM.astype(jnp.float32) * o_ATM.astype(jnp.float32)
    delta_ANT = jnp.einsum("ATM,NM->ANT", product_ATM, is_of_head_NM, precision="highest")
    inputs = slopes_N, q_ATM, k_ATM, v_ATM, do_ATM, lse_AXGT, delta_ANT.reshape(lse_AXGT.shape)
    num_queries = _queries_at_once(heads, S * T, C)
    spans = [
        _differentiate(heads, S, range(first, min(first + num_queries, num_blocks)), inputs, interpret)
        for first in range(0, num_blocks, num_queries)
    ]

    def total(parts):  # of keys that a span sees: those up to its end
        whole = [jnp.pad(part, ((0, 0), (0, T - part.shape[1]), (0, 0))) for part in parts]
        return functools.reduce(jnp.add, whole).astype(q_ATM.dtype)

    dq_ATM = jnp.concatenate([dq for dq, _, _ in spans], axis=1)
    return dq_ATM, total([dk for _, dk, _ in spans]), total([dv for _, _, dv in spans]), None


_attend.defvjp(_attend_forward, _attend_backward)


def _queries_at_once(heads: Heads, length: int, size: int) -> int:
    """Return the gradients of how many blocks of `size` queries fit into vector memory at a time."""
    return max(1, min(length // size, _room() // (size * heads.together * heads.dim * 4)))


def _differentiate(heads: Heads, S: int, span: range, inputs: tuple, interpret: bool):
    """Return dq of the blocks of queries in `span`, and their part of dk and dv of the keys that they see."""
    (A, T, M), dtype = inputs[1].shape, inputs[1].dtype
    G, H, W, C = heads.together, heads.dim, heads.width, block_size(T)
    queries, keys, rows = _blocks(heads, A // S, T // C, C)
    of_span, *_ = _blocks(heads, A // S, T // C, C, lambda pair: jnp.maximum(pair[1] - span.start, 0))
    partial = dtype if len(span) == S * T // C else jnp.float32

    def result(num_blocks: int, dtype):
        return jax.ShapeDtypeStruct((A, num_blocks * C // S, M), dtype)

    return _call(
        functools.partial(backward_kernel, heads=heads, span=span),
        _pairs(span.stop, first=span.start, by_keys=True),
        name=BACKWARD,
        grid=(A // S, heads.num // G),
        in_specs=[queries, keys, keys, queries, rows, rows],
        out_specs=[of_span, keys, keys],
        out_shape=[result(len(span), dtype), result(span.stop, partial), result(span.stop, partial)],
        scratch_shapes=[
            *4 * [pltpu.VMEM(*parted(dtype, G, C, W))],
            pltpu.VMEM((G, H, C), dtype),
            *2 * [pltpu.VMEM((G, C, W), jnp.float32)],
            pltpu.VMEM((len(span), G, H, C), jnp.float32),
        ],
        interpret=interpret,
    )(*inputs)


def _blocks(heads: Heads, B: int, num: int, size: int, query=lambda pair: pair[0]) -> tuple[pl.BlockSpec, ...]:
    """Return how programs take blocks of queries and of keys, `num` in each piece, and what is kept of queries."""

    def place(choose):
        def at(b, x, p, pairs, slopes):
            block = choose((pairs[0, p], pairs[1, p]))
            return block // num * B + b, block % num, x

        return at

    def place_rows(*indices):
        a, block, x = place(query)(*indices)
        return a, x, 0, block

    shape = (1, size, heads.together * heads.dim)
    return (
        pl.BlockSpec(shape, place(query)),
        pl.BlockSpec(shape, place(lambda pair: pair[1])),
        pl.BlockSpec((1, 1, heads.together, size), place_rows),
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
