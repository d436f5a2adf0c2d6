"""Attention by C++ kernels of our own (cpu/causal.h), for CPUs: what blockwise.py does, one call a direction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.kernels.build import has_training_kernels

TILE, LANES = 64, 16  # kTile of the kernels, and what they fill the head dim up to a multiple of


def attend_cpu(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, slopes_N: jax.Array, *, scale: float
) -> jax.Array:
    """Attend in float32 (same mathematics as `attend_reference`); bfloat16 is converted as it is read.

    Keys whose weight ALiBi makes negligible are left out, as in blockwise.py.

    Raises:
      ValueError: there are no kernels here for such queries.
    """
    if not has_kernels_for(q_BTNH):
        raise ValueError(
            "attention implementation 'cpu' takes float32 and bfloat16, on a CPU with a C++ compiler; got "
            f"{q_BTNH.dtype} on {jax.default_backend()}: use 'blockwise', or 'auto', which takes what there is"
        )
    return _attend(q_BTNH, k_BTNH, v_BTNH, slopes_N, scale)


def has_kernels_for(q_BTNH: jax.Array) -> bool:
    """Whether there are kernels here that take such queries."""
    return q_BTNH.dtype in (jnp.float32, jnp.bfloat16) and has_training_kernels()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BTNH, k_BTNH, v_BTNH, slopes_N, scale):
    return _attend_forward(q_BTNH, k_BTNH, v_BTNH, slopes_N, scale)[0]


def _attend_forward(q_BTNH, k_BTNH, v_BTNH, slopes_N, scale):
    B, T, N, H = q_BTNH.shape
    room = (2, B, N, T, -(-H // LANES) * LANES)  # keys and values in float32, a head after the other
    results = [_like(q_BTNH), _float32((B, N, T)), _float32(room)]
    call = jax.ffi.ffi_call("btlm_causal_forward", results)
    o_BTNH, lse_BNT, _ = call(q_BTNH, k_BTNH, v_BTNH, slopes_N, scale=np.float32(scale))
    o_BTNH, lse_BNT = checkpoint_name(o_BTNH, "attention_out"), checkpoint_name(lse_BNT, "attention_lse")
    return o_BTNH, (q_BTNH, k_BTNH, v_BTNH, slopes_N, o_BTNH, lse_BNT)


def _attend_backward(scale, residuals, do_BTNH):
    B, T, N, H = do_BTNH.shape
    room = (3, B, N, -(-T // TILE), H, TILE)  # q, do and the sums of dq, transposed
    results = [*[_like(do_BTNH)] * 3, _float32(room)]
    call = jax.ffi.ffi_call("btlm_causal_backward", results)
    dq_BTNH, dk_BTNH, dv_BTNH, _ = call(*residuals, do_BTNH, scale=np.float32(scale))
    return dq_BTNH, dk_BTNH, dv_BTNH, None


_attend.defvjp(_attend_forward, _attend_backward)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
