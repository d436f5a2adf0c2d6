"""Attention by cuDNN's fused kernels on NVIDIA GPUs, with ALiBi inside q . k (alibi_lanes.py), not in an array."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.attention import remat_names
from btlm_jax.attention.alibi_lanes import NUM_LANES, alibi_lanes, widen

MAX_HEAD_DIM = 128 - NUM_LANES  # cuDNN's limit before Hopper; BTLM's 80 becomes 96


def attend_gpu(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, slopes_N: jax.Array, *, scale: float
) -> jax.Array:
    """Attend in the kernel (same mathematics as `attend_reference`), which scales scores in float32.

    Raises:
      ValueError: a dtype or a head dim that the kernel does not take.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    if not has_kernel_for(q_BTNH):
        raise ValueError(
            f"attention implementation 'gpu' takes bfloat16 and head dims up to {MAX_HEAD_DIM}; got {q_BTNH.dtype} and "
            f"{H}: use 'blockwise'"
        )
    q_BTNH, k_BSNH, v_BSNH = remat_names.with_checkpoint_names(q_BTNH, k_BSNH, v_BSNH)
    width = -(-(H + NUM_LANES) // 8) * 8
    # The kernel multiplies everything by the scale, ALiBi too.
    q_lanes_TNW, k_lanes_SNW = alibi_lanes(slopes_N / scale, length=T, head_dim=H, width=width)
    o_BTNW = jax.nn.dot_product_attention(
        widen(q_BTNH, q_lanes_TNW),
        widen(k_BSNH, k_lanes_SNW),
        jnp.pad(v_BSNH, ((0, 0), (0, 0), (0, 0), (0, width - H))),  # before Hopper, values are as wide as keys
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    return checkpoint_name(o_BTNW[..., :H], remat_names.OUTPUT)


def has_kernel_for(q_BTNH: jax.Array) -> bool:
    """Whether the kernel takes such queries."""
    return q_BTNH.dtype == jnp.bfloat16 and q_BTNH.shape[3] <= MAX_HEAD_DIM
