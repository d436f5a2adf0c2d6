"""Attention in blocks of the score matrix's lower triangle, for any backend: memory grows with T * block, not T * T.

After FlashAttention (Dao 2023, arXiv:2307.08691): the forward pass keeps a running maximum and sum, the backward pass
computes the scores again from q, k and the saved log-sum-exp. Letters beside the house's: G batch times heads,
C queries of one block, K keys of one block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30  # finite, so that no inf - inf can occur


def block_size(length: int) -> int:
    """Return the block for a sequence length: the power of two at or below sqrt(32 T), 8 at least.

    128 at 512, 256 at 2,048, 512 at 8,192: small enough that one block of scores stays in cache, large enough for the
    matrix units.
    """
    return max(8, 2 ** int(np.log2(32 * length) / 2))


def attend_blockwise(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, slopes_N: jax.Array, *, scale: float
) -> jax.Array:
    """Attend block by block; the backward pass recomputes the scores (same mathematics as `attend_reference`)."""
    B, T, N, H = q_BTNH.shape
    block = block_size(T)
    num_blocks = -(-T // block)

    def fold(x_BTNH):  # rows after T are padding: no real query sees their keys, and their outputs are cut off
        x_BNTH = jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, num_blocks * block - T), (0, 0)))
        return x_BNTH.reshape(B * N, num_blocks * block, H)

    q_GTH = fold((q_BTNH * scale).astype(q_BTNH.dtype))
    o_GTH = _attend(q_GTH, fold(k_BSNH), fold(v_BSNH), jnp.tile(slopes_N, B), block)
    return o_GTH.reshape(B, N, num_blocks * block, H)[:, :, :T].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_GTH, k_GSH, v_GSH, slopes_G, block):
    return _forward(q_GTH, k_GSH, v_GSH, slopes_G, block)[0]


def _attend_forward(q_GTH, k_GSH, v_GSH, slopes_G, block):
    o_GTH, lse_GT = _forward(q_GTH, k_GSH, v_GSH, slopes_G, block)
    o_GTH, lse_GT = checkpoint_name(o_GTH, "attention_out"), checkpoint_name(lse_GT, "attention_lse")
    return o_GTH, (q_GTH, k_GSH, v_GSH, slopes_G, o_GTH, lse_GT)


def _attend_backward(block, residuals, do_GTH):
    return *_backward(*residuals, do_GTH, block), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q_GTH, k_GSH, v_GSH, slopes_G, block):
    """Return the output in q's dtype and the float32 log-sum-exp of each row of scores, query block by query block."""
    num_blocks = q_GTH.shape[1] // block
    bias_GCK, causal_bias_GCK = _biases(slopes_G, block)

    def attend_queries(_, i):
        q_GCH = _block_of(q_GTH, i, block)

        def scores_and_values(j, bias_GCK):
            scores_GCK = _dot("GCH,GKH->GCK", q_GCH, _block_of(k_GSH, j, block)) + bias_GCK
            return scores_GCK, _block_of(v_GSH, j, block)

        def add_keys(j, running):
            o_GCH, max_GC, sum_GC = running
            scores_GCK, v_GKH = scores_and_values(j, bias_GCK + _shift(slopes_G, (j - i) * block))
            new_max_GC = jnp.maximum(max_GC, scores_GCK.max(axis=-1))
            decay_GC = jnp.exp(max_GC - new_max_GC)
            weights_GCK = jnp.exp(scores_GCK - new_max_GC[:, :, None])
            return (
                o_GCH * decay_GC[:, :, None] + _dot("GCK,GKH->GCH", weights_GCK.astype(v_GSH.dtype), v_GKH),
                new_max_GC,
                sum_GC * decay_GC + weights_GCK.sum(axis=-1),
            )

        scores_GCK, v_GKH = scores_and_values(i, causal_bias_GCK)
        max_GC = scores_GCK.max(axis=-1)
        weights_GCK = jnp.exp(scores_GCK - max_GC[:, :, None])
        o_GCH = _dot("GCK,GKH->GCH", weights_GCK.astype(v_GSH.dtype), v_GKH)
        o_GCH, max_GC, sum_GC = jax.lax.fori_loop(0, i, add_keys, (o_GCH, max_GC, weights_GCK.sum(axis=-1)))
        return _, ((o_GCH / sum_GC[:, :, None]).astype(q_GTH.dtype), max_GC + jnp.log(sum_GC))

    _, (o_XGCH, lse_XGC) = jax.lax.scan(attend_queries, 0, jnp.arange(num_blocks))
    return o_XGCH.swapaxes(0, 1).reshape(q_GTH.shape), lse_XGC.swapaxes(0, 1).reshape(q_GTH.shape[:2])


