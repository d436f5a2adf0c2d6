"""Attention by cuDNN's fused kernels on NVIDIA GPUs, with ALiBi inside q . k (alibi_lanes.py), not in an array.

Documents are sequences of their own to cuDNN, packed into rows, which it finds by their offsets. It takes no more of
them than MOST_DOCUMENTS a row here, because its row statistics are an array [rows x most documents, heads, length].
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn's function takes no offsets

from btlm_jax.attention import remat_names
from btlm_jax.attention.alibi_lanes import MAX_LENGTH, NUM_LANES, alibi_lanes, widen
from btlm_jax.recipe.config import ModelConfig

# The widest heads of cuDNN's backward pass, NVIDIA/cudnn-frontend, docs/operations/Attention.md: 128, on Hopper 256.
# BTLM's 80 become 96.
MAX_HEAD_DIM, MAX_HEAD_DIM_HOPPER = 128 - NUM_LANES, 256 - NUM_LANES
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
      ValueError: a dtype, a head dim or a length that the kernel does not take, or documents on a GPU before Hopper.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    if reason := why_no_kernel(q_BTNH.dtype, length=T, head_dim=H, has_documents=starts_BT is not None):
        raise ValueError(f"attention implementation 'gpu' {reason}: use model.attention=chunked")
    q_BTNH, k_BSNH, v_BSNH = remat_names.with_checkpoint_names(q_BTNH, k_BSNH, v_BSNH)
    width = padded_width(H)
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
    return o_BTNW[..., :H]  # without a name: remat saves o_BTNW (remat_names.CUDNN_FORWARD), and not both


def why_no_kernel(dtype: jnp.dtype, *, length: int, head_dim: int, has_documents: bool) -> str:
    """Return why the kernel does not take such queries on this GPU, or "" if it does.

    Compute capabilities are those of the page on attention of NVIDIA/cudnn-frontend, cuDNN 9.18.
    """
    if not cudnn.check_compute_capability("8.0"):
        return "is for compute capability 8.0 (Ampere) or newer"
    is_from_hopper = cudnn.check_compute_capability("9.0")
    is_hopper = is_from_hopper and not cudnn.check_compute_capability("10.0")
    most = MAX_HEAD_DIM_HOPPER if is_hopper else MAX_HEAD_DIM
    if dtype != jnp.bfloat16 or head_dim > most:
        here = f"{most} on Hopper" if is_hopper else f"{most}, on Hopper {MAX_HEAD_DIM_HOPPER}"
        return f"takes bfloat16 and head dims up to {here}; got {dtype} and {head_dim}"
    if length > MAX_LENGTH:
        return f"takes ALiBi of up to {MAX_LENGTH:,} positions; got {length:,}"
    if has_documents and not is_from_hopper:
        return "keeps documents apart (data.document_mask) from Hopper on, compute capability 9.0"
    return ""


def describe_attention(config: ModelConfig, *, length: int, has_documents: bool) -> str:
    """Return how attention to `length` positions is computed on this GPU, and why where that is not by cuDNN."""
    if config.attention not in ("auto", "gpu"):
        return f"{config.attention}, as model.attention says"
    reason = why_no_kernel(
        jnp.dtype(config.dtype), length=length, head_dim=config.head_dim, has_documents=has_documents
    )
    if reason:
        return f"chunked, in XLA: cuDNN's kernel {reason}"
    return (
        f"gpu, cuDNN's kernel: heads of {config.head_dim} widened to {padded_width(config.head_dim)} by ALiBi's lanes"
    )


def padded_width(head_dim: int) -> int:
    """Return how wide the kernel's heads are: a multiple of 8 with room for ALiBi's lanes."""
    return -(-(head_dim + NUM_LANES) // 8) * 8


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
