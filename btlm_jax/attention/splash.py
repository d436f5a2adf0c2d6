"""Attention by the splash kernel that ships with JAX for TPUs, with ALiBi inside q . k (alibi_lanes.py).

A TPU's tiles are 128 lanes wide, so a head dim of up to 116 carries ALiBi in lanes that would be padding: it costs
nothing. Larger head dims pay for another tile. Off a TPU, Pallas interprets the kernel: slow, the same arithmetic.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from btlm_jax.attention import remat_names
from btlm_jax.attention.alibi_lanes import NUM_LANES, alibi_lanes, whole_tiles, widen

MAX_BLOCK = 512  # positions; larger blocks compute more of the masked triangle and may not fit the vector memory


def attend_splash(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    slopes_N: jax.Array,
    starts_BT: jax.Array | None,
    *,
    scale: float,
    interpret: bool,
) -> jax.Array:
    """Attend in the kernel (same mathematics as `attend_reference`); products take operands in q's dtype.

    Documents are the kernel's segments: it masks scores of others, and skips no block that is below the diagonal.
    """
    T, N, H = q_BTNH.shape[1:]
    block = block_size(T)
    padding = -T % block

    def heads_first(x):  # padding comes last: no real query sees its keys, and its outputs are cut off
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    # Scaled in float32: bfloat16 has no 1/80. Rounded back, as the kernel's operands are of one dtype.
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    # Widened before heads come first: then XLA moves q and k once (3 % fewer of its cycles in a layer on a v5e).
    q_lanes_TNW, k_lanes_SNW = alibi_lanes(slopes_N, length=T, head_dim=H, width=whole_tiles(H + NUM_LANES))
    q_BNTW, k_BNSW, v_BNSW = remat_names.with_checkpoint_names(
        heads_first(widen(q_BTNH, q_lanes_TNW)), heads_first(widen(k_BSNH, k_lanes_SNW)), heads_first(v_BSNH)
    )
    kernel = _make_kernel(T + padding, N, block, interpret=interpret)
    if starts_BT is None:
        o_BNTH = jax.vmap(kernel)(q_BNTW, k_BNSW, v_BNSW)
    else:
        document_BT = jnp.pad(starts_BT, ((0, 0), (0, padding)), constant_values=T)
        o_BNTH = jax.vmap(kernel)(q_BNTW, k_BNSW, v_BNSW, splash_attention.SegmentIds(q=document_BT, kv=document_BT))
    return o_BNTH[:, :, :T].swapaxes(1, 2)


def block_size(length: int) -> int:
    """Return how many positions a block of the kernel has: whole tiles."""
    return min(MAX_BLOCK, whole_tiles(length))


def _make_kernel(length: int, num_heads: int, block: int, *, interpret: bool) -> Callable:
    # dq in a kernel of its own: the one for all three gradients writes a dq for each block of keys to memory to sum
    # them.
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * num_heads)
    return splash_attention.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=remat_names.OUTPUT, interpret=interpret
    )
