"""Attention by blocks of rows, for any backend: memory grows with T * block, not T * T. Laid out for XLA on a CPU.

The forward pass takes a block of queries against all keys that it may see; the backward pass takes a block of keys
against all queries that may see it and computes the scores again from q, k and the saved log-sum-exp (the gradients
of FlashAttention, Dao et al. 2022, arXiv:2205.14135, appendix B.4). The triangle is cut in at most `MAX_STAGES`
stages: inside one, every block has the same static shape and they run as one loop, so that compile time does not
grow with T. A few sequences' heads at a time keep a block's scores in the cache.

Letters beside the house's: G heads of sequences, C positions of one block, E keys (or queries) that a stage spans.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MAX_STAGES = 8
POSITIONS_AT_ONCE = 1024  # heads of sequences run together while their positions do not exceed this
MASKED = -1e30  # finite, so that no inf - inf can occur


def block_size(length: int) -> int:
    """Return how many positions a block holds: 128, or 64 up to length 256, or the whole of a shorter sequence.

    Measured on 2 CPU cores at lengths 256 to 8,192: smaller blocks starve the matrix units, larger ones leave the
    cache and compute more of the masked triangle.
    """
    return min(length, 64 if length <= 256 else 128)


def attend_blockwise(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, slopes_N: jax.Array, *, scale: float
) -> jax.Array:
    """Attend block by block in float32 (same mathematics as `attend_reference`); bfloat16 is cast as it is read."""
    B, T, N, H = q_BTNH.shape
    padding = -T % block_size(T)

    def fold(x_BTNH):  # padding comes last: no real query sees its keys, and its outputs are cut off
        x_BNTH = jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        return x_BNTH.reshape(B * N, T + padding, H)

    o_GTH = _attend(fold(q_BTNH), fold(k_BSNH), fold(v_BSNH), jnp.tile(slopes_N, B), scale)
    return o_GTH.reshape(B, N, T + padding, H)[:, :, :T].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_GTH, k_GTH, v_GTH, slopes_G, scale):
    return _attend_forward(q_GTH, k_GTH, v_GTH, slopes_G, scale)[0]


def _attend_forward(q_GTH, k_GTH, v_GTH, slopes_G, scale):
    o_GTH, lse_GT = _by_few_heads(functools.partial(_forward, scale=scale), q_GTH, k_GTH, v_GTH, slopes_G)
    o_GTH, lse_GT = checkpoint_name(o_GTH, "attention_out"), checkpoint_name(lse_GT, "attention_lse")
    return o_GTH, (q_GTH, k_GTH, v_GTH, slopes_G, o_GTH, lse_GT)


def _attend_backward(scale, residuals, do_GTH):
    return *_by_few_heads(functools.partial(_backward, scale=scale), *residuals, do_GTH), None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_few_heads(function, *arrays):
    """Map `function` over the arrays' axis G, as many heads at once as POSITIONS_AT_ONCE allows and G divides by."""
    num_heads, length = arrays[0].shape[:2]
    at_once = max(1, min(num_heads, POSITIONS_AT_ONCE // length))
    while num_heads % at_once:
        at_once -= 1
    pieces = tuple(x.reshape(num_heads // at_once, at_once, *x.shape[1:]) for x in arrays)
    results = jax.lax.map(lambda piece: function(*piece), pieces)
    return tuple(x.reshape(num_heads, *x.shape[2:]) for x in results)


def _forward(q_GTH, k_GTH, v_GTH, slopes_G, *, scale):
    """Return the output in q's dtype and the float32 log-sum-exp of each row of scores."""
    length, block = q_GTH.shape[1], block_size(q_GTH.shape[1])
    dtype = q_GTH.dtype
    q_GTH, k_GTH, v_GTH = q_GTH.astype(jnp.float32) * scale, k_GTH.astype(jnp.float32), v_GTH.astype(jnp.float32)
    outputs, lses = [], []
    for first, last in _stages(length, block):
        k_GEH, v_GEH, position_E = k_GTH[:, :last], v_GTH[:, :last], jnp.arange(last)

        def attend_queries(_, start, k_GEH=k_GEH, v_GEH=v_GEH, position_E=position_E):
            offset_CE = position_E[None, :] - (start + jnp.arange(block))[:, None]
            scores_GCE = jnp.einsum("GCH,GEH->GCE", _block_of(q_GTH, start, block), k_GEH)
            scores_GCE = jnp.where(offset_CE[None] <= 0, scores_GCE + _alibi(slopes_G, offset_CE), MASKED)
            max_GC = scores_GCE.max(axis=-1)
            weights_GCE = jnp.exp(scores_GCE - max_GC[:, :, None])
            sum_GC = weights_GCE.sum(axis=-1)
            o_GCH = jnp.einsum("GCE,GEH->GCH", weights_GCE, v_GEH) / sum_GC[:, :, None]
            return None, (o_GCH.astype(dtype), max_GC + jnp.log(sum_GC))

        _, (o_XGCH, lse_XGC) = jax.lax.scan(attend_queries, None, jnp.arange(first, last, block))
        outputs.append(_unblocked(o_XGCH))
        lses.append(_unblocked(lse_XGC))
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(lses, axis=1)


def _backward(q_GTH, k_GTH, v_GTH, slopes_G, o_GTH, lse_GT, do_GTH, *, scale):
    """Return the gradients of q, k and v in q's dtype.

    Scores are transposed, keys by queries, and dq is summed as [G,H,T]: then no product has its left operand stored
    transposed, which on a CPU halves a product's speed.
    """
    length, block = q_GTH.shape[1], block_size(q_GTH.shape[1])
    dtype = q_GTH.dtype
    delta_GT = jnp.sum(do_GTH.astype(jnp.float32) * o_GTH.astype(jnp.float32), axis=-1)
    q_GTH, k_GTH, v_GTH, do_GTH = (x.astype(jnp.float32) for x in (q_GTH, k_GTH, v_GTH, do_GTH))
    q_GTH = q_GTH * scale
    dq_GHT, dks, dvs = _zeros_like(q_GTH[:, :0].swapaxes(1, 2)), [], []
    for first, last in reversed(_stages(length, block)):
        q_GEH, do_GEH, position_E = q_GTH[:, first:], do_GTH[:, first:], jnp.arange(first, length)
        lse_GE, delta_GE = lse_GT[:, first:], delta_GT[:, first:]

        def differentiate_keys(
            dq_GHE, start, q_GEH=q_GEH, do_GEH=do_GEH, position_E=position_E, lse_GE=lse_GE, delta_GE=delta_GE
        ):
            offset_CE = (start + jnp.arange(block))[:, None] - position_E[None, :]
            k_GCH, v_GCH = _block_of(k_GTH, start, block), _block_of(v_GTH, start, block)
            scores_GCE = jnp.einsum("GCH,GEH->GCE", k_GCH, q_GEH) + _alibi(slopes_G, offset_CE)
            weights_GCE = jnp.where(offset_CE[None] <= 0, jnp.exp(scores_GCE - lse_GE[:, None, :]), 0.0)
            dweights_GCE = jnp.einsum("GCH,GEH->GCE", v_GCH, do_GEH)
            dscores_GCE = weights_GCE * (dweights_GCE - delta_GE[:, None, :])
            dk_GCH = jnp.einsum("GCE,GEH->GCH", dscores_GCE, q_GEH)
            dv_GCH = jnp.einsum("GCE,GEH->GCH", weights_GCE, do_GEH)
            dq_GHE = dq_GHE + jnp.einsum("GHC,GCE->GHE", k_GCH.swapaxes(1, 2), dscores_GCE)
            return dq_GHE, (dk_GCH.astype(dtype), dv_GCH.astype(dtype))

        dq_GHE = jnp.pad(dq_GHT, ((0, 0), (0, 0), (last - first, 0)))
        dq_GHT, (dk_XGCH, dv_XGCH) = jax.lax.scan(differentiate_keys, dq_GHE, jnp.arange(first, last, block))
        dks.append(_unblocked(dk_XGCH))
        dvs.append(_unblocked(dv_XGCH))
    dq_GTH = (dq_GHT.swapaxes(1, 2) * scale).astype(dtype)
    return dq_GTH, jnp.concatenate(dks[::-1], axis=1), jnp.concatenate(dvs[::-1], axis=1)


def _stages(length: int, block: int) -> list[tuple[int, int]]:
    """Cut the blocks into at most MAX_STAGES runs of nearly equal length; return each run's first and last position."""
    num_blocks = length // block
    num_stages = min(MAX_STAGES, num_blocks)
    bounds = [block * (stage * num_blocks // num_stages) for stage in range(num_stages + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _alibi(slopes_G, offset_CE):
    return slopes_G[:, None, None] * offset_CE[None].astype(jnp.float32)


def _block_of(x_GTH, start, block):
    return jax.lax.dynamic_slice_in_dim(x_GTH, start, block, axis=1)


def _unblocked(x):
    """[X, G, C, ...] -> [G, X * C, ...]."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _zeros_like(x):
    """Return zeros that vary over the same mesh axes as x, as a loop's carry inside shard_map must."""
    return jnp.where(False, x, 0.0)  # folded by the compiler: x is not read
