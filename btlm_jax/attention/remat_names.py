"""Names of what attention's backward pass needs, by which remat policies choose what is saved of a layer."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

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
    return checkpoint_name(q, QUERY), checkpoint_name(k, KEY), checkpoint_name(v, VALUE)
