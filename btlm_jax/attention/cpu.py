"""Attention by C++ kernels for CPUs (kernels/causal.h): what blockwise.py computes, in one call per direction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.attention import remat_names
from btlm_jax.attention.alibi import windows_of_heads
from btlm_jax.kernels.build import HEAD_DIM_MULTIPLE, QUERY_TILE, has_training_kernels


def attend_cpu(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    slopes_N: jax.Array,
    starts_BT: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Attend in float32 (same mathematics as `attend_reference`), or in bfloat16 with sums and softmax in float32.

    Keys beyond a head's window are left out (alibi.py).

    Raises:
      ValueError: there are no kernels here for such queries.
    """
    if not has_kernels_for(q_BTNH):
        raise ValueError(
            "attention implementation 'cpu' takes float32 and bfloat16, on a CPU with a C++ compiler; got "
            f"{q_BTNH.dtype} on {jax.default_backend()}: use 'blockwise', or 'auto', which takes what there is"
        )
    return _attend(*remat_names.with_checkpoint_names(q_BTNH, k_BTNH, v_BTNH), slopes_N, starts_BT, scale)


def has_kernels_for(q_BTNH: jax.Array) -> bool:
    """Whether there are kernels here that take such queries."""
    return q_BTNH.dtype in (jnp.float32, jnp.bfloat16) and has_training_kernels()


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BTNH, v_BTNH, slopes_N, starts_BT, scale):
    return _attend_forward(q_BTNH, k_BTNH, v_BTNH, slopes_N, starts_BT, scale)[0]


def _attend_forward(q_BTNH, k_BTNH, v_BTNH, slopes_N, starts_BT, scale):
    B, T, N, H = q_BTNH.shape
    window_BN = windows_of_heads(q_BTNH, k_BTNH, slopes_N, scale=scale)
    window_BN = checkpoint_name(window_BN, remat_names.WINDOW)
    # Scratch memory: keys and values in float32, one head after the other.
    scratch = (2, B, N, T, -(-H // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE)
    call = jax.ffi.ffi_call("btlm_causal_forward", [_like(q_BTNH), _float32((B, N, T)), _float32(scratch)])
    inputs = (q_BTNH, k_BTNH, v_BTNH, slopes_N, window_BN)
    o_BTNH, lse_BNT, _ = call(*inputs, *_given(starts_BT), scale=np.float32(scale))
    o_BTNH = remat_names.name_residual(o_BTNH, remat_names.OUTPUT)
    lse_BNT = checkpoint_name(lse_BNT, remat_names.LOG_SUM_EXP)
    return o_BTNH, (starts_BT, *inputs, o_BTNH, lse_BNT)


def _attend_backward(scale, residuals, do_BTNH):
    B, T, N, H = do_BTNH.shape
    # Scratch memory: q, do and the sums of dq, transposed in tiles.
    scratch = (3, B, N, -(-T // QUERY_TILE), -(-H // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE, QUERY_TILE)
    call = jax.ffi.ffi_call("btlm_causal_backward", [*[_like(do_BTNH)] * 3, _float32(scratch)])
    starts_BT, *saved = residuals
    dq_BTNH, dk_BTNH, dv_BTNH, _ = call(*saved, do_BTNH, *_given(starts_BT), scale=np.float32(scale))
    return dq_BTNH, dk_BTNH, dv_BTNH, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _given(starts_BT: jax.Array | None) -> list[jax.Array]:
    """Return the kernels' last argument, which is left out where there are no documents."""
    return [] if starts_BT is None else [starts_BT]


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
