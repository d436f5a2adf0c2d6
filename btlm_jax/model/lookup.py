"""The embedding lookup, with its gradient and what devices exchange for both."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from btlm_jax.parallel.collectives import gather_table, scatter_table_gradient
from btlm_jax.parallel.mesh import TENSOR, AxisRules


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(rules: AxisRules, dtype: jnp.dtype, table_VD: jax.Array, inputs_BT: jax.Array) -> jax.Array:
    """Return the rows x_BTD of the stored float32 table in `dtype`; the table's gradient adds up in float32."""

    def local(table_VD, inputs_BT):
        return gather_table(table_VD, dtype=dtype)[inputs_BT]

    specs = (rules.spec("vocab", "embed"), rules.spec("batch", "length"))
    # Every device of the tensor axis looks the same rows up, which the check cannot see.
    mapped = jax.shard_map(local, in_specs=specs, out_specs=rules.spec("batch", "length", "act_embed"), check_vma=False)
    return mapped(table_VD, inputs_BT)


def _forward(rules: AxisRules, dtype: jnp.dtype, table_VD: jax.Array, inputs_BT: jax.Array):
    return look_up(rules, dtype, table_VD, inputs_BT), (table_VD, inputs_BT)


def _backward(rules: AxisRules, dtype: jnp.dtype, residuals: tuple, dx_BTD: jax.Array):
    table_VD, inputs_BT = residuals

    def local(inputs_BT, dx_BTD):
        whole_VD = jnp.zeros((table_VD.shape[0], dx_BTD.shape[-1]), jnp.float32)
        # The devices of the tensor axis hold the same dx: the sum over them is so many times too large.
        grad_VD = whole_VD.at[inputs_BT].add(dx_BTD.astype(jnp.float32) / jax.lax.axis_size(TENSOR))
        return scatter_table_gradient(jax.lax.pcast(grad_VD, TENSOR, to="varying"))

    specs = (rules.spec("batch", "length"), rules.spec("batch", "length", "act_embed"))
    grad_VD = jax.shard_map(local, in_specs=specs, out_specs=rules.spec("vocab", "embed"))(inputs_BT, dx_BTD)
    return grad_VD, None


look_up.defvjp(_forward, _backward)
