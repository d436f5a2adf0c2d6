"""Attention by cuDNN's fused kernels on NVIDIA GPUs, with ALiBi inside q . k (alibi_lanes.py), not in an array.

Documents are sequences of their own to cuDNN, packed into rows, which it finds by their offsets. It takes no more of
them than MOST_DOCUMENTS a row here, because its row statistics are an array [rows x most documents, heads, length].
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn's function takes no offsets
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.attention import remat_names
from btlm_jax.attention.alibi_lanes import NUM_LANES, alibi_lanes, widen

MAX_HEAD_DIM = 128 - NUM_LANES  # cuDNN's limit before Hopper; BTLM's 80 becomes 96
MOST_DOCUMENTS = 128  # of a row; what comes after them is one with the last


def attend_gpu(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    slopes_N: jax.Array,
    starts_BT: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Attend in the kernel (same mathematics as `attend_reference`), which scales scores in float32.

    Raises:
      ValueError: a dtype or a head dim that the kernel does not take, or documents on a GPU before Hopper.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    if not has_kernel_for(q_BTNH, has_documents=False):
        raise ValueError(
            f"attention implementation 'gpu' takes bfloat16 and head dims up to {MAX_HEAD_DIM}; got {q_BTNH.dtype} and "
            f"{H}: use 'blockwise'"
        )
    if not has_kernel_for(q_BTNH, has_documents=starts_BT is not None):
        raise ValueError(
            "attention implementation 'gpu' keeps documents apart (data.document_mask) from Hopper on, compute "
            "capability 9.0: use model.attention=blockwise"
        )
    q_BTNH, k_BSNH, v_BSNH = remat_names.with_checkpoint_names(q_BTNH, k_BSNH, v_BSNH)
    width = -(-(H + NUM_LANES) // 8) * 8
    # The kernel multiplies everything by the scale, ALiBi too.
    q_lanes_TNW, k_lanes_SNW = alibi_lanes(slopes_N / scale, length=T, head_dim=H, width=width)
    q_BTNW, k_BSNW = widen(q_BTNH, q_lanes_TNW), widen(k_BSNH, k_lanes_SNW)
    v_BSNW = jnp.pad(v_BSNH, ((0, 0), (0, 0), (0, 0), (0, width - H)))  # before Hopper, values are as wide as keys
    if starts_BT is None:
        o_BTNW = jax.nn.dot_product_attention(
            q_BTNW, k_BSNW, v_BSNW, scale=scale, is_causal=True, implementation="cudnn"
        )
    else:
        lengths_BM, offsets_BM = packed_documents(starts_BT, most=max(2, min(MOST_DOCUMENTS, T)))
        attended = cudnn.dot_product_attention(
            q_BTNW,
            k_BSNW,
            v_BSNW,
            q_seqlen=lengths_BM,
            kv_seqlen=lengths_BM,
            q_offsets=offsets_BM,
            kv_offsets=offsets_BM,
            scale=scale,
            mask_type=cudnn.MaskType.PADDING_CAUSAL,
        )
        o_BTNW = cast(jax.Array, attended)  # custom_vjp hides its type
    return checkpoint_name(o_BTNW[..., :H], remat_names.OUTPUT)


def has_kernel_for(q_BTNH: jax.Array, *, has_documents: bool) -> bool:
    """Whether the kernel takes such queries, on this GPU."""
    takes_documents = not has_documents or cudnn.check_compute_capability("9.0")
    return takes_documents and q_BTNH.dtype == jnp.bfloat16 and q_BTNH.shape[3] <= MAX_HEAD_DIM


def packed_documents(starts_BT: jax.Array, *, most: int) -> tuple[jax.Array, jax.Array]:
    """Return the documents' lengths [B, most] and offsets in the row [B, most + 1], int32, filled up with -1.

    The last offset that is not -1 is the row's length. Documents after the first `most` are one with the last of them.
    """
    T = starts_BT.shape[1]
    position_T = jnp.arange(T)
    begins_BT = starts_BT == position_T
    begins_BT = begins_BT & (jnp.cumsum(begins_BT, axis=1) <= most)
    firsts_BT = jnp.sort(jnp.where(begins_BT, position_T, T), axis=1)
    offsets_BM = jnp.pad(firsts_BT, ((0, 0), (0, most)), constant_values=T)[:, : most + 1]
    number_M, count_B1 = jnp.arange(most + 1), begins_BT.sum(1, keepdims=True)
    lengths_BM = jnp.where(number_M[:-1] < count_B1, jnp.diff(offsets_BM, axis=1), -1)
    return lengths_BM, jnp.where(number_M <= count_B1, offsets_BM, -1)
