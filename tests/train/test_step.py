"""The train step: the plain loss and its gradients, the same on every mesh and for every accumulation."""

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support.hlo import device_groups
from support.tiny import tiny_config

from btlm_jax.model import make_model, parameter_table
from btlm_jax.parallel.make_mesh import make_mesh, make_run_mesh
from btlm_jax.parallel.mesh import RULES, batch_sharding, evaluation_sharding
from btlm_jax.recipe.config import TAKE_FINITE
from btlm_jax.recipe.mup import CLASSES, make_parametrization
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.train.heldout import make_eval_step
from btlm_jax.train.program import make_program
from btlm_jax.train.step import (
    TrainState,
    abstract_batch,
    abstract_state,
    init_state,
    make_train_step,
)


def host_batch(config, *, phase: int, seed: int):
    """Random rows [B, T]; a quarter of the targets have no weight, unevenly over the rows."""
    rng = np.random.default_rng(seed)
    batch, length = config.curriculum.batch_size[phase], config.curriculum.seq_len[phase]
    tokens = rng.integers(0, config.model.vocab_size, (batch, length + 1)).astype(np.int32)
    weights = (rng.random((batch, length)) > np.linspace(0, 0.5, batch)[:, None]).astype(np.float32)
    return {"inputs_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "weights_BT": weights}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a step of each phase gave, or of the first phases; everything on the host."""

    metrics: list[dict]
    params: list[dict]  # before the first step, after it, ...
    states: list[TrainState]  # likewise
    without_targets: tuple[TrainState, dict]  # after one more step, whose batch has no weights, and its metrics
    sums: dict  # of the evaluation of the second phase's batch with the final parameters
    text: str  # of the last phase's compiled step


def run(config, *, devices: int, num_phases: int = 2, slices: int = 1, initial: TrainState | None = None) -> Run:
    """Take a step of each of the first phases in turn, from an initial state on the host, or from one of its own."""
    with mock.patch("btlm_jax.parallel.make_mesh.num_slices", lambda devices: slices):
        mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:devices])
    program = make_program(config, mesh)
    model, phases = program.model, config.curriculum.table.phases[:num_phases]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    states = [initial or jax.device_get(init_state(model, program.optimizer, mesh, seed=5))]
    metrics_of_steps = []
    with jax.set_mesh(mesh):
        state = jax.device_put(states[0], shardings)
        for index, phase in enumerate(phases):
            step = program.compile(program.trace_train_step(phase))
            rows = host_batch(config, phase=phase.index, seed=index)
            split = {k: v.reshape(config.mesh.accumulation, -1, v.shape[-1]) for k, v in rows.items()}
            sharding = batch_sharding(mesh, program.rules_for(phase))
            state, metrics = step(state, jax.device_put(split, sharding), np.float32(0.01))
            metrics_of_steps.append(jax.device_get(metrics))
            states.append(jax.device_get(state))
        padding = jax.device_put({**split, "weights_BT": np.zeros_like(split["weights_BT"])}, sharding)
        without_targets = jax.device_get(step(jax.device_put(states[-1], shardings), padding, np.float32(0.01)))
        sums = {}
        if num_phases == 2:
            heldout = jax.device_put(rows, evaluation_sharding(mesh))
            sums = jax.jit(make_eval_step(model, loss_chunk=config.model.loss_chunk))(state.params, heldout)
    return Run(
        metrics=metrics_of_steps,
        params=[state.params for state in states],
        states=states,
        without_targets=without_targets,
        sums=jax.device_get(sums),
        text=step.as_text(),
    )


@pytest.fixture(scope="module")
def single():
    return run(tiny_config(), devices=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, tensor, context, accumulation, num_phases",
    [
        (1, 1, 1, 8, 1),
        *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((8, 1, 4, 4, 1), (8, 2, 2, 4, 2))),
    ],
)
def test_every_mesh_and_accumulation_gives_the_same_step(single, devices, tensor, context, accumulation, num_phases):
    config = tiny_config(mesh__tensor=tensor, mesh__context=context, mesh__accumulation=accumulation)
    result = run(config, devices=devices, num_phases=num_phases, initial=single.states[0])
    assert_same_steps(result, single, num_phases=num_phases)


@pytest.mark.slow
def test_two_slices_give_the_same_step_and_exchange_gradients_alone(single):
    config = tiny_config(mesh__tensor=2, mesh__context=1, mesh__accumulation=2)
    result = run(config, devices=8, slices=2, initial=single.states[0])
    assert_same_steps(result, single, num_phases=2)
    crossing, within = set(), set()
    for kind, attributes in re.findall(r" (all-[a-z-]+|reduce-scatter)\((.*replica_groups=.*)", result.text):
        slices_of_groups = device_groups(attributes) // 4
        (crossing if (slices_of_groups != slices_of_groups[:, :1]).any() else within).add(kind)
    assert crossing == {"all-reduce"} and {"all-gather", "reduce-scatter", "all-to-all"} <= within


