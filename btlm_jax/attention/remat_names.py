"""Names of what attention's backward pass needs, by which remat policies choose what is saved of a layer."""

import jax
from jax.ad_checkpoint import checkpoint_name

QUERY, KEY, VALUE = "attention_query", "attention_key", "attention_value"
OUTPUT = "attention_out"
LOG_SUM_EXP = "attention_lse"
WINDOW = "attention_window"
CHECKPOINT_NAMES = (QUERY, KEY, VALUE, OUTPUT, LOG_SUM_EXP, WINDOW)


def with_checkpoint_names(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q, k and v named QUERY, KEY and VALUE, in the form in which they are attended with."""
    return checkpoint_name(q, QUERY), checkpoint_name(k, KEY), checkpoint_name(v, VALUE)
