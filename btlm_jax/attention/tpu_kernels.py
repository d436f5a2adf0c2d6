"""What one program of the TPU kernels does: a few heads, one block of queries against one block of keys.

Heads are parted without moving a lane: lane l of a block is lane l mod W of its head, so tiles are cut and put together
by masks alone. Products over the head dim do not mind the order, for both operands lie alike. Scores lie transposed,
[keys, queries]: then maxima and sums run along sublanes, and every product but those for the scores is a plain one.

A head leaves out keys that ALiBi puts beyond its reach (reach.py), whole blocks at a time.

Letters beside the house's: G heads of one program, M their lanes, W the head dim in whole tiles, C positions of a
block, R rows of words (two positions of bfloat16 in each), X blocks that are kept.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from btlm_jax.attention.alibi_lanes import TILE, whole_tiles

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
        fill = math.lcm(self.dim, TILE) // self.dim
        return fill if self.num % fill == 0 else self.num

    @property
    def width(self) -> int:
        """Return W."""
        return whole_tiles(self.dim)

    def lanes(self, n: int) -> range:
        """Return where head n of a program lies in its block."""
        return range(n * self.dim, (n + 1) * self.dim)


def parted(dtype: jnp.dtype, *shape: int) -> tuple[tuple[int, ...], jnp.dtype]:
    """Return the shape and dtype in which parted heads of `shape`, [..., C, W], are kept: as words."""
    if dtype == jnp.bfloat16:
        return (*shape[:-2], shape[-2] // 2, shape[-1]), jnp.dtype(jnp.int32)
    return shape, dtype


def forward_kernel(
    pairs_ref, slopes_ref, reach_ref, q_ref, k_ref, v_ref, o_ref, lse_ref,
    q_GRW, k_XGRW, v_XGHC, max_G1C, sum_G1C, o_GHC, *, heads,
):  # fmt: skip
    """Take keys block by block, keep the largest score and the sum of weights so far (algorithm 1 of the paper)."""
    G, C, dtype = q_GRW.shape[0], q_ref.shape[1], q_ref.dtype
    b, group, pair = (pl.program_id(dim) for dim in range(3))
    i, j = pairs_ref[0, pair], pairs_ref[1, pair]
    sees = _sight(reach_ref, b, group, i, j, G=G, C=C)
    is_kept = k_XGRW.shape[0] > 1
    slot = j if is_kept else 0

    @pl.when(j == 0)
    def begin():
        _part(q_ref, q_GRW, heads)
        max_G1C[...] = jnp.full_like(max_G1C, MASKED)
        sum_G1C[...] = jnp.zeros_like(sum_G1C)
        o_GHC[...] = jnp.zeros_like(o_GHC)

    @pl.when((j == 0) if is_kept else (j <= i))
    def take_keys():
        at = i if is_kept else 0
        _part(k_ref, k_XGRW.at[at], heads)
        v_words = _words(v_ref[0])
        for n in range(G):
            v_XGHC[at, n] = _rows(_from_words(_head(v_words, n, heads), dtype), n, heads)

    def attend(is_diagonal: bool):
        def attend_head(n):
            slope = slopes_ref[group * G + n]
            offset = slope * ((j - i) * C).astype(jnp.float32)  # of all the block's scores
            q_CW, k_CW = _from_words(q_GRW[n], dtype), _from_words(k_XGRW[slot, n], dtype)
            scores_CC = _scores(k_CW, q_CW, slope, heads)
            if is_diagonal:
                scores_CC = jnp.where(_is_past(C), scores_CC, MASKED)
            old_1C = max_G1C[n]
            new_1C = jnp.maximum(old_1C, scores_CC.max(0, keepdims=True) + offset)
            weights_CC = jnp.exp(scores_CC - (new_1C - offset))
            shrink_1C = jnp.exp(old_1C - new_1C)
            max_G1C[n] = new_1C
            sum_G1C[n] = shrink_1C * sum_G1C[n] + weights_CC.sum(0, keepdims=True)
            o_GHC[n] = shrink_1C * o_GHC[n] + _dot(v_XGHC[slot, n], weights_CC.astype(dtype), _PLAIN)

        _for_each_head(G, attend_head, sees)

    pl.when(j < i)(functools.partial(attend, is_diagonal=False))
    pl.when(j == i)(functools.partial(attend, is_diagonal=True))

    @pl.when(j == i)
    def end():
        for n in range(G):
            # ALiBi counts from the first query of a block, in the backward pass too: what is left out cancels.
            lse_ref[0, 0, n : n + 1] = max_G1C[n] + jnp.log(sum_G1C[n])
        _join([_lanes(o_GHC[n] * (1.0 / sum_G1C[n]), n, heads) for n in range(G)], o_ref, heads)


def backward_kernel(
    pairs_ref, slopes_ref, reach_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref,
    q_GRW, k_GRW, v_GRW, do_GRW, k_GHC, dk_GCW, dv_GCW, dq_XGHC, *, heads, span,
):  # fmt: skip
    """Take the queries of `span` block by block for each block of keys, and add up all three gradients."""
    G, C, dtype = q_GRW.shape[0], q_ref.shape[1], q_ref.dtype
    b, group, pair = (pl.program_id(dim) for dim in range(3))
    i, j = pairs_ref[0, pair], pairs_ref[1, pair]
    sees = _sight(reach_ref, b, group, i, j, G=G, C=C)

    @pl.when(i == jnp.maximum(j, span.start))
    def begin_keys():
        _part(k_ref, k_GRW, heads)
        _part(v_ref, v_GRW, heads)
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
        _part(q_ref, q_GRW, heads)
        _part(do_ref, do_GRW, heads)

    def differentiate(is_diagonal: bool):
        def differentiate_head(n):
            slope = slopes_ref[group * G + n]
            offset = slope * ((j - i) * C).astype(jnp.float32)
            lse_1C, delta_1C = lse_ref[0, 0, pl.ds(n, 1), :], delta_ref[0, 0, pl.ds(n, 1), :]
            q_CW, k_CW, v_CW, do_CW = (_from_words(ref[n], dtype) for ref in (q_GRW, k_GRW, v_GRW, do_GRW))
            weights_CC = jnp.exp(_scores(k_CW, q_CW, slope, heads) - (lse_1C - offset))
            if is_diagonal:
                weights_CC = jnp.where(_is_past(C), weights_CC, 0.0)
            dscores_CC = (weights_CC * (_dot(v_CW, do_CW, _TRANSPOSED) - delta_1C)).astype(dtype)
            dv_CW, dk_CW = _dot(weights_CC.astype(dtype), do_CW, _PLAIN), _dot(dscores_CC, q_CW, _PLAIN)
            # The first queries of a block of keys are those on the diagonal.
            dv_GCW[n] = dv_CW if is_diagonal else dv_GCW[n] + dv_CW
            dk_GCW[n] = dk_CW if is_diagonal else dk_GCW[n] + dk_CW
            dq_XGHC[i - span.start, n] += _dot(k_GHC[n], dscores_CC, _PLAIN)

        _for_each_head(G, differentiate_head, sees)

    pl.when(j < i)(functools.partial(differentiate, is_diagonal=False))
    pl.when(j == i)(functools.partial(differentiate, is_diagonal=True))

    @pl.when(i == j)
    def end_queries():
        _join([_lanes(dq_XGHC[i - span.start, n] * heads.scale, n, heads) for n in range(G)], dq_ref, heads)

    @pl.when(i == span.stop - 1)
    def end_keys():
        _join([dk_GCW[n] * heads.scale for n in range(G)], dk_ref, heads)
        _join([dv_GCW[n] for n in range(G)], dv_ref, heads)


def _sight(reach_ref, b, group, i, j, *, G: int, C: int):
    """Return the function that says of a program's head n whether a query of block i sees a key of block j."""
    return lambda n: reach_ref[b, group * G + n] > (i - j - 1) * C  # the nearest key is one further than that