@pytest.mark.slow
def test_gradients_that_are_summed_in_bfloat16_are_the_same_but_for_its_rounding(single):
    config = tiny_config(mesh__gradient_dtype="bfloat16", mesh__context=2, mesh__tensor=2)
    result = run(config, devices=8, num_phases=1, initial=single.states[0])
    np.testing.assert_allclose(result.metrics[0]["loss"], single.metrics[0]["loss"], rtol=1e-6)
    found_mu, expected_mu = (jax.tree.leaves(adam_mu(part.states[1].opt_state)) for part in (result, single))
    table = jax.tree.leaves(make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1)).table)
    for info, found, expected in zip(table, found_mu, expected_mu, strict=True):
        error = np.abs(found - expected).max() / np.abs(expected).max()
        if "embed" in info.axes:  # the sum of two or more numbers with 8 bits, of which the greatest has half a unit
            assert 1e-4 < error < 2**-7, (info, error)
        elif np.abs(expected).max() > 1e-9:
            assert error < 1e-3, (info, error)


def assert_same_steps(result: Run, single: Run, *, num_phases: int) -> None:
    for found, expected in zip(result.metrics, single.metrics[:num_phases], strict=True):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"grad_norm/key_bias"}:  # rounding noise
            # Adam turns a gradient of rounding size into a step of full size: the second step is compared more loosely.
            value = expected[name]
            np.testing.assert_allclose(found[name], value, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(result.metrics[0]["loss"], single.metrics[0]["loss"], rtol=1e-6)
    np.testing.assert_allclose(result.metrics[0]["grad_norm"], single.metrics[0]["grad_norm"], rtol=1e-5)
    for name in result.sums:
        np.testing.assert_allclose(result.sums[name], single.sums[name], rtol=1e-3, err_msg=name)
    assert_unchanged_without_targets(result)
    # The floor is for the key bias, whose true gradient is zero: softmax ignores what it adds to every score of a row.
    # Gradients themselves: after one moment update from zero, mu is (1 - beta1) times the clipped gradient.
    found_mu, expected_mu = (adam_mu(part.states[num_phases].opt_state) for part in (result, single))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max() + 1e-9, rtol=0), found_mu, expected_mu
    )


def assert_unchanged_without_targets(result: Run) -> None:
    """Only the count of steps moves: parameters, moments and Adam's own count are the same to the bit."""
    state, metrics = result.without_targets
    last = result.states[-1]
    assert state.step == last.step + 1 == len(result.params)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (last.params, last.opt_state))
    assert metrics["weight"] == 0 and all(metrics[name] == 0 for name in metrics)


def test_the_key_bias_stays_where_it_is(single):
    for metrics in single.metrics:
        assert metrics["update_norm/key_bias"] == 0 < metrics["grad_norm/key_bias"] < 1e-5 * metrics["grad_norm/bias"]
    before, *later = (
        [tree["blocks"]["attention"][name]["bias"] for name in ("key", "query")] for tree in single.params
    )
    for key, query in later:
        np.testing.assert_array_equal(key, before[0])
        assert (query != before[1]).mean() > 0.9


def test_a_batch_without_targets_changes_nothing(single):
    assert_unchanged_without_targets(single)


def adam_mu(opt_state):
    return next(part.mu for part in opt_state if hasattr(part, "mu"))


def test_tokens_and_not_micro_batches_are_weighted(single):
    config = tiny_config()
    rows = host_batch(config, phase=0, seed=0)
    assert single.metrics[0]["weight"] == rows["weights_BT"].sum()
    by_quarter = rows["weights_BT"].reshape(4, -1).sum(1)
    assert by_quarter.max() > 1.2 * by_quarter.min()  # otherwise the accumulation test could not tell


