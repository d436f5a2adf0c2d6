"""An average of the weights, kept in the optimizer's state: runs with optimizer.average alone load this file.

After step t, with the weights p_s after step s <= t, steps counting whose update is made:

    ema     a_t = sum_s b^(t-s) p_s / sum_s b^(t-s),  b = 2^(-1 / (average_share x steps of the run))
    last    a_t = the mean of p_s over s > (1 - average_share) x steps of the run; before that p_t

`ema` halves a weight's share after so many steps and has no bias to the initial weights. `last` is the mean of the last
share of the run (arXiv 2405.18392 on cooldowns and their stead), without the steps that it passed over by going back.
Training does not read the average. Of a run that is made longer, a mean whose new share has begun goes on with what it
has, and another begins anew.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from btlm_jax.recipe.config import OptimizerConfig


class AverageState(NamedTuple):
    """The state of the optimizer inside, weights in the average, and it: float32, split as parameters."""

    optimizer: optax.OptState
    num_updates: jax.Array  # the last step whose update was made: more than the updates, in spite of its stored name
    num_averaged: jax.Array
    average: optax.Params


def with_average(
    optimizer: optax.GradientTransformationExtraArgs, config: OptimizerConfig, *, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer with the same updates that averages the weights to which they lead."""
    log_decay = np.log(0.5) / (config.average_share * num_steps)
    first = num_steps - round(config.average_share * num_steps)

    def init(params: optax.Params) -> AverageState:
        zero, average = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params)
        return AverageState(optimizer=optimizer.init(params), num_updates=zero, num_averaged=zero, average=average)

    def update(updates, state: AverageState, params=None, *, step, **arguments):
        updates, inner = optimizer.update(updates, state.optimizer, params, **arguments)
        num_averaged = state.num_averaged + 1
        if config.average == "ema":
            share = np.expm1(log_decay) / jnp.expm1(np.float32(log_decay) * num_averaged)
        else:
            num_averaged = jnp.where(state.num_updates <= first, 1, num_averaged)
            share = 1 / num_averaged.astype(jnp.float32)

        def averaged(average, p, u):
            return jnp.where(num_averaged == 1, p + u, average + share * (p + u - average))

        average = jax.tree.map(averaged, state.average, params, updates)
        return updates, AverageState(optimizer=inner, num_updates=step, num_averaged=num_averaged, average=average)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType] # as optimizer.py's
