"""Attention by XLA alone in a few large products, for GPUs where cuDNN's kernel takes no such queries.

The queries are split into at most CHUNKS spans, each of which is computed against all keys before its end, by all heads
and sequences at once: 9/16 of the T x T scores are computed, where the triangle is half of them. The backward pass
computes the scores of a chunk again from q, k and the saved log-sum-exp (FlashAttention, Dao et al. 2022,
arXiv:2205.14135, appendix B.4). blockwise.py does the same one head after the other, in blocks of a CPU's cache.

Letters beside the house's: C positions of a chunk, X groups of heads.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.attention import remat_names

CHUNKS = 8  # of a sequence, at most: each is traced and compiled
LEAST_CHUNK = 128  # positions
SCORE_BYTES = 1 << 30  # of a chunk's float32 scores: with more, heads are computed in groups
MASKED = -1e30  # finite, so that no inf - inf can occur


def attend_chunked(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    slopes_N: jax.Array,
    starts_BT: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Attend chunk by chunk (same mathematics as `attend_reference`), scores and sums in float32.

    Products are of q's dtype. On GPUs those of float32 are TF32's, unless JAX_DEFAULT_MATMUL_PRECISION says otherwise.
    """
    q_BTNH, k_BSNH, v_BSNH = remat_names.with_checkpoint_names(q_BTNH, k_BSNH, v_BSNH)
    # Cast, because functools.partial hides the type that custom_vjp returns.
    return cast(jax.Array, _attend(q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT, scale))


def num_groups(shape: tuple[int, ...]) -> int:
    """Return into how many groups the heads of q [B, T, N, H] are split, so that SCORE_BYTES hold, if one head does."""
    B, T, N, _ = shape
    scores = 4 * B * _chunks(T)[0][1] * T  # of one head
    return next(
        count for count in range(1, N + 1) if N % count == 0 and (N // count * scores <= SCORE_BYTES or count == N)
    )


def _chunks(length: int) -> list[tuple[int, int]]:
    """Return where the chunks of queries start and stop."""
    size = max(min(LEAST_CHUNK, length), -(-length // CHUNKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT, scale):
    return _attend_forward(q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT, scale)[0]


def _attend_forward(q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT, scale):
    forward = functools.partial(_forward, starts_BT=starts_BT, scale=scale)
    o_BTNH, lse_BTN = _by_groups(forward, (q_BTNH, k_BSNH, v_BSNH), slopes_N)
    o_BTNH, lse_BTN = checkpoint_name(o_BTNH, remat_names.OUTPUT), checkpoint_name(lse_BTN, remat_names.LOG_SUM_EXP)
    return o_BTNH, (q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT, o_BTNH, lse_BTN)


def _attend_backward(scale, residuals, do_BTNH):
    q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT, o_BTNH, lse_BTN = residuals
    backward = functools.partial(_backward, starts_BT=starts_BT, scale=scale)
    return *_by_groups(backward, (q_BTNH, k_BSNH, v_BSNH, o_BTNH, lse_BTN, do_BTNH), slopes_N), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_groups(function, arrays, slopes_N):
    """Call function(*arrays, slopes_N), for one group of heads after the other where all are too many.

    Axis 2 of all arrays and results is the heads.
    """
    groups = num_groups(arrays[0].shape)
    if groups == 1:
        return function(*arrays, slopes_N)
    split = [jnp.moveaxis(x.reshape(*x.shape[:2], groups, -1, *x.shape[3:]), 2, 0) for x in arrays]
    results = jax.lax.map(lambda group: function(*group), (*split, slopes_N.reshape(groups, -1)))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], groups * x.shape[3], *x.shape[4:]) for x in results)