def _for_each_head(num: int, visit, sees) -> None:
    """Visit those heads of a program that see a key of this block from a query of the other."""

    def step(n, _):
        pl.when(sees(n))(functools.partial(visit, n))

    jax.lax.fori_loop(0, num, step, None)


def _scores(k_CW, q_CW, slope, heads: Heads):
    """Return scale * k . q + slope * (position of the key in its block), float32 [C of keys, C of queries]."""
    position_CX = jax.lax.broadcasted_iota(jnp.int32, (k_CW.shape[0], TILE), 0).astype(jnp.float32)
    alibi_CC = jnp.tile(slope * position_CX, (1, q_CW.shape[0] // TILE))
    return _dot(k_CW, q_CW, _TRANSPOSED) * heads.scale + alibi_CC


def _is_past(size: int):
    """Return where, in a block on the diagonal, the key does not come after the query."""
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) <= jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _part(ref, heads_GRW, heads: Heads):
    """Write the heads of a block apart from each other, each in whole tiles with zeros beside it."""
    words_RM = _words(ref[0])
    for n in range(heads_GRW.shape[0]):
        heads_GRW[n] = _head(words_RM, n, heads)


def _head(words_RM, n: int, heads: Heads):
    lanes, num_tiles = heads.lanes(n), heads.width // TILE
    tiles = num_tiles * [None]
    for tile in range(lanes.start // TILE, -(-lanes.stop // TILE)):
        x = words_RM[:, tile * TILE : (tile + 1) * TILE]
        x = jnp.pad(x, ((0, 0), (0, TILE - x.shape[1])))
        beside = tiles[tile % num_tiles]
        tiles[tile % num_tiles] = jnp.where(
            _is_within(x, tile, lanes), x, jnp.zeros_like(x) if beside is None else beside
        )
    return tiles[0] if num_tiles == 1 else jnp.concatenate(tiles, axis=1)


def _join(heads_CW: list, ref, heads: Heads):
    """Write heads side by side."""
    words = [_words(head_CW.astype(ref.dtype)) for head_CW in heads_CW]
    for tile in range(-(-ref.shape[-1] // TILE)):
        first, last = tile * TILE, min((tile + 1) * TILE, ref.shape[-1])
        part, joined = first % heads.width, None
        for n, head in enumerate(words):
            lanes = heads.lanes(n)
            if lanes.start < last and lanes.stop > first:
                x = head[:, part : part + TILE]
                joined = x if joined is None else jnp.where(_is_within(x, tile, lanes), x, joined)
        ref[0, :, first:last] = _from_words(joined, ref.dtype)[:, : last - first]


def _is_within(x, tile: int, lanes: range):
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + tile * TILE
    return (lane >= lanes.start) & (lane < lanes.stop)


def _rows(x_CW, n: int, heads: Heads):
    """Return a parted head as [H, C]."""
    x_WC, start = x_CW.T, heads.lanes(n).start % heads.width
    beyond = start + heads.dim - heads.width
    return x_WC[start : start + heads.dim] if beyond <= 0 else jnp.concatenate([x_WC[start:], x_WC[:beyond]])


def _lanes(x_HC, n: int, heads: Heads):
    """Return a head [H, C] as a parted one, [C, W]."""
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
