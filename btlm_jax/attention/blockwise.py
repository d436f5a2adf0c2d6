"""Attention by blocks, for any backend: memory grows with T * block, not T * T. Laid out for XLA on a CPU.

The forward pass computes a block of queries against the keys that it may see. The backward pass computes a block of
keys against the queries that may see it, and the scores again from q, k and the saved log-sum-exp (the gradients of
FlashAttention, Dao et al. 2022, arXiv:2205.14135, appendix B.4). The span of a block is as wide as its place in the
triangle, its head's window (alibi.py) and its documents need; one of a few static widths is chosen at run time, so that
one loop serves all blocks and compile time does not grow with T.

Scores are transposed, [E, C], and products of [E, ...] with them give [H, C]: of the layouts of a product of such
narrow matrices, these are the ones that XLA:CPU runs on all cores (LOG.md, 2026-11-26).

Letters beside the house's: G heads of sequences, C positions of one block, E positions of a span, X blocks.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.attention import remat_names
from btlm_jax.attention.alibi import windows_of_heads

MAX_WIDTHS = 8
BLOCK = 256  # most positions of a block
POSITIONS_AT_ONCE = 2 * BLOCK  # several heads run together up to so many positions, if each has one block only
MASKED = -1e30  # finite, so that no inf - inf can occur


def block_size(length: int) -> int:
    """Return how many positions a block has: the length in equal parts of at most BLOCK.

    Of lengths 128 to 8,192 on 2 CPU cores: smaller blocks keep the matrix units less busy, larger ones do not fit the
    cache and compute more of the masked triangle (LOG.md, 2026-11-26).
    """
    return -(-length // -(-length // BLOCK))


def attend_blockwise(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    slopes_N: jax.Array,
    starts_BT: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Attend block by block in float32 (same mathematics as `attend_reference`); bfloat16 is cast as it is read.

    Keys beyond a head's window are left out (alibi.py).
    """
    q_BTNH, k_BSNH, v_BSNH = remat_names.with_checkpoint_names(q_BTNH, k_BSNH, v_BSNH)
    B, T, N, H = q_BTNH.shape
    window_BN = windows_of_heads(*jax.lax.stop_gradient((q_BTNH, k_BSNH)), slopes_N, scale=scale)
    window_G = checkpoint_name(window_BN, remat_names.WINDOW).reshape(B * N)
    padding = -T % block_size(T)

    def fold(x_BTNH):  # padding comes last: no real query sees its keys, and its outputs are cut off
        x_BNTH = jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        return x_BNTH.reshape(B * N, T + padding, H)

    starts_GT = None
    if starts_BT is not None:  # what is padded is a document of its own
        starts_GT = jnp.repeat(jnp.pad(starts_BT, ((0, 0), (0, padding)), constant_values=T), N, axis=0)
    qkv_GTH = map(fold, (q_BTNH, k_BSNH, v_BSNH))
    # Cast, because functools.partial hides the type that custom_vjp returns.
    o_GTH = cast(jax.Array, _attend(*qkv_GTH, jnp.tile(slopes_N, B), window_G, starts_GT, scale))
    return o_GTH.reshape(B, N, T + padding, H)[:, :, :T].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_GTH, k_GTH, v_GTH, slopes_G, window_G, starts_GT, scale):
    return _attend_forward(q_GTH, k_GTH, v_GTH, slopes_G, window_G, starts_GT, scale)[0]


def _attend_forward(q_GTH, k_GTH, v_GTH, slopes_G, window_G, starts_GT, scale):
    inputs = (q_GTH, k_GTH, v_GTH, slopes_G, window_G, starts_GT)
    o_GTH, lse_GT = _by_few_heads(functools.partial(_forward, scale=scale), *inputs)
    o_GTH, lse_GT = checkpoint_name(o_GTH, remat_names.OUTPUT), checkpoint_name(lse_GT, remat_names.LOG_SUM_EXP)
    return o_GTH, (*inputs, o_GTH, lse_GT)


