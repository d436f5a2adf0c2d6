"""One chain against numpy's closed form and optax.adamw; the schedule against exact fractions and optax."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.tiny import config_dict

from btlm_jax.recipe.config import OptimizerConfig, train_config_from
from btlm_jax.recipe.mup import ParameterRule
from btlm_jax.recipe.optimizer import learning_rate_at, make_optimizer

# Class: shape, learning rate, weight decay, eps: all different, so that none can stand in for another.
LEAVES = {
    "embedding": ((7, 5), 1.0, 1.0, 1.0),
    "attention_in": ((5, 2, 3), 1 / 3, 3.0, 1 / 9),
    "attention_out": ((2, 3, 5), 1 / 4, 4.0, 1 / 12),
    "mlp_in": ((5, 6), 1 / 5, 1.0, 1 / 15),
    "mlp_out": ((6, 5), 1 / 7, 7.0, 1 / 21),
    "norm_scale": ((5,), 1.0, 0.0, 1 / 6),
    "bias": ((6,), 1.0, 0.0, 1 / 8),
}


@dataclasses.dataclass(frozen=True)
class Info:
    """As much of ParameterInfo as the chain reads."""

    rule: ParameterRule


def table_of(leaves: dict) -> dict:
    def info(name: str, learning_rate: float, weight_decay: float, eps: float) -> Info:
        return Info(
            ParameterRule(
                parameter_class=name,
                init_mean=0.0,
                init_std=0.0,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                eps=eps,
            )
        )

    return {name: info(name, *multipliers) for name, (_, *multipliers) in leaves.items()}


def make_config(**changes) -> OptimizerConfig:
    values = dict(
        peak_learning_rate=0.012, end_learning_rate=1e-4, warmup_tokens=0, beta1=0.8, beta2=0.95, eps=1e-8,
        weight_decay=0.1, clip_norm=1.0,
    )  # fmt: skip
    return OptimizerConfig(**{**values, **changes})


def normal(seed: int, scale: float) -> dict:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, (shape, *_) in LEAVES.items()}


def closed_form(config: OptimizerConfig, params: dict, grads_of_steps: list[dict], rates: list[float]) -> dict:
    """The docstring of optimizer.py in float64, moments written as sums over the whole past."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    clipped = []
    for grads in grads_of_steps:
        norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in grads.values()))
        clipped.append({name: g * min(1.0, config.clip_norm / norm) for name, g in grads.items()})
    for t, rate in enumerate(rates, start=1):
        for name, (_, learning_rate, weight_decay, eps) in LEAVES.items():
            past = [clipped[s][name].astype(np.float64) for s in range(t)]
            weights1 = [config.beta1 ** (t - 1 - s) for s in range(t)]
            weights2 = [config.beta2 ** (t - 1 - s) for s in range(t)]
            mean = sum(w * g for w, g in zip(weights1, past, strict=True)) / sum(weights1)
            square = sum(w * g**2 for w, g in zip(weights2, past, strict=True)) / sum(weights2)
            update = mean / (np.sqrt(square) + config.eps * eps) + config.weight_decay * weight_decay * params[name]
            params[name] = params[name] - rate * learning_rate * update
    return params


def trained(config: OptimizerConfig, table: dict, params: dict, grads_of_steps: list[dict], rates: list[float]) -> dict:
    optimizer = make_optimizer(config, table)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for grads, rate in zip(grads_of_steps, rates, strict=True):
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params, learning_rate=rate)
        params = optax.apply_updates(params, updates)
    return jax.device_get(params)


