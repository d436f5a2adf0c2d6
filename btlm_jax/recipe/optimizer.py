"""Clip, AdamW and the muP multipliers as one optax chain; the learning rate as a function of exact tokens.

    g <- clip(g, clip_norm)              global norm, before any multiplier
    u <- adam(g; beta1, beta2, eps_p)    eps_p = eps x the parameter's multiplier
    u <- u + weight_decay_p * p
    p <- p - learning_rate(tokens) * learning_rate_p * u

so that weight decay is coupled to each parameter's own learning rate, as in the published BTLM code, or not (mup.py);
"auto" is sizes.py's. The multipliers of a parameter p come from mup.py. A frozen parameter has no gradient, is not
updated, and has no moments. The learning rate is a float the host computes from an integer count of tokens and hands to
the step: no counter on the device, no recompile.

A schedule begins at schedule_begin tokens and is L tokens long: a warm-up of W from the initial rate to the peak, then

    linear      to the end rate at L; 0 is the decay to zero of arXiv 2502.15938
    cosine      peak (1 - c) + end c, with c = (1 - cos(pi x)) / 2 and x from 0 to 1 at L
    constant    the peak
    wsd         the peak, then linear to the end rate over the last decay_share of L (arXiv 2405.18392)

and from L on the rate that it has there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from btlm_jax.recipe.config import OptimizerConfig
from btlm_jax.recipe.curriculum import Curriculum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretches:
    """The tokens of a schedule's parts, in their order."""

    warmup: int
    stable: int
    decay: int


def stretches_of(config: OptimizerConfig, *, total_tokens: int) -> Stretches:
    """Return how many tokens of a run of `total_tokens` each part of the schedule takes."""
    rest = config.schedule_length(total_tokens) - config.warmup_tokens
    decay = {"constant": 0, "wsd": config.decay_tokens(total_tokens)}.get(config.schedule, rest)
    return Stretches(warmup=config.warmup_tokens, stable=rest - decay, decay=decay)


def make_schedule(config: OptimizerConfig, *, total_tokens: int) -> optax.Schedule:
    """Make the peak-class learning rate as a function of the tokens since schedule_begin.

    For int64 of NumPy, where JAX has float64, it is exact to float64's rounding, as in `learning_rates`.
    """
    initial, peak, end = config.initial_learning_rate, config.peak_learning_rate, config.end_learning_rate
    parts = stretches_of(config, total_tokens=total_tokens)

    def mix(share):
        return peak * (1 - share) + end * share

    def decay(tokens):
        done = tokens / parts.decay
        return mix((1 - jnp.cos(jnp.pi * done)) / 2) if config.schedule == "cosine" else mix(done)

    segments = [
        (parts.warmup, lambda tokens: initial * (1 - tokens / parts.warmup) + peak * tokens / parts.warmup),
        (parts.stable, optax.constant_schedule(peak)),
        (parts.decay, decay),
    ]
    segments = [(length, segment) for length, segment in segments if length]
    schedules = [segment for _, segment in segments] + [optax.constant_schedule(end if parts.decay else peak)]
    return optax.join_schedules(schedules, np.cumsum([length for length, _ in segments]).tolist())


def learning_rates(config: OptimizerConfig, *, tokens: Sequence[int] | np.ndarray, total_tokens: int) -> np.ndarray:
    """Return the peak-class learning rate, float64, of steps whose batches bring the count of tokens seen to `tokens`.

    Counting the step's own batch makes the first update use peak/warm-up steps and the last one exactly the end value.
    Computed by JAX on the host: call it outside of a mesh.

    Raises:
      ValueError: a count is before the schedule's beginning or after the run's end, or JAX has no CPU.
    """
    counts = np.asarray(tokens, np.int64)
    outside = counts[(counts < config.schedule_begin) | (counts > total_tokens)]
    if outside.size:
        raise ValueError(f"tokens={outside[0]:,} is outside the run's {config.schedule_begin:,} to {total_tokens:,}")
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            f"the learning rates are computed on the CPU, which JAX is not to use ({error}): put cpu into "
            "JAX_PLATFORMS, for example JAX_PLATFORMS=tpu,cpu"
        ) from error
    with jax.enable_x64(True), jax.default_device(host):
        # Counts of NumPy: the quotients are then its own, and XLA, which multiplies by a reciprocal, only joins parts.
        rates = make_schedule(config, total_tokens=total_tokens)(counts - config.schedule_begin)
        return np.broadcast_to(np.asarray(rates, np.float64), counts.shape)


def rates_of_steps(config: OptimizerConfig, curriculum: Curriculum) -> np.ndarray:
    """Return the peak-class learning rate of each step of a run, float64; nan before schedule_begin.

    Raises:
      ValueError: JAX has no CPU.
    """
    tokens = curriculum.tokens_per_step * np.arange(1, curriculum.num_steps + 1)
    is_scheduled = tokens > config.schedule_begin
    rates = np.full(len(tokens), np.nan)
    rates[is_scheduled] = learning_rates(config, tokens=tokens[is_scheduled], total_tokens=curriculum.num_tokens)
    return rates


def learning_rate_at(config: OptimizerConfig, *, tokens: int, total_tokens: int) -> float:
    """Return one of `learning_rates`."""
    return float(learning_rates(config, tokens=[tokens], total_tokens=total_tokens)[0])


def make_optimizer(config: OptimizerConfig, table: dict, *, num_steps=1) -> optax.GradientTransformationExtraArgs:
    """Make the chain for `table`, a tree of ParameterInfo; `update` takes learning_rate= and step=, of num_steps."""
    rules = jax.tree.map(lambda info: info.rule, table)
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
    is_trained = jax.tree.map(lambda rule: not rule.is_frozen, rules)
    if config.hidden_optimizer == "muon":
        from btlm_jax.recipe.muon import with_muon

        adam = with_muon(adam, table)
    elif not all(jax.tree.leaves(is_trained)):
        adam = optax.masked(adam, is_trained)  # what a gradient of zero is left as is zero
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        # Adam is invariant to the scale of its gradients but for eps, so g/c before it is the same as eps*c inside it.
        scale_each(jax.tree.map(lambda rule: 1 / rule.eps, rules)),
        adam,
        decay_each(jax.tree.map(lambda rule: config.decay * rule.weight_decay, rules)),
        scale_each(jax.tree.map(lambda rule: rule.learning_rate, rules)),
        scale_by_given_learning_rate(),
    )
    if config.average != "none":
        from btlm_jax.recipe.averaging import with_average  # other runs load none of it

        return with_average(chain, config, num_steps=num_steps)
    return chain


def scale_each(multipliers) -> optax.GradientTransformation:
    """Multiply each leaf of the updates by its own constant; stateless."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, c: u * c, updates, multipliers))


def decay_each(decays) -> optax.GradientTransformation:
    """Add to each leaf of the updates its own constant times the parameter; stateless."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u, p, c: u + c * p, updates, params, decays))


def scale_by_given_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply the updates by minus the `learning_rate` handed to `update`; stateless."""

    def update(updates, state, params=None, *, learning_rate, **others):
        del params, others
        rate = jnp.asarray(learning_rate, jnp.float32)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        update,  # pyright: ignore[reportArgumentType] # optax types `update` as if it had no extra arguments
    )
