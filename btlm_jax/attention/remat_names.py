"""Names of what attention's backward pass needs, by which remat policies choose what is saved of a layer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.parallel.mesh import platform

QUERY, KEY, VALUE = "attention_query", "attention_key", "attention_value"
OUTPUT, LOG_SUM_EXP, WINDOW = "attention_out", "attention_lse", "attention_window"
CHECKPOINT_NAMES = (QUERY, KEY, VALUE, OUTPUT, LOG_SUM_EXP, WINDOW)
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's primitive, whose results have no names: output, statistics
CUDNN_BACKWARD = "dot_product_attention_bwd_wrapper"


def save_attention_and(*names: str) -> Callable[..., bool]:
    """Return the remat policy that saves what attention's backward pass needs, and the values of these names."""

    def is_of_cudnn(primitive, *avals, **_) -> bool:
        # Not with documents, [B, M + 1] in operand 6: of M = 128 statistics [B M, N, T] are 0.8 of q, k, v and o.
        return primitive.name == CUDNN_FORWARD and avals[6].ndim != 2

    is_named = jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES, *names)
    return jax.checkpoint_policies.save_from_both_policies(is_named, is_of_cudnn)


def with_checkpoint_names(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q, k and v named QUERY, KEY and VALUE, in the form in which they are attended with."""
    return name_value(q, QUERY), name_value(k, KEY), name_value(v, VALUE)


def name_value(x: jax.Array, name: str) -> jax.Array:
    """Return x with a name for remat policies, in the form in which it is best saved; it is differentiated through.

    On a CPU bfloat16 is saved as integers of the same bits: XLA:CPU has no slices of bfloat16 and would turn what is
    saved of all layers into float32 and back, 5 % of the local model's step (jax 0.10.2, 2026-11-30).
    """
    return _identity(x, name) if _is_saved_as_bits(x) else checkpoint_name(x, name)


def name_residual(x: jax.Array, name: str) -> jax.Array:
    """Do as `name_value` in the forward rule of a custom derivative, where policies do not see into another one."""
    if not _is_saved_as_bits(x):
        return checkpoint_name(x, name)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _identity(x: jax.Array, name: str) -> jax.Array:
    del name
    return x


_identity.defvjp(lambda x, name: (name_residual(x, name), None), lambda name, _, dx: (dx,))


def _is_saved_as_bits(x: jax.Array) -> bool:
    return x.dtype == jnp.bfloat16 and platform() == "cpu"