@pytest.fixture(scope="module")
def plain():
    """Return (a function of parameters and rows, the class of each leaf): the model on one device, all its logits.

    The function gives the mean loss of a token, its gradients, and losses_BT.
    """
    config = tiny_config()
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    model = make_model(config.model, make_parametrization(config.mup, config.model))

    def mean_loss(params, rows):
        hidden_BTD = model.apply({"params": params}, rows["inputs_BT"])
        hidden_BTD = jax.sharding.reshard(hidden_BTD, PartitionSpec())
        logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, params["embedding"]["embedding"], precision="highest")
        log_probability_BTV = jax.nn.log_softmax(logits_BTV * model.parametrization.output_scale)
        losses_BT = -jnp.take_along_axis(log_probability_BTV, rows["targets_BT"][..., None], -1)[..., 0]
        return (losses_BT * rows["weights_BT"]).sum() / rows["weights_BT"].sum(), losses_BT

    differentiate = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))

    def of(params, rows):
        batch, length = rows["inputs_BT"].shape  # filled up, without weights, to one shape: it is compiled once
        filled = {name: np.pad(leaf, ((0, 16 - batch), (0, 48 - length))) for name, leaf in rows.items()}
        (loss, losses_BT), grads = jax.device_get(differentiate(params, filled))
        return loss, grads, losses_BT[:batch, :length]

    with jax.set_mesh(mesh):
        yield of, jax.tree.map(lambda info: info.rule.parameter_class, parameter_table(model, mesh))


def norms_of_classes(tree, classes) -> dict:
    """Return, in float64, the norm of all the leaves of each class together."""
    squares = dict.fromkeys(CLASSES, 0.0)
    for leaf, name in zip(jax.tree.leaves(tree), jax.tree.leaves(classes), strict=True):
        squares[name] += np.square(np.asarray(leaf, np.float64)).sum()
    return {name: value**0.5 for name, value in squares.items()}


@pytest.mark.slow
def test_metrics_are_those_of_the_plain_loss(single, plain):
    of, classes = plain
    loss, grads, _ = of(single.params[0], host_batch(tiny_config(), phase=0, seed=0))
    found = single.metrics[0]
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    norms = norms_of_classes(grads, classes)
    np.testing.assert_allclose(found["grad_norm"], np.linalg.norm(list(norms.values())), rtol=1e-4)
    for name, norm in norms.items():
        floor = 1e-6 * found["grad_norm"]  # the key bias has none but rounding noise
        np.testing.assert_allclose(found[f"grad_norm/{name}"], norm, rtol=1e-3, atol=floor, err_msg=name)
    for step, found in enumerate(single.metrics):
        moved = jax.tree.map(np.subtract, single.params[step + 1], single.params[step])
        for name, norm in norms_of_classes(moved, classes).items():
            np.testing.assert_allclose(found[f"update_norm/{name}"], norm, rtol=1e-3, err_msg=name)
    assert single.states[-1].step == len(single.metrics) == len(single.states) - 1 == 2
    assert found.keys() == {"loss", "weight", "grad_norm", "skips"} | {
        f"{kind}_norm/{name}" for kind in ("grad", "update") for name in CLASSES
    }


def test_evaluation_sums_the_plain_losses(single, plain):
    rows = host_batch(tiny_config(), phase=1, seed=1)
    losses_BT = np.asarray(plain[0](single.params[2], rows)[2], np.float64) * rows["weights_BT"]
    expected = {"loss_B": losses_BT.sum(1), "loss_T": losses_BT.sum(0)}
    expected |= {"weight_B": rows["weights_BT"].sum(1), "weight_T": rows["weights_BT"].sum(0)}
    assert single.sums.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(single.sums[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.slow
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


@pytest.mark.slow
def test_tied_embedding_gradients_are_finite_and_equal_across_batch_shapes_under_remat(single):
    """The guard for jax issue 35409: one executable a batch shape, tied table, remat."""
    config = tiny_config(model__remat="full")
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    table = parameter_table(model, mesh)
    optimizer = make_optimizer(config.optimizer, table)
    norms = []
    state = jax.device_put(
        single.states[0], jax.tree.map(lambda leaf: leaf.sharding, abstract_state(table, optimizer, mesh))
    )
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(model, optimizer, table, loss_chunk=20, rule=TAKE_FINITE))
        rows = host_batch(config, phase=1, seed=3)
        for length in (48, 24, 48):  # the second half of each row carries no weight, so a shorter row is the same loss
            cut = {k: v[None, :, :length].copy() for k, v in rows.items()}
            cut["weights_BT"][..., 24:] = 0
            _, metrics = step(state, jax.device_put(cut, batch_sharding(mesh, RULES)), 0.01)
            norms.append(float(metrics["grad_norm/embedding"]))
    assert np.isfinite(norms).all() and norms[0] == norms[2]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)


def test_abstract_batch_names_the_leaves_of_a_batch():
    config = tiny_config()
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    rows = {k: v[None] for k, v in host_batch(config, phase=0, seed=0).items()}
    abstract = abstract_batch(rows["inputs_BT"].shape, batch_sharding(mesh, RULES), document_mask=False)
    assert {k: (v.shape, v.dtype) for k, v in abstract.items()} == {k: (v.shape, v.dtype) for k, v in rows.items()}
