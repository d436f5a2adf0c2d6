"""What one program of the TPU kernels does: a few heads, one block of queries against one block of keys.

Heads are split without moving a lane: lane l of a block is lane l mod W of its head, so tiles are cut and merged by
masks alone. Products over the head dim do not depend on the order of lanes, which is the same in both operands. Scores
are transposed, [keys, queries]: then maxima and sums run along sublanes, and only the products that give scores and
their gradients need a transposed operand.

A head skips whole blocks of keys beyond its window (alibi.py), and of other documents.

Letters beside the house's: G heads of one program, M their lanes, W the head dim in whole tiles, C positions of a
block, R rows of words (two positions of bfloat16 in each), X blocks that stay in vector memory.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from btlm_jax.attention.alibi_lanes import whole_tiles
from btlm_jax.parallel.mesh import TPU_LANES

MASKED = -1e30  # finite, so that no inf - inf can occur
_PLAIN, _TRANSPOSED = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # a @ b, a @ b.T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of q, k and v, the scale of their scores, and the bytes of a number."""

    num: int
    dim: int
    scale: float
    itemsize: int

    @property
    def together(self) -> int:
        """Return G: the fewest heads that fill whole tiles, or all of them."""
        fill = math.lcm(self.dim, TPU_LANES) // self.dim
        return fill if self.num % fill == 0 else self.num

    @property
    def width(self) -> int:
        """Return W."""
        return whole_tiles(self.dim)

    def lanes(self, n: int) -> range:
        """Return the lanes of head n of a program in its block."""
        return range(n * self.dim, (n + 1) * self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """Where documents begin: `of_blocks_ref` [B, 3, X] as scalars, `starts_ref` [1, 1, C] of a block of queries.

    Of a block, the scalars are the starts of its first and of its last position's documents, and the last block with
    positions of a document that is in it.
    """

    of_blocks_ref: Any
    starts_ref: Any

    def sees(self, b, i, j, *, C: int):
        """Whether any query of block i has a key of its own document in block j."""
        return self.of_blocks_ref[b, 0, i] < (j + 1) * C

    def differ(self, b, i, j, *, C: int):
        """Whether any query of block i must not see a key in block j because of its document."""
        return self.of_blocks_ref[b, 1, i] > j * C

    def is_own(self, j, *, C: int):
        """Return a mask of a block of keys and one of queries: where the key is not before the query's document."""
        return jax.lax.broadcasted_iota(jnp.int32, (C, C), 0) + j * C >= self.starts_ref[0]


def scratch_of_split_heads(dtype: jnp.dtype, *shape: int) -> tuple[tuple[int, ...], jnp.dtype]:
    """Return the shape and dtype of scratch memory for split heads of `shape`, [..., C, W]: as words."""
    if dtype == jnp.bfloat16:
        return (*shape[:-2], shape[-2] // 2, shape[-1]), jnp.dtype(jnp.int32)
    return shape, dtype


def forward_kernel(
    documents: Documents | None, pairs_ref, slopes_ref, window_ref, q_ref, k_ref, v_ref, o_ref, lse_ref,
    q_GRW, k_XGRW, v_XGHC, max_G1C, sum_G1C, o_GHC, *, heads,
):  # fmt: skip
    """Visit keys block by block, with a running maximum of scores and sum of weights (FlashAttention, algorithm 1)."""
    G, C, dtype = q_GRW.shape[0], q_ref.shape[1], q_ref.dtype
    b, group, pair = (pl.program_id(dim) for dim in range(3))
    i, j = pairs_ref[0, pair], pairs_ref[1, pair]
    sees = _sees_block(documents, window_ref, b, group, i, j, G=G, C=C)
    is_resident = k_XGRW.shape[0] > 1
    slot = j if is_resident else 0

    @pl.when(j == 0)
    def begin():
        _split_heads(q_ref, q_GRW, heads)
        max_G1C[...] = jnp.full_like(max_G1C, MASKED)
        sum_G1C[...] = jnp.zeros_like(sum_G1C)
        o_GHC[...] = jnp.zeros_like(o_GHC)

    @pl.when((j == 0) if is_resident else (j <= i))
    def take_keys():
        at = i if is_resident else 0
        _split_heads(k_ref, k_XGRW.at[at], heads)
        v_words = _words(v_ref[0])
        for n in range(G):
            v_XGHC[at, n] = _rows(_from_words(_head(v_words, n, heads), dtype), n, heads)

    def attend(is_diagonal: bool, has_others: bool):
        def attend_head(n):
            slope = slopes_ref[group * G + n]
            offset = slope * ((j - i) * C).astype(jnp.float32)  # of all the block's scores
            q_CW, k_CW = _from_words(q_GRW[n], dtype), _from_words(k_XGRW[slot, n], dtype)
            scores_CC = _scores(k_CW, q_CW, slope, heads)
            if is_diagonal:
                scores_CC = jnp.where(_is_past(C), scores_CC, MASKED)
            if documents is not None and has_others:
                scores_CC = jnp.where(documents.is_own(j, C=C), scores_CC, MASKED)
            old_1C = max_G1C[n]
            new_1C = jnp.maximum(old_1C, scores_CC.max(0, keepdims=True) + offset)
            weights_CC = jnp.exp(scores_CC - (new_1C - offset))
            shrink_1C = jnp.exp(old_1C - new_1C)
            max_G1C[n] = new_1C
            sum_G1C[n] = shrink_1C * sum_G1C[n] + weights_CC.sum(0, keepdims=True)
            o_GHC[n] = shrink_1C * o_GHC[n] + _dot(v_XGHC[slot, n], weights_CC.astype(dtype), _PLAIN)

        _for_each_seeing_head(G, attend_head, sees)

    _for_each_kind_of_block(attend, documents, b, i, j, C=C)

    @pl.when(j == i)
    def end():
        for n in range(G):
            # ALiBi counts from the first query of a block, in the backward pass too: the difference cancels.
            lse_ref[0, 0, n : n + 1] = max_G1C[n] + jnp.log(sum_G1C[n])
        _merge_heads([_lanes(o_GHC[n] * (1.0 / sum_G1C[n]), n, heads) for n in range(G)], o_ref, heads)


def backward_kernel(
    documents: Documents | None, pairs_ref, slopes_ref, window_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref,
    dq_ref, dk_ref, dv_ref,
    q_GRW, k_GRW, v_GRW, do_GRW, k_GHC, dk_GCW, dv_GCW, dq_XGHC, *, heads, span,
):  # fmt: skip
    """Visit the queries of `span` block by block for each block of keys, and sum all three gradients."""
    G, C, dtype = q_GRW.shape[0], q_ref.shape[1], q_ref.dtype
    b, group, pair = (pl.program_id(dim) for dim in range(3))
    i, j = pairs_ref[0, pair], pairs_ref[1, pair]
    sees = _sees_block(documents, window_ref, b, group, i, j, G=G, C=C)

    @pl.when(i == jnp.maximum(j, span.start))
    def begin_keys():
        _split_heads(k_ref, k_GRW, heads)
        _split_heads(v_ref, v_GRW, heads)
        for n in range(G):
            k_GHC[n] = _rows(_from_words(k_GRW[n], dtype), n, heads)

    if span.start:

        @pl.when((i == span.start) & (j < i))
        def begin_sums():
            dk_GCW[...] = jnp.zeros_like(dk_GCW)
            dv_GCW[...] = jnp.zeros_like(dv_GCW)

    @pl.when(j == 0)
    def begin_queries():
        dq_XGHC[i - span.start] = jnp.zeros(dq_XGHC.shape[1:], dq_XGHC.dtype)

    @pl.when(functools.reduce(jnp.logical_or, map(sees, range(G))))
    def take_queries():
        _split_heads(q_ref, q_GRW, heads)
        _split_heads(do_ref, do_GRW, heads)

    def differentiate(is_diagonal: bool, has_others: bool):
        def differentiate_head(n):
            slope = slopes_ref[group * G + n]
            offset = slope * ((j - i) * C).astype(jnp.float32)
            lse_1C, delta_1C = lse_ref[0, 0, pl.ds(n, 1), :], delta_ref[0, 0, pl.ds(n, 1), :]
            q_CW, k_CW, v_CW, do_CW = (_from_words(ref[n], dtype) for ref in (q_GRW, k_GRW, v_GRW, do_GRW))
            weights_CC = jnp.exp(_scores(k_CW, q_CW, slope, heads) - (lse_1C - offset))
            if is_diagonal:
                weights_CC = jnp.where(_is_past(C), weights_CC, 0.0)
            if documents is not None and has_others:
                weights_CC = jnp.where(documents.is_own(j, C=C), weights_CC, 0.0)
            dscores_CC = (weights_CC * (_dot(v_CW, do_CW, _TRANSPOSED) - delta_1C)).astype(dtype)
            dv_CW, dk_CW = _dot(weights_CC.astype(dtype), do_CW, _PLAIN), _dot(dscores_CC, q_CW, _PLAIN)
            # The first queries of a block of keys are those on the diagonal.
            dv_GCW[n] = dv_CW if is_diagonal else dv_GCW[n] + dv_CW
            dk_GCW[n] = dk_CW if is_diagonal else dk_GCW[n] + dk_CW
            dq_XGHC[i - span.start, n] += _dot(k_GHC[n], dscores_CC, _PLAIN)

        _for_each_seeing_head(G, differentiate_head, sees)

    _for_each_kind_of_block(differentiate, documents, b, i, j, C=C)

    @pl.when(i == j)
    def end_queries():
        _merge_heads([_lanes(dq_XGHC[i - span.start, n] * heads.scale, n, heads) for n in range(G)], dq_ref, heads)

    @pl.when(i == span.stop - 1)
    def end_keys():
        _merge_heads([dk_GCW[n] * heads.scale for n in range(G)], dk_ref, heads)
        _merge_heads([dv_GCW[n] for n in range(G)], dv_ref, heads)


def _sees_block(documents: Documents | None, window_ref, b, group, i, j, *, G: int, C: int):
    """Return a predicate: whether any query of block i sees any key of block j in a program's head n."""

    def sees(n):
        is_within = window_ref[b, group * G + n] > (i - j - 1) * C  # the distance of the nearest key less 1
        return is_within if documents is None else is_within & documents.sees(b, i, j, C=C)

    return sees


def _for_each_kind_of_block(visit, documents: Documents | None, b, i, j, *, C: int) -> None:
    """Visit a pair of blocks as what it is: on the diagonal, with keys of others' documents in it, or neither."""
    if documents is None:
        pl.when(j < i)(functools.partial(visit, is_diagonal=False, has_others=False))
    else:
        differ = documents.differ(b, i, j, C=C)
        pl.when((j < i) & ~differ)(functools.partial(visit, is_diagonal=False, has_others=False))
        pl.when((j < i) & differ)(functools.partial(visit, is_diagonal=False, has_others=True))
    pl.when(j == i)(functools.partial(visit, is_diagonal=True, has_others=documents is not None))


def _for_each_seeing_head(num: int, visit, sees) -> None:
    """Visit the heads of a program for which `sees` holds."""

    def step(n, _):
        pl.when(sees(n))(functools.partial(visit, n))

    jax.lax.fori_loop(0, num, step, None)


def _scores(k_CW, q_CW, slope, heads: Heads):
    """Return scale * k . q + slope * (position of the key in its block), float32 [C of keys, C of queries]."""
    position_CX = jax.lax.broadcasted_iota(jnp.int32, (k_CW.shape[0], TPU_LANES), 0).astype(jnp.float32)
    alibi_CC = jnp.tile(slope * position_CX, (1, q_CW.shape[0] // TPU_LANES))
    return _dot(k_CW, q_CW, _TRANSPOSED) * heads.scale + alibi_CC


def _is_past(size: int):
    """Return a mask of a block on the diagonal: where the key does not come after the query."""
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) <= jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _split_heads(ref, heads_GRW, heads: Heads):
    """Write each head of a block to whole tiles of its own, with zeros in the lanes that it does not fill."""
    words_RM = _words(ref[0])
    for n in range(heads_GRW.shape[0]):
        heads_GRW[n] = _head(words_RM, n, heads)


def _head(words_RM, n: int, heads: Heads):
    lanes, num_tiles = heads.lanes(n), heads.width // TPU_LANES
    tiles: dict[int, jax.Array] = {}
    for tile in range(lanes.start // TPU_LANES, -(-lanes.stop // TPU_LANES)):
        x = words_RM[:, tile * TPU_LANES : (tile + 1) * TPU_LANES]
        x = jnp.pad(x, ((0, 0), (0, TPU_LANES - x.shape[1])))
        other = tiles.get(tile % num_tiles)
        tiles[tile % num_tiles] = jnp.where(
            _is_within(x, tile, lanes), x, jnp.zeros_like(x) if other is None else other
        )
    return tiles[0] if num_tiles == 1 else jnp.concatenate([tiles[n] for n in range(num_tiles)], axis=1)


def _merge_heads(heads_CW: list, ref, heads: Heads):
    """Write split heads side by side into a block."""
    words = [_words(head_CW.astype(ref.dtype)) for head_CW in heads_CW]
    for tile in range(-(-ref.shape[-1] // TPU_LANES)):
        first, last = tile * TPU_LANES, min((tile + 1) * TPU_LANES, ref.shape[-1])
        part, merged = first % heads.width, None
        for n, head in enumerate(words):
            lanes = heads.lanes(n)
            if lanes.start < last and lanes.stop > first:
                x = head[:, part : part + TPU_LANES]
                merged = x if merged is None else jnp.where(_is_within(x, tile, lanes), x, merged)
        assert merged is not None  # every tile has lanes of a head
        ref[0, :, first:last] = _from_words(merged, ref.dtype)[:, : last - first]


def _is_within(x, tile: int, lanes: range):
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + tile * TPU_LANES
    return (lane >= lanes.start) & (lane < lanes.stop)


def _rows(x_CW, n: int, heads: Heads):
    """Return a split head as [H, C]."""
    x_WC, start = x_CW.T, heads.lanes(n).start % heads.width
    beyond = start + heads.dim - heads.width
    return x_WC[start : start + heads.dim] if beyond <= 0 else jnp.concatenate([x_WC[start:], x_WC[:beyond]])


def _lanes(x_HC, n: int, heads: Heads):
    """Return a head [H, C] as a split one, [C, W]."""
    start = heads.lanes(n).start % heads.width
    beyond = start + heads.dim - heads.width
    if beyond <= 0:
        return jnp.pad(x_HC, ((start, -beyond), (0, 0))).T
    between = jnp.zeros((start - beyond, x_HC.shape[1]), x_HC.dtype)
    return jnp.concatenate([x_HC[-beyond:], between, x_HC[:-beyond]]).T


def _words(x_CM):
    """Return a block as words of 32 bits, which all TPUs can mask: two rows of bfloat16 in each."""
    return pltpu.bitcast(x_CM, jnp.int32) if x_CM.dtype == jnp.bfloat16 else x_CM


def _from_words(words_RM, dtype: jnp.dtype):
    return pltpu.bitcast(words_RM, dtype) if words_RM.dtype != dtype else words_RM


def _dot(a, b, dims):
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
