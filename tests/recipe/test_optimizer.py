"""One chain against numpy's closed form and optax.adamw; the schedule against exact fractions and optax."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.tiny import config_dict

from btlm_jax.recipe.config import SCHEDULES, OptimizerConfig, train_config_from
from btlm_jax.recipe.curriculum import make_curriculum
from btlm_jax.recipe.mup import ParameterRule
from btlm_jax.recipe.optimizer import (
    learning_rate_at,
    learning_rates,
    make_optimizer,
    make_schedule,
    rates_of_steps,
)

# Class: shape, learning rate, weight decay, eps: all different, so that none can stand in for another.
LEAVES = {
    "embedding": ((7, 5), 1.0, 1.0, 1.0),
    "attention_in": ((5, 2, 3), 1 / 3, 3.0, 1 / 9),
    "attention_out": ((2, 3, 5), 1 / 4, 4.0, 1 / 12),
    "mlp_in": ((5, 6), 1 / 5, 1.0, 1 / 15),
    "mlp_out": ((6, 5), 1 / 7, 7.0, 1 / 21),
    "norm_scale": ((5,), 1.0, 0.0, 1 / 6),
    "bias": ((6,), 1.0, 0.0, 1 / 8),
    "key_bias": ((3,), 0.0, 0.0, 1 / 9),
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
        schedule="linear", peak_learning_rate=0.012, end_learning_rate=1e-4, initial_learning_rate=0.0, warmup_tokens=0,
        decay_share=0.2, schedule_begin=0, schedule_tokens=0, beta1=0.8, beta2=0.95, eps=1e-8, weight_decay=0.1,
        weight_decay_convention="preset",
        z_loss=0.0,
        clip_norm=1.0,
        hidden_optimizer="adamw",
        muon_learning_rate=0.02,
        average="none",
        average_share=0.1,
        freeze="",
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
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(grads, state, params, rate):
        updates, state = optimizer.update(grads, state, params, learning_rate=rate)
        return optax.apply_updates(params, updates), state

    for grads, rate in zip(grads_of_steps, rates, strict=True):
        params, state = step(grads, state, params, rate)
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
    state, update = jax.jit(peer.init)(expected), jax.jit(peer.update)
    for grad in grads:
        updates, state = update(grad, state, expected)
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


def sampled_tokens() -> np.ndarray:
    edges = [0, 1, PER_STEP, 95 * PER_STEP, 119_727 * PER_STEP, NUM_STEPS * PER_STEP]
    near = [edge + d for edge in edges for d in (-1, 0, 1) if 0 <= edge + d <= edges[-1]]
    return np.array(near + np.random.default_rng(0).integers(0, edges[-1], 2000).tolist())


def test_the_linear_schedule_is_the_closed_formula_at_every_token():
    config, total = CONFIG.optimizer, NUM_STEPS * PER_STEP
    peak, end, warmup = config.peak_learning_rate, config.end_learning_rate, WARMUP * PER_STEP
    tokens = sampled_tokens()
    for count, found in zip(
        tokens.tolist(), learning_rates(config, tokens=tokens, total_tokens=total).tolist(), strict=True
    ):
        done = (count - warmup) / (total - warmup)
        plain = peak * count / warmup if count < warmup else peak * (1 - done) + end * done  # Python's float64
        assert found == pytest.approx(plain, rel=1e-15, abs=0), count
        share = Fraction(count, warmup) if count <= warmup else 1 - Fraction(count - warmup, total - warmup)
        exact = Fraction(peak) * share + (Fraction(end) * (1 - share) if count > warmup else 0)
        # The decay subtracts from the peak, so its rounding is the peak's: an ulp or two of 0.012.
        assert abs(Fraction(found) - exact) <= 2 * Fraction(np.spacing(0.012)), count


def exact_rate(config: OptimizerConfig, tokens: int, total: int) -> float:
    """The schedules of recipe/optimizer.py's docstring, written again with exact fractions, and one cosine."""
    since, length = tokens - config.schedule_begin, config.schedule_tokens or total - config.schedule_begin
    initial, peak, end = map(
        Fraction, (config.initial_learning_rate, config.peak_learning_rate, config.end_learning_rate)
    )
    if since < config.warmup_tokens:
        return float(initial + (peak - initial) * Fraction(since, config.warmup_tokens))
    if config.schedule == "constant":
        return float(peak)
    decay = length - config.warmup_tokens
    if config.schedule == "wsd":
        decay = round(config.decay_share * length)
    if since <= length - decay:
        return float(peak)
    done = min(Fraction(since - (length - decay), decay), Fraction(1))
    if config.schedule == "cosine":
        return float(end) + (float(peak) - float(end)) * (1 + math.cos(math.pi * float(done))) / 2
    return float(peak + (end - peak) * done)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_tokens": 700},
        {"warmup_tokens": 700, "schedule_tokens": 7_000},
        {"warmup_tokens": 300, "schedule_begin": 6_000, "initial_learning_rate": 1e-4},
        {"warmup_tokens": 300, "schedule_begin": 6_000, "initial_learning_rate": 1e-4, "schedule_tokens": 1_500},
    ],
    ids=str,
)
def test_schedules_are_their_definitions(schedule, changes):
    config, total = make_config(schedule=schedule, decay_share=0.3, **changes), 9_001
    tokens = np.arange(config.schedule_begin, total + 1)
    found = learning_rates(config, tokens=tokens, total_tokens=total)
    expected = [exact_rate(config, count, total) for count in tokens.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=2e-18)
    assert found.dtype == np.float64 and len(set(found.tolist())) > (schedule != "constant")
    lasting = (config.schedule_tokens or total - config.schedule_begin) + config.schedule_begin
    assert found[tokens >= lasting].tolist() == [0.012 if schedule == "constant" else 1e-4] * (total - lasting + 1)
    curriculum = make_curriculum(seq_len=(9_001,), batch_size=(1,), num_tokens=(9_001,))
    assert rates_of_steps(config, curriculum).tolist() == [found[-1]]