def _attend_backward(scale, residuals, do_GTH):
    return *_by_few_heads(functools.partial(_backward, scale=scale), *residuals, do_GTH), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_few_heads(function, *arrays):
    """Map `function` over the arrays' axis G, as many heads at once as POSITIONS_AT_ONCE allows and G divides by."""
    num_heads, length = arrays[0].shape[:2]
    at_once = max(1, min(num_heads, POSITIONS_AT_ONCE // length))
    while num_heads % at_once:
        at_once -= 1
    return jax.lax.map(lambda piece: function(*piece), arrays, batch_size=at_once if at_once > 1 else None)


def _forward(q_TH, k_TH, v_TH, slope, window, starts_T, *, scale):
    """Return one head's output in q's dtype and the float32 log-sum-exp of each row of scores."""
    length, block = q_TH.shape[0], block_size(q_TH.shape[0])

    q_HT = q_TH.T

    def attend_queries(_, start):
        q_HC = _slice(q_HT, start, block, axis=1) * scale
        starts_1C = None
        if starts_T is not None:
            starts_1C = jax.lax.dynamic_slice_in_dim(starts_T, start, block)[None, :]

        def over_keys(width):
            first = jnp.maximum(start + block - width, 0)
            k_EH, v_EH = _slice(k_TH, first, width), _slice(v_TH, first, width)
            key_E1 = (first + jnp.arange(width))[:, None]
            offset_EC = key_E1 - (start + jnp.arange(block))[None, :]
            scores_EC = k_EH @ q_HC + slope * offset_EC.astype(jnp.float32)
            scores_EC = jnp.where(_is_seen(offset_EC, key_E1, starts_1C), scores_EC, MASKED)
            max_C = scores_EC.max(axis=0)
            weights_EC = jnp.exp(scores_EC - max_C[None, :])
            sum_C = weights_EC.sum(axis=0)
            o_HC = jnp.einsum("EH,EC->HC", v_EH, weights_EC) / sum_C[None, :]
            return o_HC.astype(q_TH.dtype), max_C + jnp.log(sum_C)

        needed = start + block - jnp.maximum(start - window, 0)
        if starts_T is not None:
            needed = jnp.minimum(needed, start + block - starts_T[start])
        return None, _with_width(needed, over_keys, _widths(length, starts_T))

    _, (o_XHC, lse_XC) = jax.lax.scan(attend_queries, None, jnp.arange(0, length, block))
    return _unblocked(o_XHC), lse_XC.reshape(length)


def _backward(q_TH, k_TH, v_TH, slope, window, starts_T, o_TH, lse_T, do_TH, *, scale):
    """Return the gradients of one head's q, k and v in q's dtype."""
    length, block, dtype = q_TH.shape[0], block_size(q_TH.shape[0]), q_TH.dtype
    # An einsum: XLA:CPU takes ten times as long for the sum of do * o (4 ms and 0.3, LOG.md, 2026-11-26).
    delta_T = jnp.einsum("TH,TH->T", do_TH, o_TH, preferred_element_type=jnp.float32)

    k_HT, v_HT = k_TH.T, v_TH.T

    def differentiate_keys(dq_HT, start):
        k_HC, v_HC = _slice(k_HT, start, block, axis=1) * scale, _slice(v_HT, start, block, axis=1)

        def over_queries(width):
            first = jnp.minimum(start, length - width)
            q_EH, do_EH = _slice(q_TH, first, width), _slice(do_TH, first, width)
            lse_E, delta_E = _slice(lse_T, first, width), _slice(delta_T, first, width)
            key_1C, starts_E1 = (start + jnp.arange(block))[None, :], None
            if starts_T is not None:
                starts_E1 = jax.lax.dynamic_slice_in_dim(starts_T, first, width)[:, None]
            offset_EC = key_1C - (first + jnp.arange(width))[:, None]
            scores_EC = q_EH @ k_HC + slope * offset_EC.astype(jnp.float32)
            weights_EC = jnp.where(_is_seen(offset_EC, key_1C, starts_E1), jnp.exp(scores_EC - lse_E[:, None]), 0.0)
            dscores_EC = weights_EC * (do_EH @ v_HC - delta_E[:, None])
            dk_HC = jnp.einsum("EH,EC->HC", q_EH, dscores_EC) * scale
            dv_HC = jnp.einsum("EH,EC->HC", do_EH, weights_EC)
            dq_HE = jnp.einsum("HC,EC->HE", k_HC, dscores_EC)
            dq_HE = dq_HE + _slice(dq_HT, first, width, axis=1)
            dq_new_HT = jax.lax.dynamic_update_slice_in_dim(dq_HT, dq_HE, first, axis=1)
            return dq_new_HT, (dk_HC.astype(dtype), dv_HC.astype(dtype))

        needed = jnp.minimum(block + window, length - start)
        if starts_T is not None:  # up to the end of the last key's document
            needed = jnp.minimum(needed, (starts_T < start + block).sum() - start)
        return _with_width(needed, over_queries, _widths(length, starts_T))

    zeros_HT = _zeros_like(q_TH.T).astype(jnp.float32)
    dq_HT, (dk_XHC, dv_XHC) = jax.lax.scan(differentiate_keys, zeros_HT, jnp.arange(0, length, block))
    return dq_HT.T.astype(dtype), _unblocked(dk_XHC), _unblocked(dv_XHC)


def _is_seen(offset_EC, key, starts):
    """Return where `offset_EC`, key - query, is not positive, and the key not before the query's document, if any."""
    return offset_EC <= 0 if starts is None else (offset_EC <= 0) & (key >= starts)


def _widths(length: int, starts_T) -> list[int]:
    """Return the widths that a span may have, ascending: whole blocks, up to all of them."""
    block = block_size(length)
    num_blocks = length // block
    num_widths = min(MAX_WIDTHS, num_blocks)
    widths = [-(-num_blocks * (choice + 1) // num_widths) for choice in range(num_widths)]
    if starts_T is not None:  # most documents are short
        widths = sorted({*widths, *(2**n for n in range(widths[0].bit_length()))})
    return [width * block for width in widths]


def _with_width(needed, function, widths: list[int]):
    """Call `function` with the smallest of the widths that holds `needed` positions."""
    branches = [functools.partial(function, width) for width in widths]
    return jax.lax.switch(jnp.sum(needed > jnp.asarray(widths[:-1], jnp.int32)), branches)


def _slice(x, start, size: int, *, axis: int = 0):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis).astype(jnp.float32)


def _unblocked(x_XHC):
    """[X, H, C] -> [T, H]."""
    return x_XHC.swapaxes(1, 2).reshape(-1, x_XHC.shape[1])


def _zeros_like(x):
    """Return zeros that vary over the same mesh axes as x, as a loop's carry inside shard_map must."""
    return jnp.where(False, x, 0.0)  # folded by the compiler: x is not read
