"""Causal attention with ALiBi for TPUs: Pallas kernels that take q, k and v as the projections write them.

Heads are side by side in the last dim of [batch, length, heads x head dim]. A head of 80 lanes does not divide into
tiles of 128, so a program of the kernels (tpu_kernels.py) reads whole tiles of as many heads as fill them, and splits
the heads in vector memory (VMEM): nothing is padded, transposed or copied in HBM. Blocks above the diagonal are not
visited. The backward pass computes the scores once for all three gradients (FlashAttention, arXiv:2205.14135, appendix
B.4). Off a TPU, Pallas interprets the kernels: slow, the same arithmetic.

A head computes nothing for blocks of keys beyond its window (alibi.py), which follows, sequence by sequence, from the
largest norms of its queries and keys. Nor for blocks of other documents, whose keys and queries are not read either.

Letters beside the house's: S pieces of the length, A = S x B, G heads of one program, M = heads x head dim, X groups of
heads, C positions of a block, P pairs of blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from btlm_jax.attention import remat_names
from btlm_jax.attention.alibi import CENTRE_KEYS, centre_of, window_of
from btlm_jax.attention.alibi_lanes import head_of_lane, whole_tiles
from btlm_jax.attention.tpu_kernels import Documents, Heads, backward_kernel, forward_kernel, scratch_of_split_heads
from btlm_jax.attention.ulysses import all_to_all, heads_to_seq, merge_pieces, seq_to_heads, split_pieces
from btlm_jax.parallel.mesh import TPU_LANES, Axes, device_kind

FORWARD, BACKWARD = "alibi_forward", "alibi_backward"  # the kernels' names in a compiled program
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Limits:
    """What a program may take of a core's vector memory.

    Chosen so that the shapes of tests/attention/test_attention_tpu.py compile with libtpu 0.0.42, which refuses a
    kernel that needs too much: run that test after a change. Larger blocks also compute more of the masked triangle,
    smaller spans of queries take more instruction bundles (LOG.md, 2026-11-26). The backward kernel takes as many
    queries at once as `_fits_vmem` says: blocks and scratch in whole tiles, which is what libtpu needs to within a MiB
    (LOG.md, 2026-11-29).
    """

    block_positions: int  # most positions of a block
    block_bytes: int  # most bytes of a block of split heads: positions x heads of a program x padded head dim
    resident_bytes: int  # most bytes of an array that holds something of every position
    vmem_bytes: int  # most bytes that a kernel asks for
    stack_bytes: int  # of those, for what the compiler puts there beside blocks and scratch


_SMALL_VMEM_CHIPS = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of vector memory a core; later chips have 64 or more
_SMALL_VMEM = _Limits(
    block_positions=256, block_bytes=_MIB // 2, resident_bytes=4 * _MIB, vmem_bytes=16 * _MIB, stack_bytes=_MIB
)
_LARGE_VMEM = _Limits(
    block_positions=512, block_bytes=2 * _MIB, resident_bytes=28 * _MIB, vmem_bytes=60 * _MIB, stack_bytes=2 * _MIB
)
_DEFAULT_VMEM_BYTES = 16 * _MIB  # what a kernel gets that asks for nothing
_COMPILER_VMEM_BYTES = 8 * _MIB  # for what the compiler puts there beside blocks and scratch


def _limits() -> _Limits:
    return _SMALL_VMEM if device_kind() in _SMALL_VMEM_CHIPS else _LARGE_VMEM


def attend_tpu(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    slopes_N: jax.Array,
    starts_BT: jax.Array | None,
    *,
    scale: float,
    length_axes: Axes,
    interpret: bool,
) -> jax.Array:
    """Attend in the kernels (same mathematics as `attend_reference`); products take operands in q's dtype.

    `slopes_N` are those of the heads that this device has once the length, sharded over `length_axes`, has been
    exchanged for heads. Pieces go into the kernels as they come. The output is saved for the backward pass as it has
    been exchanged back, because its projection needs it that way: one exchange fewer.

    Raises:
      ValueError: so many heads do not fit the vector memory.
    """
    head_dim = q_BTNH.shape[-1]
    if not interpret and not has_kernels_for(slopes_N.shape[0], head_dim, q_BTNH.dtype):
        raise ValueError(
            f"{slopes_N.shape[0]} heads of {head_dim} a device in {q_BTNH.dtype} do not fit the vector memory of a "
            f"{device_kind()}: give --config.model.attention=auto, which takes splash, or split the heads more ways"
        )
    q_SBTM, k_SBTM, v_SBTM = (seq_to_heads(x, length_axes) for x in (q_BTNH, k_BTNH, v_BTNH))
    config = _KernelConfig(
        heads=Heads(
            num=slopes_N.shape[0],
            dim=q_SBTM.shape[3] // slopes_N.shape[0],
            scale=scale,
            itemsize=q_SBTM.dtype.itemsize,
        ),
        axes=length_axes,
        interpret=interpret,
    )
    o_SBTM = _attend(config, *remat_names.with_checkpoint_names(q_SBTM, k_SBTM, v_SBTM), slopes_N, starts_BT)
    return heads_to_seq(cast(jax.Array, o_SBTM), head_dim=head_dim)  # functools.partial hides custom_vjp's type


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KernelConfig:
    """What the custom gradient needs to know beside arrays."""

    heads: Heads
    axes: Axes
    interpret: bool

    def num_pieces(self, x_SBTM: jax.Array) -> int:
        """Return S where the kernels read pieces in place, else 1: the pieces are then merged, by a copy.

        In place, a block lies within one piece (T % 128 == 0), and dq of all queries fits into vector memory at once:
        S * T * G * H * 4 bytes <= resident_bytes, in whole blocks.
        """
        S, _, T, _ = x_SBTM.shape
        size = block_size(self.heads, T)
        fits = _queries_at_once(self.heads, S * T, size) * size >= S * T
        return S if T % TPU_LANES == 0 and fits else 1

    def window(self, q_SBTM: jax.Array, k_SBTM: jax.Array, slopes_N: jax.Array) -> jax.Array:
        """Return the largest distance at which the heads of each sequence see keys, int32 [B, N]."""
        head_of_lane_NM = head_of_lane(self.heads.num, self.heads.dim).astype(q_SBTM.dtype)

        def largest_square(x_SBTM):
            square_SBNT = jnp.einsum(
                "SBTM,NM->SBNT", x_SBTM * x_SBTM, head_of_lane_NM, preferred_element_type=jnp.float32
            )
            return square_SBNT.max((0, 3))

        return window_of(
            q_SBTM,
            k_SBTM,
            slopes_N,
            scale=self.heads.scale,
            length=q_SBTM.shape[0] * q_SBTM.shape[2],
            centre=centre_of(k_SBTM[:1, :, :CENTRE_KEYS], positions=(0, 2)),
            largest_square=largest_square,
        )

    def to_kernel_layout(self, x_SBTM: jax.Array) -> jax.Array:
        """Return what the kernels take, x_ATM: pieces in place or merged, padded to whole blocks."""
        S, B, T, M = x_SBTM.shape
        x_ATM = merge_pieces(x_SBTM) if self.num_pieces(x_SBTM) < S else x_SBTM.reshape(S * B, T, M)
        # Padding comes last: no real query sees its keys, and its outputs are cut off.
        padding = -x_ATM.shape[1] % block_size(self.heads, x_ATM.shape[1])
        return jnp.pad(x_ATM, ((0, 0), (0, padding), (0, 0)))

    def from_kernel_layout(self, x_ATM: jax.Array, like_SBTM: jax.Array) -> jax.Array:
        """Undo `to_kernel_layout`."""
        S, B, T, M = like_SBTM.shape
        if self.num_pieces(like_SBTM) < S:
            return split_pieces(x_ATM[:, : S * T], S)
        return x_ATM[:, :T].reshape(S, B, T, M)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DocumentsOfBlocks:
    """Where documents begin, for blocks of C positions, X in all."""

    starts_B1T: jax.Array  # int32, of each position: T in whole blocks
    of_blocks_B3X: jax.Array  # int32, of each block: see Documents

    def nearest_keys(self, pair, b, of_blocks_ref):
        """Return a pair of blocks (of queries, of keys) with keys that the queries see, for what is not visited."""
        return pair[0], jnp.maximum(pair[1], of_blocks_ref[b, 0, pair[0]] // self.block)

    def nearest_queries(self, pair, b, of_blocks_ref):
        """Return a pair of blocks (of queries, of keys) with queries that see the keys, for what is not visited."""
        return jnp.minimum(pair[0], of_blocks_ref[b, 2, pair[1]]), pair[1]

    @property
    def block(self) -> int:
        return self.starts_B1T.shape[2] // self.of_blocks_B3X.shape[2]


def _documents_of_blocks(starts_BT: jax.Array | None, length: int, block: int) -> _DocumentsOfBlocks | None:
    """Return the documents of sequences padded to `length`; padding is a document of its own."""
    if starts_BT is None:
        return None
    T = starts_BT.shape[1]
    starts_BT = jnp.pad(starts_BT, ((0, 0), (0, length - T)), constant_values=T)
    stop_X = block * (1 + jnp.arange(length // block))
    num_queries_BX = (starts_BT[:, None] < stop_X[None, :, None]).sum(-1, dtype=jnp.int32)  # that see a key before it
    of_blocks_B3X = jnp.stack(
        [starts_BT[:, ::block], starts_BT[:, block - 1 :: block], (num_queries_BX - 1) // block], axis=1
    )
    return _DocumentsOfBlocks(starts_B1T=starts_BT[:, None], of_blocks_B3X=of_blocks_B3X)


def block_size(heads: Heads, length: int) -> int:
    """Return how many positions a block of the kernels has: whole tiles, that divide a length of whole tiles."""
    limits = _limits()

    def is_too_large(size: int) -> bool:
        split = size * heads.together * heads.width * heads.itemsize
        return split > limits.block_bytes or not _fits_vmem(heads, size, num_queries=1, is_whole=False)

    most = limits.block_positions
    while most > TPU_LANES and is_too_large(most):
        most //= 2
    size = min(most, whole_tiles(length))
    while length % TPU_LANES == 0 and length % size:
        size -= TPU_LANES
    return size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: _KernelConfig, q_SBTM, k_SBTM, v_SBTM, slopes_N, starts_BT):
    return _attend_forward(config, q_SBTM, k_SBTM, v_SBTM, slopes_N, starts_BT)[0]


def _attend_forward(config: _KernelConfig, q_SBTM, k_SBTM, v_SBTM, slopes_N, starts_BT):
    window_BN = checkpoint_name(config.window(q_SBTM, k_SBTM, slopes_N), remat_names.WINDOW)
    q_ATM, k_ATM, v_ATM = map(config.to_kernel_layout, (q_SBTM, k_SBTM, v_SBTM))
    S = config.num_pieces(q_SBTM)
    inputs = slopes_N, window_BN, q_ATM, k_ATM, v_ATM
    o_ATM, lse_AXGT = _forward(config.heads, S, starts_BT, inputs, config.interpret)
    o_SBTM = checkpoint_name(all_to_all(config.from_kernel_layout(o_ATM, q_SBTM), config.axes), remat_names.OUTPUT)
    lse_AXGT = checkpoint_name(lse_AXGT, remat_names.LOG_SUM_EXP)
    return o_SBTM, (q_SBTM, k_SBTM, v_SBTM, slopes_N, starts_BT, window_BN, o_SBTM, lse_AXGT)


def _attend_backward(config: _KernelConfig, residuals, do_SBTM):
    q_SBTM, k_SBTM, v_SBTM, slopes_N, starts_BT, window_BN, o_SBTM, lse_AXGT = residuals
    head_of_lane_NM = head_of_lane(config.heads.num, config.heads.dim)
    product_SBTM = do_SBTM.astype(jnp.float32) * o_SBTM.astype(jnp.float32)
    # A product of two bfloat16 has 16 bits, which three passes hold as six do.
    precision = "high" if do_SBTM.dtype == o_SBTM.dtype == jnp.bfloat16 else "highest"
    delta_SBNT = jnp.einsum("SBTM,NM->SBNT", product_SBTM, head_of_lane_NM, precision=precision)
    delta_SBTN = all_to_all(delta_SBNT, config.axes).swapaxes(2, 3)
    delta_AXGT = config.to_kernel_layout(delta_SBTN).swapaxes(1, 2).reshape(lse_AXGT.shape)
    qkvdo_ATM = map(config.to_kernel_layout, (q_SBTM, k_SBTM, v_SBTM, all_to_all(do_SBTM, config.axes)))
    inputs = slopes_N, window_BN, *qkvdo_ATM, lse_AXGT, delta_AXGT
    gradients_ATM = _backward(config.heads, config.num_pieces(q_SBTM), starts_BT, inputs, config.interpret)
    return *(config.from_kernel_layout(x_ATM, q_SBTM) for x_ATM in gradients_ATM), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(heads: Heads, S: int, starts_BT, inputs: tuple, interpret: bool):
    (A, T, M), dtype = inputs[2].shape, inputs[2].dtype
    G, H, C = heads.together, heads.dim, block_size(heads, T)
    # Split keys and values stay in vector memory for the queries to come where those of all positions fit.
    fits = S * T * G * (heads.width + H) * dtype.itemsize <= _limits().resident_bytes
    num_resident = S * T // C if fits else 1
    documents = _documents_of_blocks(starts_BT, S * T, C)
    queries, keys, rows = _blocks(heads, A // S, T // C, C, nearest=documents and documents.nearest_keys)
    return _call(
        functools.partial(forward_kernel, heads=heads),
        _pairs(S * T // C),
        documents,
        name=FORWARD,
        grid=(A // S, heads.num // G),
        in_specs=[queries, queries, queries] if num_resident > 1 else [queries, keys, keys],
        out_specs=[queries, rows],
        out_shape=[
            jax.ShapeDtypeStruct((A, T, M), dtype),
            jax.ShapeDtypeStruct((A, heads.num // G, G, T), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM(*scratch_of_split_heads(dtype, G, C, heads.width)),
            pltpu.VMEM(*scratch_of_split_heads(dtype, num_resident, G, C, heads.width)),
            pltpu.VMEM((num_resident, G, H, C), dtype),
            *2 * [pltpu.VMEM((G, 1, C), jnp.float32)],
            pltpu.VMEM((G, H, C), jnp.float32),
        ],
        interpret=interpret,
    )(*inputs)


def _backward(heads: Heads, S: int, starts_BT, inputs: tuple, interpret: bool):
    """Return dq, dk and dv, computed in as many spans of queries as vector memory needs: one span where S > 1."""
    T, dtype = inputs[2].shape[1], inputs[2].dtype
    num_blocks = S * T // block_size(heads, T)
    num_queries = _queries_at_once(heads, S * T, block_size(heads, T))
    documents = _documents_of_blocks(starts_BT, S * T, block_size(heads, T))
    spans = [
        _differentiate(heads, S, range(first, min(first + num_queries, num_blocks)), documents, inputs, interpret)
        for first in range(0, num_blocks, num_queries)
    ]

    def total(parts):  # each of the keys that a span sees: those up to its end
        whole = [jnp.pad(part, ((0, 0), (0, T - part.shape[1]), (0, 0))) for part in parts]
        return functools.reduce(jnp.add, whole).astype(dtype)

    dq_ATM = jnp.concatenate([dq for dq, _, _ in spans], axis=1)
    return dq_ATM, total([dk for _, dk, _ in spans]), total([dv for _, _, dv in spans])


def has_kernels_for(num_heads: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the smallest blocks of a device's heads fit into vector memory: not of many that together fill no tiles.

    On a TPU v4 that is so from 32 heads of 100 on, in float32 from 16 of 72 on; later TPUs take all of `btlm new`.
    """
    heads = Heads(num=num_heads, dim=head_dim, scale=1.0, itemsize=jnp.dtype(dtype).itemsize)
    return _fits_vmem(heads, TPU_LANES, num_queries=1, is_whole=False)