def _backward(q_GTH, k_GSH, v_GSH, slopes_G, o_GTH, lse_GT, do_GTH, block):
    """Return the gradients of q, k and v, key block by key block (FlashAttention-2, algorithm 2)."""
    num_blocks = q_GTH.shape[1] // block
    bias_GCK, causal_bias_GCK = _biases(slopes_G, block)
    delta_GT = jnp.sum(do_GTH.astype(jnp.float32) * o_GTH.astype(jnp.float32), axis=-1)

    def differentiate_keys(dq_GTH, j):
        k_GKH, v_GKH = _block_of(k_GSH, j, block), _block_of(v_GSH, j, block)

        def add_queries(i, running, bias_GCK):
            dq_GTH, dk_GKH, dv_GKH = running
            q_GCH, do_GCH = _block_of(q_GTH, i, block), _block_of(do_GTH, i, block)
            scores_GCK = _dot("GCH,GKH->GCK", q_GCH, k_GKH) + bias_GCK
            weights_GCK = jnp.exp(scores_GCK - _block_of(lse_GT, i, block)[:, :, None])
            dweights_GCK = _dot("GCH,GKH->GCK", do_GCH, v_GKH)
            dscores_GCK = weights_GCK * (dweights_GCK - _block_of(delta_GT, i, block)[:, :, None])
            dscores_GCK = dscores_GCK.astype(q_GTH.dtype)
            dq_GCH = _block_of(dq_GTH, i, block) + _dot("GCK,GKH->GCH", dscores_GCK, k_GKH)
            return (
                jax.lax.dynamic_update_slice_in_dim(dq_GTH, dq_GCH, i * block, axis=1),
                dk_GKH + _dot("GCK,GCH->GKH", dscores_GCK, q_GCH),
                dv_GKH + _dot("GCK,GCH->GKH", weights_GCK.astype(do_GTH.dtype), do_GCH),
            )

        start = (dq_GTH, _zeros_like(k_GKH), _zeros_like(v_GKH))
        dq_GTH, dk_GKH, dv_GKH = jax.lax.fori_loop(
            j + 1,
            num_blocks,
            lambda i, running: add_queries(i, running, bias_GCK + _shift(slopes_G, (j - i) * block)),
            add_queries(j, start, causal_bias_GCK),
        )
        return dq_GTH, (dk_GKH.astype(k_GSH.dtype), dv_GKH.astype(v_GSH.dtype))

    dq_GTH, (dk_XGKH, dv_XGKH) = jax.lax.scan(differentiate_keys, _zeros_like(q_GTH), jnp.arange(num_blocks))
    return (
        dq_GTH.astype(q_GTH.dtype),
        dk_XGKH.swapaxes(0, 1).reshape(k_GSH.shape),
        dv_XGKH.swapaxes(0, 1).reshape(v_GSH.shape),
    )


def _biases(slopes_G, block):
    """Return ALiBi's bias between the positions of one block: unmasked, and causal for a block on the diagonal."""
    offset_CK = jnp.arange(block)[None, :] - jnp.arange(block)[:, None]
    bias_GCK = slopes_G[:, None, None] * offset_CK[None].astype(jnp.float32)
    return bias_GCK, jnp.where(offset_CK[None] <= 0, bias_GCK, MASKED)


def _shift(slopes_G, offset):
    return (slopes_G * offset.astype(jnp.float32))[:, None, None]


def _block_of(x, i, block):
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)


def _zeros_like(x):
    """Return float32 zeros that vary over the same mesh axes as x, as a loop's carry inside shard_map must."""
    return jnp.where(False, x.astype(jnp.float32), 0.0)  # folded by the compiler: x is not read


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