def _scores(q_BCNH, k_BSNH, slopes_N, starts_BC, start: int, *, scale: float):
    """Return float32 scores [B, N, C, S] of queries from position `start` on."""
    C, S = q_BCNH.shape[1], k_BSNH.shape[1]
    key_1S = jnp.arange(S)[None, :]
    offset_CS = key_1S - (start + jnp.arange(C))[:, None]
    scores_BNCS = scale * jnp.einsum("BCNH,BSNH->BNCS", q_BCNH, k_BSNH, preferred_element_type=jnp.float32)
    scores_BNCS += (slopes_N[:, None, None] * offset_CS[None].astype(jnp.float32))[None]
    is_seen_BCS = (offset_CS <= 0)[None]
    if starts_BC is not None:
        is_seen_BCS = is_seen_BCS & (key_1S[None] >= starts_BC[:, :, None])
    return jnp.where(is_seen_BCS[:, None], scores_BNCS, MASKED)


def _forward(q_BTNH, k_BSNH, v_BSNH, slopes_N, *, starts_BT, scale):
    """Return the output in q's dtype and the float32 log-sum-exp [B, T, N] of each row of scores."""
    outputs, sums = [], []
    for start, stop in _chunks(q_BTNH.shape[1]):
        starts_BC = None if starts_BT is None else starts_BT[:, start:stop]
        scores_BNCS = _scores(q_BTNH[:, start:stop], k_BSNH[:, :stop], slopes_N, starts_BC, start, scale=scale)
        max_BNC = scores_BNCS.max(axis=-1)
        weights_BNCS = jnp.exp(scores_BNCS - max_BNC[..., None])
        sum_BNC = weights_BNCS.sum(axis=-1)
        o_BNCH = _product("BNCS,BSNH->BNCH", weights_BNCS, v_BSNH[:, :stop]) / sum_BNC[..., None]
        outputs.append(o_BNCH.swapaxes(1, 2).astype(q_BTNH.dtype))
        sums.append((max_BNC + jnp.log(sum_BNC)).swapaxes(1, 2))
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(sums, axis=1)


def _backward(q_BTNH, k_BSNH, v_BSNH, o_BTNH, lse_BTN, do_BTNH, slopes_N, *, starts_BT, scale):
    """Return the gradients of q, k and v in q's dtype."""
    T, dtype = q_BTNH.shape[1], q_BTNH.dtype
    delta_BTN = jnp.einsum("BTNH,BTNH->BTN", do_BTNH, o_BTNH, preferred_element_type=jnp.float32)
    dq, dk_BSNH, dv_BSNH = [], jnp.zeros(k_BSNH.shape, jnp.float32), jnp.zeros(v_BSNH.shape, jnp.float32)
    for start, stop in _chunks(T):
        q_BCNH, do_BCNH = q_BTNH[:, start:stop], do_BTNH[:, start:stop]
        k, v = k_BSNH[:, :stop], v_BSNH[:, :stop]
        lse_BNC, delta_BNC = (x[:, start:stop].swapaxes(1, 2) for x in (lse_BTN, delta_BTN))
        starts_BC = None if starts_BT is None else starts_BT[:, start:stop]
        weights_BNCS = jnp.exp(_scores(q_BCNH, k, slopes_N, starts_BC, start, scale=scale) - lse_BNC[..., None])
        dweights_BNCS = jnp.einsum("BCNH,BSNH->BNCS", do_BCNH, v, preferred_element_type=jnp.float32)
        dscores_BNCS = weights_BNCS * (dweights_BNCS - delta_BNC[..., None])
        dq.append((scale * _product("BNCS,BSNH->BCNH", dscores_BNCS, k)).astype(dtype))
        rest = ((0, 0), (0, T - stop), (0, 0), (0, 0))
        dk_BSNH += jnp.pad(_product("BNCS,BCNH->BSNH", dscores_BNCS, q_BCNH), rest)
        dv_BSNH += jnp.pad(_product("BNCS,BCNH->BSNH", weights_BNCS, do_BCNH), rest)
    return jnp.concatenate(dq, axis=1), (scale * dk_BSNH).astype(dtype), dv_BSNH.astype(dtype)


def _product(dims: str, x, y):
    """Return a float32 product of x, cast to the dtype of y, with y."""
    return jnp.einsum(dims, x.astype(y.dtype), y, preferred_element_type=jnp.float32)
