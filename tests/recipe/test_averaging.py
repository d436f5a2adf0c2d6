"""The averages of the weights against sums in float64; kept, read and refused by name."""

import dataclasses
import types
from collections.abc import Collection
from typing import cast

import jax
import numpy as np
import pytest
from support.made_up_run import run_config, write_run
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.hub.given_model import NewRows, begin_state, check_has_moments, open_given_model, placed_params
from btlm_jax.hub.native import read_run, read_run_checkpoint, store_of_run
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.mup import ParameterRule
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.train.checkpoint import Checkpointer, CheckpointReader, check_same_run
from btlm_jax.train.program import make_program
from btlm_jax.train.setup import describe_run

STEPS = 10
SHAPES = {"up": (3, 4), "ln_f": (5,)}


def make_config(**changes):
    return tiny_config(**{f"optimizer__{name}": value for name, value in changes.items()}).optimizer


def normal(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def table() -> dict:
    rule = ParameterRule(
        parameter_class="mlp_in", init_mean=0.0, init_std=1.0, learning_rate=1.0, weight_decay=1.0, eps=1.0
    )
    return {name: types.SimpleNamespace(rule=rule) for name in SHAPES}


def trained(config, *, num_steps: int, skipped: Collection[int] = ()) -> tuple[list[dict], list[dict]]:
    """Return the weights after each update made, float64, and the average after it."""
    optimizer = make_optimizer(config, table(), num_steps=num_steps)
    params = jax.tree.map(jax.numpy.asarray, normal(0))
    state, weights, averages = optimizer.init(params), [], []
    update = jax.jit(
        lambda grads, state, params, step: optimizer.update(grads, state, params, learning_rate=0.1, step=step)
    )
    for step in range(STEPS):
        updates, after = update(normal(1 + step), state, params, step + 1)
        if step in skipped:
            continue  # as a step whose update is not made: the state stays as it is
        params, state = jax.tree.map(lambda p, u: p + u, params, updates), after
        weights.append(jax.tree.map(lambda p: np.asarray(p, np.float64), params))
        averages.append(jax.device_get(state.average) if config.average != "none" else {})
    return weights, averages


def assert_average(found: dict, weights: list[dict], shares: list[float]) -> None:
    for name, leaf in found.items():
        expected = sum(share * each[name] for share, each in zip(shares, weights, strict=True)) / sum(shares)
        np.testing.assert_allclose(leaf, expected, rtol=2e-6, atol=1e-6, err_msg=name)


def test_ema_is_the_weighted_sum_over_the_past():
    weights, averages = trained(make_config(average="ema", average_share=0.3), num_steps=STEPS, skipped={4})
    for t, found in enumerate(averages, start=1):  # a half-life of 3 steps
        assert_average(found, weights[:t], [0.5 ** ((t - s) / 3) for s in range(1, t + 1)])


@pytest.mark.parametrize("share, num", [(0.4, 4), (0.04, 1)])
def test_last_is_the_mean_of_the_last_share_and_training_does_not_read_it(share, num):
    weights, averages = trained(make_config(average="last", average_share=share), num_steps=STEPS)
    for t, found in enumerate(averages, start=1):
        taken = max(1, min(t, t - (STEPS - max(num, round(share * STEPS)))))
        assert_average(found, weights[t - taken : t], [1.0] * taken)
    assert_average(averages[-1], weights[-num:], [1.0] * num)
    if num > 1:
        plain, _ = trained(make_config(), num_steps=STEPS)
        jax.tree.map(np.testing.assert_array_equal, plain, weights)


def test_last_is_of_the_last_steps_where_a_run_went_back_and_passed_over_some():
    """Steps 3, 4 and 7 have no update; the mean is of those after step 6."""
    weights, averages = trained(make_config(average="last", average_share=0.4), num_steps=STEPS, skipped={2, 3, 6})
    assert_average(averages[-1], weights[-3:], [1.0] * 3)
    assert_average(averages[3], weights[3:4], [1.0])


@pytest.mark.slow
def test_it_is_saved_read_by_name_and_said(token_store, tmp_path):
    config = run_config(token_store, optimizer__average="ema", optimizer__weight_decay="auto")
    state = write_run(tmp_path, config, steps=(7,))
    last, average = jax.device_get((state.params, state.opt_state.average))
    assert not np.array_equal(last["ln_f"]["scale"], average["ln_f"]["scale"])
    notices.begin(strict=())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(read_run(tmp_path).params), last)
    assert notices.counts() == {"average-not-taken": 1}
    notices.begin(strict=())
    native = read_run(tmp_path / "average")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(native.params), average)
    assert notices.counts() == {}
    assert native.step == 7
    assert native.metadata.notes["weights"] == "average (ema, optimizer.average_share=0.1)"

    (tmp_path / "average" / "evaluation").mkdir(parents=True)  # where a report on it goes
    mesh = make_mesh(devices=jax.devices()[:8], tensor=2)
    given, of_last = (open_given_model(path, step=0) for path in (tmp_path / "average", tmp_path))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed_params(given, mesh)), average)
    assert given.fingerprint != of_last.fingerprint
    assert store_of_run(given.directory) == store_of_run(tmp_path)
    assert store_of_run(tmp_path).location == token_store
    check_has_moments(of_last, config, name="RUN")
    with pytest.raises(ValueError, match="RUN/average is the average .* are those of its last weights: give /"):
        check_has_moments(given, config, name="RUN/average")
    program = make_program(config, mesh)
    run = type("Run", (), {name: getattr(program, name) for name in ("config", "mesh", "model", "table", "optimizer")})
    begun = begin_state(of_last, run, keep_optimizer=True, rows=NewRows(first=1, end=1))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(begun.opt_state.average), last)
    assert begun.opt_state.num_updates == 0

    checkpointer = Checkpointer(tmp_path, config=config.checkpoint)
    restored = checkpointer.restore_state(7, abstract=program.state)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_a_run_without_one_says_so_and_resumes_keep_it(token_store, tmp_path):
    config = run_config(token_store)
    (tmp_path / "checkpoints").mkdir()
    reader = types.SimpleNamespace(read_metadata=lambda step: (types.SimpleNamespace(tokens_seen=1), config))
    with pytest.raises(ValueError, match="keeps no average of its weights: it was trained with optimizer.average=none"):
        read_run_checkpoint(cast(CheckpointReader, reader), 7, workdir=tmp_path / "average")
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, average="last"))
    with pytest.raises(ValueError, match="optimizer.average: checkpoint 'none', config 'last'"):
        check_same_run(config, changed, where="here")
    with pytest.raises(ValueError, match="optimizer.average_share=0.0 must be above 0 and at most 1"):
        run_config(token_store, optimizer__average_share=0.0)
    program = make_program(changed, make_mesh(devices=jax.devices()[:1], tensor=1))
    size, kept = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))
        for x in (program.state.params, program.state)
    )
    assert kept - 4 * size < 1000  # weights, two moments, the average
    text = describe_run(changed, program.table)
    assert f"(parameters + their average + 2 AdamW moments): {4 * size / 1e9:.4g} GB" in text
    assert "(last, of the last 1 steps): WORKDIR/average" in text
