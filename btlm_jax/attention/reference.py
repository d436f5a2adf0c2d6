"""The oracle: attention as its definition reads, with all scores in memory. Slow and large on purpose."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.attention import remat_names


def attend_reference(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    slopes_N: jax.Array,
    starts_BT: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Attend by materialising float32 scores [B,N,T,S]; ALiBi as in Press et al. 2022, arXiv:2108.12409."""
    q_BTNH, k_BSNH, v_BSNH = remat_names.with_checkpoint_names(q_BTNH, k_BSNH, v_BSNH)
    position_T = jnp.arange(q_BTNH.shape[1])
    offset_TS = position_T[None, :] - position_T[:, None]
    scores_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    bias_NTS = slopes_N[:, None, None] * offset_TS[None].astype(jnp.float32)
    scores_BNTS = jnp.where(offset_TS[None, None] <= 0, scores_BNTS + bias_NTS[None], -jnp.inf)
    if starts_BT is not None:
        scores_BNTS = jnp.where(position_T[None, None, None] >= starts_BT[:, None, :, None], scores_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    o_BTNH = jnp.einsum(
        "BNTS,BSNH->BTNH", weights_BNTS.astype(v_BSNH.dtype), v_BSNH, preferred_element_type=jnp.float32
    )
    return checkpoint_name(o_BTNH.astype(q_BTNH.dtype), remat_names.OUTPUT)
