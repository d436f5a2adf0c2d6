"""Causal attention with ALiBi for TPUs: kernels of our own, which take q, k and v as the projections write them.

Several heads lie side by side in the lanes of [batch, length, heads x head dim], which no head of 80 lanes divides into
tiles of 128. A program of the kernels (tpu_kernels.py) reads whole tiles of as many heads as fill them and parts the
heads in vector memory, so that nothing is padded, transposed or copied in HBM. Blocks above the diagonal are not
visited; the backward pass computes the scores once for all three gradients (FlashAttention, arXiv:2205.14135, appendix
B.4). Off a TPU, Pallas interprets the kernels: slow, the same arithmetic.

A head computes nothing for blocks of keys that ALiBi puts out of its reach. That follows, sequence by sequence, from
the largest norms of its queries and keys: what is left out of a row has, all weights together, less than half a unit in
float32's last place, whatever q and k are.

Letters beside the house's: S pieces of the length, A = S x B, G heads of one program, M = heads x head dim, X groups of
heads, C positions of a block, P pairs of blocks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from btlm_jax.attention.alibi_lanes import TILE, lanes_of_heads, named, whole_tiles
from btlm_jax.attention.alibi_window import largest_spread, reach
from btlm_jax.attention.tpu_kernels import Heads, backward_kernel, forward_kernel, parted
from btlm_jax.attention.ulysses import exchanged, in_pieces, joined
from btlm_jax.parallel.mesh import Axes, device_kind

FORWARD, BACKWARD = "alibi_forward", "alibi_backward"  # the kernels' names in a compiled program
SMALL = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of vector memory a core; later ones have 64 or more
_MIB = 1 << 20


def attend_tpu(
    q_SBTM: jax.Array,
    k_SBTM: jax.Array,
    v_SBTM: jax.Array,
    slopes_N: jax.Array,
    *,
    scale: float,
    axes: Axes,
    interpret: bool,
) -> jax.Array:
    """Attend in the kernels (same mathematics as `attend_reference`); products take operands in q's dtype.

    The length lies in S pieces one after the other, as `positions_for_heads` over the mesh axes leaves it; the output
    has been exchanged back (exchange.py), and so it is saved: its projection needs it that way.
    """
    how = _How(
        heads=Heads(
            num=slopes_N.shape[0],
            dim=q_SBTM.shape[3] // slopes_N.shape[0],
            scale=scale,
            itemsize=q_SBTM.dtype.itemsize,
        ),
        axes=axes,
        interpret=interpret,
    )
    return _attend(how, *named(q_SBTM, k_SBTM, v_SBTM), slopes_N)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How:
    """What the custom rule needs to know beside arrays."""

    heads: Heads
    axes: Axes
    interpret: bool

    def num_pieces(self, x_SBTM: jax.Array) -> int:
        """Return S, or 1 where kernels cannot take pieces: a block must lie in one, and all gradients fit at once."""
        S, _, T, _ = x_SBTM.shape
        size = block_size(self.heads, T)
        fits = _queries_at_once(self.heads, S * T, size) * size >= S * T
        return S if T % TILE == 0 and fits else 1

    def reach(self, q_SBTM: jax.Array, k_SBTM: jax.Array, slopes_N: jax.Array) -> jax.Array:
        """Return how far back the heads of each sequence see, whole positions int32 [B, N]."""
        spread_BN = largest_spread(q_SBTM, k_SBTM, num_heads=self.heads.num, scale=self.heads.scale)
        reach_BN, length = reach(spread_BN, slopes_N), q_SBTM.shape[0] * q_SBTM.shape[2]
        # What is not finite fails the comparison, and sees everything.
        return jnp.where(reach_BN < length, reach_BN, length).astype(jnp.int32)

    def arranged(self, x_SBTM: jax.Array) -> jax.Array:
        """Return what the kernels take, x_ATM."""
        S, B, T, M = x_SBTM.shape
        x_ATM = joined(x_SBTM) if self.num_pieces(x_SBTM) < S else x_SBTM.reshape(S * B, T, M)
        # Padding comes last: no real query sees its keys, and its outputs are cut off.
        padding = -x_ATM.shape[1] % block_size(self.heads, x_ATM.shape[1])
        return jnp.pad(x_ATM, ((0, 0), (0, padding), (0, 0)))

    def restored(self, x_ATM: jax.Array, like_SBTM: jax.Array) -> jax.Array:
        """Undo `arranged`."""
        S, B, T, M = like_SBTM.shape
        if self.num_pieces(like_SBTM) < S:
            return in_pieces(x_ATM[:, : S * T], S)
        return x_ATM[:, :T].reshape(S, B, T, M)


def block_size(heads: Heads, length: int) -> int:
    """Return how many positions a block of the kernels holds: whole tiles, that make up a length of whole tiles."""
    most, room = (256, _MIB // 2) if device_kind() in SMALL else (512, 2 * _MIB)
    while most > TILE and most * heads.together * heads.width * heads.itemsize > room:
        most //= 2
    size = min(most, whole_tiles(length))
    while length % TILE == 0 and length % size:
        size -= TILE
    return size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q_SBTM, k_SBTM, v_SBTM, slopes_N):
    return _attend_forward(how, q_SBTM, k_SBTM, v_SBTM, slopes_N)[0]


def _attend_forward(how: _How, q_SBTM, k_SBTM, v_SBTM, slopes_N):
    qkv_ATM = map(how.arranged, (q_SBTM, k_SBTM, v_SBTM))
    reach_BN = checkpoint_name(how.reach(q_SBTM, k_SBTM, slopes_N), "attention_reach")
    o_ATM, lse_AXGT = _forward(how.heads, how.num_pieces(q_SBTM), slopes_N, reach_BN, *qkv_ATM, how.interpret)
    o_SBTM = checkpoint_name(exchanged(how.restored(o_ATM, q_SBTM), how.axes), "attention_out")
    lse_AXGT = checkpoint_name(lse_AXGT, "attention_lse")
    return o_SBTM, (q_SBTM, k_SBTM, v_SBTM, slopes_N, reach_BN, o_SBTM, lse_AXGT)


def _attend_backward(how: _How, residuals, do_SBTM):
    q_SBTM, k_SBTM, v_SBTM, slopes_N, reach_BN, o_SBTM, lse_AXGT = residuals
    is_of_head_NM = lanes_of_heads(how.heads.num, how.heads.dim)
    product_SBTM = do_SBTM.astype(jnp.float32) * o_SBTM.astype(jnp.float32)
    # A product of two bfloat16 has 16 bits, which three passes hold as six do.
    precision = "high" if do_SBTM.dtype == o_SBTM.dtype == jnp.bfloat16 else "highest"
    delta_SBNT = jnp.einsum("SBTM,NM->SBNT", product_SBTM, is_of_head_NM, precision=precision)
    delta_SBTN = exchanged(delta_SBNT, how.axes).swapaxes(2, 3)
    delta_AXGT = how.arranged(delta_SBTN).swapaxes(1, 2).reshape(lse_AXGT.shape)
    qkvdo_ATM = map(how.arranged, (q_SBTM, k_SBTM, v_SBTM, exchanged(do_SBTM, how.axes)))
    inputs = slopes_N, reach_BN, *qkvdo_ATM, lse_AXGT, delta_AXGT
    gradients_ATM = _backward(how.heads, how.num_pieces(q_SBTM), inputs, how.interpret)
    return *(how.restored(x_ATM, q_SBTM) for x_ATM in gradients_ATM), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(heads: Heads, S: int, slopes_N, reach_BN, q_ATM, k_ATM, v_ATM, interpret: bool):
    (A, T, M), dtype = q_ATM.shape, q_ATM.dtype
    G, H, C = heads.together, heads.dim, block_size(heads, T)
    # Parted keys and values stay in vector memory for the queries to come, where there is room for all.
    kept = S * T // C if S * T * G * (heads.width + H) * dtype.itemsize <= _room() else 1
    queries, keys, rows = _blocks(heads, A // S, T // C, C)
    return _call(
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
    )(slopes_N, reach_BN, q_ATM, k_ATM, v_ATM)


def _backward(heads: Heads, S: int, inputs: tuple, interpret: bool):
    """Return dq, dk and dv in as many spans of queries as vector memory needs; S > 1 pieces only in one."""
    T, dtype = inputs[2].shape[1], inputs[2].dtype
    num_blocks = S * T // block_size(heads, T)
    num_queries = _queries_at_once(heads, S * T, block_size(heads, T))
    spans = [
        _differentiate(heads, S, range(first, min(first + num_queries, num_blocks)), inputs, interpret)
        for first in range(0, num_blocks, num_queries)
    ]

    def total(parts):  # of keys that a span sees: those up to its end
        whole = [jnp.pad(part, ((0, 0), (0, T - part.shape[1]), (0, 0))) for part in parts]
        return functools.reduce(jnp.add, whole).astype(dtype)

    dq_ATM = jnp.concatenate([dq for dq, _, _ in spans], axis=1)
    return dq_ATM, total([dk for _, dk, _ in spans]), total([dv for _, _, dv in spans])


def _queries_at_once(heads: Heads, length: int, size: int) -> int:
    """Return the gradients of how many blocks of `size` queries fit into vector memory at a time."""
    return max(1, min(length // size, _room() // (size * heads.together * heads.dim * 4)))


def _differentiate(heads: Heads, S: int, span: range, inputs: tuple, interpret: bool):
    """Return dq of the blocks of queries in `span`, and their part of dk and dv of the keys that they see."""
    (A, T, M), dtype = inputs[2].shape, inputs[2].dtype
    G, H, W, C = heads.together, heads.dim, heads.width, block_size(heads, T)
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
        def at(b, x, p, pairs, *_):
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
            num_scalar_prefetch=3,
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
