"""The train step: the same numbers on every mesh, for every accumulation, in float32 and nearly so in bfloat16."""

import jax
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.model import make_model, parameter_table
from btlm_jax.parallel.mesh import RULES, batch_sharding, evaluation_sharding, make_mesh, make_run_mesh
from btlm_jax.recipe.mup import CLASSES, make_parametrization
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.train.program import make_program
from btlm_jax.train.step import abstract_batch, abstract_state, init_state, make_eval_step, make_train_step


def host_batch(config, *, phase: int, seed: int):
    """Random rows [B, T]; a quarter of the targets have no weight, unevenly over the rows."""
    rng = np.random.default_rng(seed)
    batch, length = config.curriculum.batch_size[phase], config.curriculum.seq_len[phase]
    tokens = rng.integers(0, config.model.vocab_size, (batch, length + 1)).astype(np.int32)
    weights = (rng.random((batch, length)) > np.linspace(0, 0.5, batch)[:, None]).astype(np.float32)
    return {"inputs_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "weights_BT": weights}


def run(config, *, devices: int, steps: int = 2):
    """Take a step of each phase in turn; return the losses, the norms and the final parameters."""
    mesh = make_run_mesh(config, devices=jax.devices()[:devices])
    program = make_program(config, mesh)
    model, phases = program.model, config.curriculum.table.phases
    state = init_state(model, program.optimizer, mesh, seed=5)
    metrics_of_steps = []
    with jax.set_mesh(mesh):
        for index in range(steps):
            phase = phases[index % 2]
            step = program.compile(program.trace_train_step(phase))
            rows = host_batch(config, phase=phase.index, seed=index)
            split = {k: v.reshape(config.mesh.accumulation, -1, v.shape[-1]) for k, v in rows.items()}
            batch = jax.device_put(split, batch_sharding(mesh, program.rules_for(phase)))
            state, metrics = step(state, batch, np.float32(0.01))
            metrics_of_steps.append(jax.device_get(metrics))
        heldout = jax.device_put(rows, evaluation_sharding(mesh))
        sums = jax.jit(make_eval_step(model, loss_chunk=config.model.loss_chunk))(state.params, heldout)
    return metrics_of_steps, jax.device_get(state), jax.device_get(sums)


@pytest.fixture(scope="module")
def single():
    return run(tiny_config(), devices=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, tensor, context, accumulation",
    [(8, 1, 1, 1), (8, 4, 1, 1), (1, 1, 1, 8), (8, 1, 4, 4), (8, 2, 2, 4)],
)
def test_every_mesh_and_accumulation_gives_the_same_step(single, devices, tensor, context, accumulation):
    config = tiny_config(mesh__tensor=tensor, mesh__context=context, mesh__accumulation=accumulation)
    metrics, state, sums = run(config, devices=devices)
    for found, expected in zip(metrics, single[0], strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Adam turns a gradient of rounding size into a step of full size: the second step is compared more loosely.
            np.testing.assert_allclose(found[name], value, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(metrics[0]["loss"], single[0][0]["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["grad_norm"], single[0][0]["grad_norm"], rtol=1e-5)
    for name, value in single[2].items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-3, err_msg=name)
    # The floor is for the key bias, whose true gradient is zero: softmax ignores what it adds to every score of a row.
    # Gradients themselves: after one moment update from zero, mu is (1 - beta1) times the clipped gradient.
    found_mu, expected_mu = (adam_mu(part.opt_state) for part in (state, single[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max() + 1e-9, rtol=0), found_mu, expected_mu
    )


def adam_mu(opt_state):
    return next(part.mu for part in opt_state if hasattr(part, "mu"))


def test_tokens_and_not_micro_batches_are_weighted(single):
    config = tiny_config()
    rows = host_batch(config, phase=0, seed=0)
    assert single[0][0]["weight"] == rows["weights_BT"].sum()
    by_quarter = rows["weights_BT"].reshape(4, -1).sum(1)
    assert by_quarter.max() > 1.2 * by_quarter.min()  # otherwise the accumulation test could not tell


def test_metrics_name_every_class(single):
    for kind in ("grad_norm", "update_norm"):
        assert {f"{kind}/{c}" for c in CLASSES} <= single[0][0].keys()
        squares = [single[0][0][f"grad_norm/{c}"] ** 2 for c in CLASSES]
    np.testing.assert_allclose(sum(squares), single[0][0]["grad_norm"] ** 2, rtol=1e-5)


def test_abstract_state_is_the_state():
    config = tiny_config(mesh__tensor=2)
    mesh = make_mesh(devices=jax.devices(), tensor=2)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    table = parameter_table(model, mesh)
    optimizer = make_optimizer(config.optimizer, table)
    state = init_state(model, optimizer, mesh, seed=5)
    facts = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)
        for tree in (abstract_state(table, optimizer, mesh), state)
    ]
    assert facts[0] == facts[1]


def test_bfloat16_is_near_float32(single):
    metrics, _, _ = run(tiny_config(model__dtype="bfloat16"), devices=1)
    for found, expected in zip(metrics, single[0], strict=True):
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-3)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=3e-2)


def test_tied_embedding_gradients_are_finite_and_equal_across_batch_shapes_under_remat():
    """The guard for jax issue 35409: one executable a batch shape, tied table, remat."""
    config = tiny_config(model__remat="full")
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    table = parameter_table(model, mesh)
    optimizer = make_optimizer(config.optimizer, table)
    norms = []
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(model, optimizer, table, loss_chunk=20))
        rows = host_batch(config, phase=1, seed=3)
        for length in (48, 24, 48):  # the second half of each row carries no weight, so a shorter row is the same loss
            cut = {k: v[None, :, :length].copy() for k, v in rows.items()}
            cut["weights_BT"][..., 24:] = 0
            _, metrics = step(
                init_state(model, optimizer, mesh, seed=5), jax.device_put(cut, batch_sharding(mesh, RULES)), 0.01
            )
            norms.append(float(metrics["grad_norm/embedding"]))
    assert np.isfinite(norms).all() and norms[0] == norms[2]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)


def test_abstract_batch_names_the_leaves_of_a_batch():
    config = tiny_config()
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    rows = {k: v[None] for k, v in host_batch(config, phase=0, seed=0).items()}
    abstract = abstract_batch(rows["inputs_BT"].shape, batch_sharding(mesh, RULES))
    assert {k: (v.shape, v.dtype) for k, v in abstract.items()} == {k: (v.shape, v.dtype) for k, v in rows.items()}
