"""Muon against its definition in NumPy's float64, split over devices; its rates, its memory, and what refuses it."""

import dataclasses
import types
from typing import cast

import jax
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.hub.given_model import GivenModel, check_has_moments
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.mup import HIDDEN_CLASSES
from btlm_jax.train.checkpoint import check_same_run
from btlm_jax.train.program import make_program
from btlm_jax.train.setup import describe_run

NUM_INPUT_AXES = {"attention_in": 1, "attention_out": 2, "mlp_in": 1, "mlp_out": 1}


def muon_config(**changes):
    return tiny_config(
        **{
            "optimizer__hidden_optimizer": "muon",
            "optimizer__muon_learning_rate": 0.03,
            "model__num_layers": 3,
            **changes,
        }
    )


def newton_schulz(x_IO: np.ndarray) -> np.ndarray:
    x_IO = x_IO / np.sqrt((x_IO**2).sum())
    for _ in range(5):
        gram_II = x_IO @ x_IO.T
        x_IO = 3.4445 * x_IO + (-4.775 * gram_II + 2.0315 * gram_II @ gram_II) @ x_IO
    return x_IO


def by_formula(info, grads: list[np.ndarray], param: np.ndarray, *, rate: float, decay: float) -> np.ndarray:
    """The parameter after an update of each of the clipped gradients: Muon of a hidden matrix, otherwise Adam."""
    momentum = mean = square = 0.0
    param, rule = param.astype(np.float64), info.rule
    for t, grad in enumerate(grads, start=1):
        if rule.parameter_class in HIDDEN_CLASSES:
            momentum = 0.95 * momentum + 0.05 * grad
            nesterov = 0.95 * momentum + 0.05 * grad
            split = 1 + NUM_INPUT_AXES[rule.parameter_class]
            n, k = int(np.prod(grad.shape[1:split])), int(np.prod(grad.shape[split:]))
            update = np.stack([newton_schulz(layer.reshape(n, k)) for layer in nesterov]).reshape(grad.shape)
            param = param - 0.5 * 0.03 * (update * np.sqrt(max(1, k / n)) + decay * param)
            continue
        mean, square = 0.9 * mean + 0.1 * grad, 0.95 * square + 0.05 * grad**2
        update = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.95**t)) + 1e-8)
        has_decay = rule.parameter_class == "embedding"
        has_rate = rule.parameter_class != "key_bias"
        param = param - rate * has_rate * (update + decay * has_decay * param)
    return param


@pytest.mark.slow
def test_updates_are_those_of_the_definition():
    config = muon_config(optimizer__weight_decay=0.2, optimizer__peak_learning_rate=0.01)
    mesh = make_mesh(devices=jax.devices()[:8], context=2, tensor=2)
    program = make_program(config, mesh)
    rng = np.random.default_rng(0)

    def drawn(scale: float) -> dict:
        return jax.tree.map(lambda info: (scale * rng.normal(size=info.shape)).astype(np.float32), program.table)

    params, grads = drawn(1.0), [drawn(1e-3), drawn(1.0)]  # the first is not clipped

    def step(grads, state, params, rate):
        updates, state = program.optimizer.update(grads, state, params, learning_rate=rate)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    def place(tree):
        return jax.tree.map(lambda info, leaf: jax.device_put(leaf, info.sharding), program.table, tree)

    with jax.set_mesh(mesh):
        found = place(params)
        state = jax.jit(program.optimizer.init)(found)
        compiled = jax.jit(step).lower(place(grads[0]), state, found, np.float32(0)).compile()
        for grad in grads:
            found, state = compiled(place(grad), state, found, np.float32(0.005))  # half the peak
    assert "all-to-all" in str(compiled.as_text())

    def clipped(tree):
        norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))
        return jax.tree.map(lambda leaf: leaf.astype(np.float64) * min(1.0, 1 / norm), tree)

    grads = [clipped(tree) for tree in grads]
    for info, leaf, param, *own in zip(*map(jax.tree.leaves, (program.table, found, params, *grads)), strict=True):
        expected = by_formula(info, own, param, rate=0.005, decay=0.2)
        moved = np.abs(expected - param).max()
        np.testing.assert_allclose(np.asarray(leaf), expected, atol=2e-4 * moved, rtol=0, err_msg=info.path)
        shards = {s.data.shape for s in leaf.addressable_shards}
        assert shards == {info.sharding.shard_shape(info.shape)}


def test_its_rate_is_the_same_at_every_width_and_its_decay_follows_it():
    for changes in ({"mup__base_d_model": 10.0, "optimizer__freeze": "mlp"}, {"mup__preset": "completep"}):
        config = muon_config(**changes)
        program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
        adam = make_program(
            dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, hidden_optimizer="adamw")),
            program.mesh,
        )
        for info, usual in zip(*(jax.tree.leaves(each.table) for each in (program, adam)), strict=True):
            if info.rule.is_frozen or info.rule.parameter_class not in HIDDEN_CLASSES:
                assert info == usual
                continue
            assert info.rule.learning_rate == 0.03 / 0.006 and info.rule.init_std == usual.rule.init_std
            assert info.rule.learning_rate * info.rule.weight_decay == (5.0 if config.mup.preset == "btlm" else 1.0)
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(each.state.opt_state)) for each in (program, adam)]
        hidden = [info for info in jax.tree.leaves(program.table) if info.rule.parameter_class in HIDDEN_CLASSES]
        assert sizes[1] - sizes[0] == sum(int(np.prod(info.shape)) for info in hidden if not info.rule.is_frozen)


def test_it_is_said_and_refused_by_name():
    config = muon_config()
    alone, split = (
        describe_run(config, make_program(config, make_mesh(devices=jax.devices()[:n], tensor=1)).table) for n in (1, 8)
    )
    assert "hidden matrices: Muon, peak 0.03 at every width" in alone and "nothing is exchanged" in alone
    hidden = 3 * (4 * 40 * 40 + 3 * 40 * 54)
    assert f"{4 * hidden / 1e9:.4g} GB of momentum change devices twice a step" in split
    assert "2 AdamW moments, one of hidden matrices" in alone
    with pytest.raises(ValueError, match="optimizer.weight_decay=auto is a law of AdamW"):
        muon_config(optimizer__weight_decay="auto")
    adamw = tiny_config(model__num_layers=3)
    with pytest.raises(ValueError, match="optimizer.hidden_optimizer: checkpoint 'adamw', config 'muon'"):
        check_same_run(adamw, config, where="here")
    for then, now in ((adamw, config), (config, adamw), (config, config)):
        with pytest.raises(ValueError, match="only AdamW's moments are kept"):
            check_has_moments(cast(GivenModel, types.SimpleNamespace(config=then)), now, name="given")