# Gradients far above the clip norm, far below it, and of the size of eps, where its multiplier shows.
@pytest.mark.parametrize(("scale", "eps"), [(10.0, 1e-8), (1e-3, 1e-8), (1e-3, 1e-2)])
@pytest.mark.parametrize("is_constant", [True, False])
def test_every_class_follows_the_closed_form(scale, eps, is_constant):
    config = make_config(eps=eps)
    params = normal(0, 1.0)
    grads = [normal(1 if is_constant else 1 + step, scale) for step in range(4)]
    rates = [0.002, 0.012, 0.007, 0.003]
    found = trained(config, table_of(LEAVES), params, grads, rates)
    expected = closed_form(config, params, grads, rates)
    for name in LEAVES:
        moved = np.abs(expected[name] - params[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-4 * moved, err_msg=name)


def test_all_multipliers_one_is_adamw_of_optax():
    ones = {name: (shape, 1.0, 1.0, 1.0) for name, (shape, *_) in LEAVES.items()}
    config, params = make_config(), normal(0, 1.0)
    grads, rates = [normal(1 + step, 0.3) for step in range(5)], [0.012] * 5
    peer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.012, b1=0.8, b2=0.95, eps=1e-8, weight_decay=0.1))
    expected = jax.tree.map(jnp.asarray, params)
    state = peer.init(expected)
    for grad in grads:
        updates, state = peer.update(jax.tree.map(jnp.asarray, grad), state, expected)
        expected = optax.apply_updates(expected, updates)
    found = trained(config, table_of(ones), params, grads, rates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, jax.device_get(expected))


CONFIG = train_config_from(config_dict("btlm_3b_8k"))
PER_STEP, NUM_STEPS, WARMUP = 3_932_160, 159_636, 95


def rate(tokens: int) -> float:
    return learning_rate_at(CONFIG.optimizer, tokens=tokens, total_tokens=NUM_STEPS * PER_STEP)


def test_schedule_has_the_published_values():
    assert CONFIG.curriculum.table.num_tokens == NUM_STEPS * PER_STEP
    assert rate(0) == 0
    assert rate(PER_STEP) == pytest.approx(0.012 / 95, rel=1e-15)
    assert rate(WARMUP * PER_STEP) == 0.012
    assert rate((WARMUP - 1) * PER_STEP) < 0.012 > rate((WARMUP + 1) * PER_STEP)
    assert rate((119_727 + 1) * PER_STEP) == pytest.approx(0.00307818, abs=5e-9)
    assert rate(NUM_STEPS * PER_STEP) == pytest.approx(1.0198e-4, rel=1e-15)


def sampled_tokens() -> list[int]:
    edges = [0, 1, PER_STEP, 95 * PER_STEP, 119_727 * PER_STEP, NUM_STEPS * PER_STEP]
    near = [edge + d for edge in edges for d in (-1, 0, 1) if 0 <= edge + d <= edges[-1]]
    return near + np.random.default_rng(0).integers(0, edges[-1], 2000).tolist()


def test_schedule_is_exact_at_every_token():
    peak, end = Fraction(CONFIG.optimizer.peak_learning_rate), Fraction(CONFIG.optimizer.end_learning_rate)
    for tokens in sampled_tokens():
        if tokens <= WARMUP * PER_STEP:
            exact = peak * Fraction(tokens, WARMUP * PER_STEP)
        else:
            exact = peak + (end - peak) * Fraction(tokens - WARMUP * PER_STEP, (NUM_STEPS - WARMUP) * PER_STEP)
        # The decay subtracts from the peak, so its rounding is the peak's: an ulp or two of 0.012.
        assert abs(Fraction(rate(tokens)) - exact) <= 2 * Fraction(np.spacing(0.012)), tokens


def test_schedule_is_that_of_optax():
    peer = optax.join_schedules(
        [optax.linear_schedule(0.0, 0.012, WARMUP), optax.linear_schedule(0.012, 1.0198e-4, NUM_STEPS - WARMUP)],
        boundaries=[WARMUP],
    )
    for step in (0, 1, 50, 94, 95, 96, 1000, 119_727, 119_728, 159_635, 159_636):
        assert rate(step * PER_STEP) == pytest.approx(float(peer(step)), rel=1e-5, abs=1e-9), step


@pytest.mark.parametrize("tokens", [-1, NUM_STEPS * PER_STEP + 1])
def test_tokens_outside_the_run_are_refused(tokens):
    with pytest.raises(ValueError, match="outside the run"):
        rate(tokens)


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    config = make_config(warmup_tokens=100)
    assert learning_rate_at(config, tokens=100, total_tokens=100) == 0.012
    assert learning_rate_at(config, tokens=50, total_tokens=100) == 0.006