def test_a_schedule_is_that_of_optax():
    schedule = make_schedule(make_config(schedule="wsd", warmup_tokens=50, decay_share=0.25), total_tokens=400)
    peer = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 0.012, 50),
            optax.constant_schedule(0.012),
            optax.linear_schedule(0.012, 1e-4, 100),
        ],
        boundaries=[50, 300],
    )
    for count in (0, 1, 49, 50, 51, 299, 300, 301, 399, 400):
        assert float(schedule(count)) == pytest.approx(float(peer(count)), rel=1e-5, abs=1e-9), count


def test_steps_before_the_schedule_begins_have_no_rate():
    curriculum = make_curriculum(seq_len=(4,), batch_size=(5,), num_tokens=(200,))
    found = rates_of_steps(make_config(schedule_begin=60, initial_learning_rate=1.0, warmup_tokens=20), curriculum)
    assert np.isnan(found[:3]).all() and found[3] == 0.012 and found[-1] == 1e-4 and len(found) == 10


@pytest.mark.parametrize("tokens", [-1, NUM_STEPS * PER_STEP + 1])
def test_tokens_outside_the_run_are_refused(tokens):
    with pytest.raises(ValueError, match="outside the run"):
        rate(tokens)


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    config = make_config(warmup_tokens=100)
    assert learning_rate_at(config, tokens=100, total_tokens=100) == 0.012
    assert learning_rate_at(config, tokens=50, total_tokens=100) == 0.006


def test_without_a_cpu_the_remedy_is_named(monkeypatch):
    def refuse(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", refuse)
    with pytest.raises(ValueError, match="Unknown backend cpu.*JAX_PLATFORMS=tpu,cpu"):
        rate(PER_STEP)
