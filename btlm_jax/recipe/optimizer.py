"""Clip, AdamW and the muP multipliers as one optax chain; the learning rate as a function of exact tokens.

    g <- clip(g, clip_norm)              global norm, before any multiplier
    u <- adam(g; beta1, beta2, eps_p)    eps_p = eps x the parameter's multiplier
    u <- u + weight_decay_p * p
    p <- p - learning_rate(tokens) * learning_rate_p * u

so that weight decay is coupled to each parameter's own learning rate, as in the published BTLM code. The multipliers
of a parameter p come from mup.py. The learning rate is a float the host computes from an integer count of tokens and
hands to the step: no counter on the device, no recompile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from btlm_jax.recipe.config import OptimizerConfig


def learning_rate_at(config: OptimizerConfig, *, tokens: int, total_tokens: int) -> float:
    """Return the peak-class learning rate of the step whose batch brings the count of tokens seen to `tokens`.

    Linear from 0 to the peak over warmup_tokens, then linear to end_learning_rate at total_tokens. Counting the step's
    own batch makes the first update use peak/warm-up steps and the last one exactly the end value.
    """
    if not 0 <= tokens <= total_tokens:
        raise ValueError(f"tokens={tokens:,} is outside the run's 0 to {total_tokens:,}")
    if tokens < config.warmup_tokens:
        return config.peak_learning_rate * tokens / config.warmup_tokens
    if total_tokens == config.warmup_tokens:
        return config.peak_learning_rate
    done = (tokens - config.warmup_tokens) / (total_tokens - config.warmup_tokens)
    return config.peak_learning_rate * (1 - done) + config.end_learning_rate * done


def make_optimizer(config: OptimizerConfig, table: dict) -> optax.GradientTransformationExtraArgs:
    """Make the chain for parameters described by `table` (a tree of ParameterInfo); `update` takes learning_rate=."""
    rules = jax.tree.map(lambda info: info.rule, table)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        # Adam is invariant to the scale of its gradients but for eps, so g/c before it is the same as eps*c inside it.
        scale_each(jax.tree.map(lambda rule: 1 / rule.eps, rules)),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        decay_each(jax.tree.map(lambda rule: config.weight_decay * rule.weight_decay, rules)),
        scale_each(jax.tree.map(lambda rule: rule.learning_rate, rules)),
        scale_by_given_learning_rate(),
    )


def scale_each(multipliers) -> optax.GradientTransformation:
    """Multiply each leaf of the updates by its own constant; stateless."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u, c: u * c, updates, multipliers), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_each(decays) -> optax.GradientTransformation:
    """Add to each leaf of the updates its own constant times the parameter; stateless."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, p, c: u + c * p, updates, params, decays), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_given_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply the updates by minus the `learning_rate` handed to `update`; stateless."""

    def update(updates, state, params=None, *, learning_rate):
        del params
        rate = jnp.asarray(learning_rate, jnp.float32)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        update,  # pyright: ignore[reportArgumentType] # optax types `update` as if it had no extra arguments
    )