def _queries_at_once(heads: Heads, length: int, size: int) -> int:
    """Return for how many blocks of `size` queries a float32 dq fits into vector memory at a time."""
    num = min(length // size, _limits().resident_bytes // (size * heads.together * heads.dim * 4))
    while num > 1 and not _fits_vmem(heads, size, num_queries=num, is_whole=num == length // size):
        num -= 1
    return max(1, num)


def _fits_vmem(heads: Heads, size: int, *, num_queries: int, is_whole: bool) -> bool:
    """Whether the backward kernel, which needs more than the forward one, fits with `num_queries` blocks at once.

    `is_whole`: those are all queries, so that dk and dv are no partial sums, which are float32.
    """
    G, H, W, C, itemsize = heads.together, heads.dim, heads.width, size, heads.itemsize
    scratch = 4 * _padded_bytes(G, C, W, itemsize=itemsize) + _padded_bytes(G, H, C, itemsize=itemsize)
    scratch += 2 * _padded_bytes(G, C, W, itemsize=4) + num_queries * _padded_bytes(G, H, C, itemsize=4)
    blocks = 5 * _padded_bytes(C, G * H, itemsize=itemsize)  # q, k, v, do and dq
    blocks += 2 * _padded_bytes(C, G * H, itemsize=itemsize if is_whole else 4)
    blocks += 2 * _padded_bytes(G, C, itemsize=4) + _padded_bytes(1, C, itemsize=4)  # rows, starts of documents
    limits = _limits()
    return scratch + 2 * blocks + limits.stack_bytes <= limits.vmem_bytes


def _padded_bytes(*shape: int, itemsize: int) -> int:
    """Return what an array takes in vector memory: whole tiles of its last two dims."""
    rows = 8 * 4 // itemsize
    return math.prod(shape[:-2]) * -(-shape[-2] // rows) * rows * whole_tiles(shape[-1]) * itemsize


def _differentiate(
    heads: Heads, S: int, span: range, documents: _DocumentsOfBlocks | None, inputs: tuple, interpret: bool
):
    """Return dq of the blocks of queries in `span`, and what those add to dk and dv of the keys that they see."""
    (A, T, M), dtype = inputs[2].shape, inputs[2].dtype
    G, H, W, C = heads.together, heads.dim, heads.width, block_size(heads, T)
    queries, keys, rows = _blocks(heads, A // S, T // C, C, nearest=documents and documents.nearest_queries)
    of_span, *_ = _blocks(heads, A // S, T // C, C, lambda pair: jnp.maximum(pair[1] - span.start, 0))
    partial = dtype if len(span) == S * T // C else jnp.float32

    def result(num_blocks: int, dtype):
        return jax.ShapeDtypeStruct((A, num_blocks * C // S, M), dtype)

    return _call(
        functools.partial(backward_kernel, heads=heads, span=span),
        _pairs(span.stop, first=span.start, by_keys=True),
        documents,
        name=BACKWARD,
        grid=(A // S, heads.num // G),
        in_specs=[queries, keys, keys, queries, rows, rows],
        out_specs=[of_span, keys, keys],
        out_shape=[result(len(span), dtype), result(span.stop, partial), result(span.stop, partial)],
        scratch_shapes=[
            *4 * [pltpu.VMEM(*scratch_of_split_heads(dtype, G, C, W))],
            pltpu.VMEM((G, H, C), dtype),
            *2 * [pltpu.VMEM((G, C, W), jnp.float32)],
            pltpu.VMEM((len(span), G, H, C), jnp.float32),
        ],
        interpret=interpret,
    )(*inputs)


def _blocks(
    heads: Heads, B: int, num: int, size: int, query=lambda pair: pair[0], *, nearest: Callable | None = None
) -> tuple[pl.BlockSpec, ...]:
    """Return the specs of a block of queries, of keys, and of rows per query (log-sum-exp, delta).

    `num` blocks make up a piece; `query` chooses the block of queries of a pair (of queries, of keys). `nearest` has a
    pair that is not visited, because its documents differ, read the same blocks as one that is: so nothing is read.
    """

    def index_map(choose):
        def index(b, x, p, pairs, *prefetched):
            pair = pairs[0, p], pairs[1, p]
            block = choose(pair if nearest is None else nearest(pair, b, prefetched[-1]))
            return block // num * B + b, block % num, x

        return index

    def row_index(*indices):
        a, block, x = index_map(query)(*indices)
        return a, x, 0, block

    shape = (1, size, heads.together * heads.dim)
    return (
        pl.BlockSpec(shape, index_map(query)),
        pl.BlockSpec(shape, index_map(lambda pair: pair[1])),
        pl.BlockSpec((1, 1, heads.together, size), row_index),
    )


def _pairs(num_blocks: int, *, first: int = 0, by_keys: bool = False) -> np.ndarray:
    """Return the blocks (of queries from `first` on, of keys) up to the diagonal, int32 [2, P], in order of visits.

    By queries: the keys of a block of queries from the first to its own. By keys: the queries of a block of keys from
    its own to the last, so that a block of queries meets its own keys last of all.
    """
    pairs = [(i, j) for i in range(first, num_blocks) for j in range(i + 1)]
    return np.asarray(sorted(pairs, key=lambda pair: pair[::-1]) if by_keys else pairs, np.int32).T


def _call(
    kernel: Callable,
    pairs_2P: np.ndarray,
    documents: _DocumentsOfBlocks | None,
    *,
    name: str,
    grid,
    in_specs,
    out_specs,
    out_shape,
    scratch_shapes,
    interpret,
) -> Callable:
    """Return the kernel as a function of arrays, run for every pair of blocks at each point of `grid`.

    The arrays are slopes_N, window_BN, which kernels read as scalars, and those of `in_specs`.
    """
    # Blocks are double-buffered; every number is counted as 4 bytes.
    if documents:
        in_specs = [pl.BlockSpec((1, 1, documents.block), lambda b, x, p, pairs, *_: (b, 0, pairs[0, p])), *in_specs]
    needed = sum(2 * 4 * math.prod(spec.block_shape) for spec in (*in_specs, *out_specs))
    needed += sum(ref.dtype.itemsize * math.prod(ref.shape) for ref in scratch_shapes)
    vmem_bytes = max(_DEFAULT_VMEM_BYTES, min(needed + _COMPILER_VMEM_BYTES, _limits().vmem_bytes))
    compiled = pl.pallas_call(
        _with_documents(kernel) if documents else functools.partial(kernel, None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4 if documents else 3,
            grid=(*grid, pairs_2P.shape[1]),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpret,
        name=name,
    )

    def run(slopes_N, window_BN, *arrays):
        scalars = jnp.asarray(pairs_2P), slopes_N, window_BN
        if documents is None:
            return compiled(*scalars, *arrays)
        return compiled(*scalars, documents.of_blocks_B3X, documents.starts_B1T, *arrays)

    return run


def _with_documents(kernel: Callable) -> Callable:
    """Return a kernel whose fourth and fifth arguments are its first, Documents."""

    def run(pairs_ref, slopes_ref, window_ref, of_blocks_ref, starts_ref, *refs):
        kernel(Documents(of_blocks_ref=of_blocks_ref, starts_ref=starts_ref), pairs_ref, slopes_ref, window_ref, *refs)

    return run
