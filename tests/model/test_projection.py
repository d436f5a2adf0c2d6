"""Projections and the lookup: values and gradients on any mesh, in both layouts, against plain float64 products."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from support.initial import params_on
from support.tiny import tiny_config

from btlm_jax.model import make_model
from btlm_jax.model.layers import look_up
from btlm_jax.model.projection import Projection, make_projection, padded_shape, project_plain, project_scheduled
from btlm_jax.parallel.make_mesh import make_mesh, make_run_mesh
from btlm_jax.parallel.mesh import RULES, batch_sharding, device_head_order
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.train.program import make_program
from btlm_jax.train.step import make_state

B, T, D = 4, 6, 16
MESHES = [(1, 1, 1, 1), (4, 1, 1, 2), (1, 2, 1, 4), (2, 1, 2, 2)]  # fsdp, batch_or_context, context, tensor
IMPLEMENTATIONS = {"plain": project_plain, "scheduled": project_scheduled}
SIDES = {  # hidden shape, its axes, and letters for einsum
    "heads": ((8, 80), ("heads", "head_dim"), "NH"),
    "mlp": ((70,), ("mlp",), "F"),  # divides by 2 only
}


def on_a(platform: str):
    """Lay activations out as on a platform: a TPU's tiles are emulated here."""
    return mock.patch("btlm_jax.model.projection.platform", return_value=platform)


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    _, batch_or_context, context, tensor = shape
    devices = jax.devices()[: math.prod(shape)]
    return make_mesh(devices=devices, tensor=tensor, context=context, batch_or_context=batch_or_context)


def projection_of(side: str, *, is_from_model_dim: bool) -> Projection:
    """On the current mesh."""
    shape, axes, _ = SIDES[side]
    ends = [((D,), ("embed",)), (shape, axes)]
    (in_shape, in_axes), (out_shape, out_axes) = ends if is_from_model_dim else ends[::-1]
    return make_projection(in_shape=in_shape, in_axes=in_axes, out_shape=out_shape, out_axes=out_axes, rules=RULES)


def widened(x, shape: tuple[int, ...]):
    return np.pad(x, [(0, 0), (0, 0), *((0, new - old) for old, new in zip(x.shape[2:], shape, strict=True))])


def values_and_gradients(project, projection: Projection, x, kernel, bias, dy, *, dtype) -> dict:
    """Compile y and the gradients for dy, of arrays that are whole here; x and dy are rounded to `dtype`."""
    mesh = jax.sharding.get_mesh()
    specs = (projection.x_spec, projection.kernel_spec, projection.bias_spec, projection.y_spec)
    dtypes = (dtype, jnp.float32, jnp.float32, dtype)
    arguments = [
        jax.device_put(value.astype(np.float32), NamedSharding(mesh, spec)).astype(dtype)
        for value, spec, dtype in zip((x, kernel, bias, dy), specs, dtypes, strict=True)
    ]

    @jax.jit
    def run(x, kernel, bias, dy):
        y, pull = jax.vjp(lambda *inputs: project(projection, *inputs), x, kernel, bias)
        return y, *pull(dy)

    results = run(*arguments)
    assert [result.dtype for result in results] == [dtype, dtype, jnp.float32, jnp.float32]
    names = ("y", "dx", "dkernel", "dbias")
    return {name: np.asarray(value, np.float32) for name, value in zip(names, results, strict=True)}


def cases():
    """Yield each mesh with each platform and implementation; of those two, sides and directions each four meet once."""
    for number, mesh_shape in enumerate(MESHES):
        for i, implementation in enumerate(IMPLEMENTATIONS):
            for p, platform in enumerate(("cpu", "tpu")):
                side = list(SIDES)[(number + i + p) % 2]
                yield implementation, mesh_shape, platform, side, bool((number // 2 + i) % 2)


@pytest.mark.parametrize("implementation, mesh_shape, platform, side, is_from_model_dim", list(cases()))
def test_values_and_gradients_equal_the_product_in_float64(
    implementation, mesh_shape, platform, side, is_from_model_dim
):
    mesh = mesh_of(mesh_shape)
    with on_a(platform), jax.set_mesh(mesh):
        projection = projection_of(side, is_from_model_dim=is_from_model_dim)
        in_shape, out_shape = ((D,), SIDES[side][0])[:: 1 if is_from_model_dim else -1]
        rng = np.random.default_rng(0)
        x, dy = rng.normal(size=(B, T, *in_shape)), rng.normal(size=(B, T, *out_shape))
        kernel, bias = rng.normal(size=(*in_shape, *out_shape)), rng.normal(size=out_shape)
        letters = SIDES[side][2]
        i, o = ("D", letters) if is_from_model_dim else (letters, "D")
        expected = {
            "y": np.einsum(f"BT{i},{i}{o}->BT{o}", x, kernel) + bias,
            "dx": np.einsum(f"BT{o},{i}{o}->BT{i}", dy, kernel),
            "dkernel": np.einsum(f"BT{i},BT{o}->{i}{o}", x, dy),
            "dbias": dy.sum((0, 1)),
        }
        shape = padded_shape(projection.hidden_shape, tensor=mesh.shape["tensor"])
        order = device_head_order(shape[0], RULES, mesh=mesh) if side == "heads" else np.arange(shape[0])
        if is_from_model_dim:
            dy = widened(dy, shape)[:, :, order]
        else:
            x = widened(x, shape)[:, :, order]
        project = IMPLEMENTATIONS[implementation]
        values = values_and_gradients(project, projection, x, kernel, bias, dy, dtype=jnp.float32)
    hidden = "y" if is_from_model_dim else "dx"
    values[hidden] = values[hidden][:, :, np.argsort(order)]
    cut = tuple(slice(size) for size in expected[hidden].shape)
    if is_from_model_dim:  # what is beyond the kernel is zero
        assert np.count_nonzero(values["y"]) == np.count_nonzero(values["y"][cut])
    values[hidden] = values[hidden][cut]
    for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("is_from_model_dim", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_the_scheduled_product_in_bfloat16_is_the_plain_one_rounded(side, is_from_model_dim):
    rng = np.random.default_rng(1)
    with jax.set_mesh(mesh_of((2, 1, 2, 2))):
        projection = projection_of(side, is_from_model_dim=is_from_model_dim)
        in_shape, out_shape = ((D,), projection.padded_shape)[:: 1 if is_from_model_dim else -1]
        stored_in, stored_out = ((D,), projection.hidden_shape)[:: 1 if is_from_model_dim else -1]
        x, dy = rng.normal(size=(B, T, *in_shape)), rng.normal(size=(B, T, *out_shape))
        kernel, bias = rng.normal(size=(*stored_in, *stored_out)), rng.normal(size=stored_out)
        plain, scheduled = (
            values_and_gradients(project, projection, x, kernel, bias, dy, dtype=jnp.bfloat16)
            for project in (project_plain, project_scheduled)
        )
    for name, value in scheduled.items():
        largest = np.abs(plain[name]).max()
        # y and dx are rounded to bfloat16, partial sums of a split hidden dim before they are summed too
        atol = largest * (2.0**-7 if name in ("y", "dx") else 1e-6)
        np.testing.assert_allclose(value, plain[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_a_model_of_plain_projections_has_the_same_hidden_states_and_gradients():
    config = tiny_config(mesh__tensor=2)
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:4])
    program = make_program(config, mesh)
    params = params_on(mesh, program.model, seed=3)
    inputs = np.random.default_rng(4).integers(0, config.model.vocab_size, (1, B, 24)).astype(np.int32)
    with jax.set_mesh(mesh):
        (inputs_BT,) = jax.device_put(inputs, batch_sharding(mesh, RULES))

        @functools.partial(jax.jit, static_argnums=0)
        def hidden_and_gradients(project):
            model = make_model(config.model, make_parametrization(config.mup, config.model), project=project)
            hidden_BTD, pull = jax.vjp(lambda params: model.apply({"params": params}, inputs_BT), params)
            return hidden_BTD, pull(hidden_BTD)[0]

        plain, scheduled = (hidden_and_gradients(project) for project in IMPLEMENTATIONS.values())
    np.testing.assert_allclose(scheduled[0], plain[0], rtol=1e-4, atol=1e-4)
    for (path, expected), value in zip(jax.tree.leaves_with_path(plain[1]), jax.tree.leaves(scheduled[1]), strict=True):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name:  # which is rounding noise (LOG.md, 2026-11-23)
            assert np.linalg.norm(value - expected) < 0.01 * np.linalg.norm(expected), name


def test_what_a_tpu_pads():
    with on_a("tpu"):
        assert padded_shape((6826,), tensor=1) == (6912,)
        assert padded_shape((6826,), tensor=4) == (7168,)
        assert padded_shape((32, 80), tensor=4) == (32, 80)  # side by side they fill tiles
        assert padded_shape((48,), tensor=1) == (48,)  # more than twice as wide would be too much
    with on_a("cpu"):
        assert padded_shape((6826,), tensor=1) == (6826,)
        assert padded_shape((6826,), tensor=4) == (6828,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_bfloat16_products_are_summed_in_float32(implementation):
    """Over many devices, 1 + 2^-9 + 2^-9 + ...: in bfloat16 every addition would be lost."""
    x = np.full((8, 1, D), 2.0**-9, np.float32)
    x[0] = 1
    with jax.set_mesh(make_mesh(devices=jax.devices(), tensor=1)):
        projection = projection_of("mlp", is_from_model_dim=True)
        values = values_and_gradients(
            IMPLEMENTATIONS[implementation], projection, x, np.zeros((D, 70)), np.zeros(70), np.ones((8, 1, 70)),
            dtype=jnp.bfloat16,
        )  # fmt: skip
    assert np.all(values["dkernel"] == 1 + 7 * 2.0**-9) and np.all(values["dbias"] == 8)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", MESHES)
def test_the_lookup_and_its_gradient(mesh_shape):
    mesh = mesh_of(mesh_shape)
    rng = np.random.default_rng(1)
    table_VD, inputs_BT = rng.normal(size=(37, D)).astype(np.float32), rng.integers(0, 9, (B, T))
    dx_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    with jax.set_mesh(mesh):
        stored = jax.device_put(table_VD, NamedSharding(mesh, RULES.spec("vocab", "embed")))
        inputs = jax.device_put(inputs_BT, NamedSharding(mesh, RULES.spec("batch", "length")))
        given = jax.device_put(dx_BTD, NamedSharding(mesh, RULES.spec("batch", "length", "act_embed")))

        @jax.jit
        def run(stored, inputs, given):
            x_BTD, pull = jax.vjp(lambda table: look_up(RULES, jnp.dtype("float32"), table, inputs), stored)
            return x_BTD, *pull(given)

        x_BTD, grad_VD = run(stored, inputs, given)
    np.testing.assert_array_equal(x_BTD, table_VD[inputs_BT])
    expected_VD = np.zeros((37, D))
    np.add.at(expected_VD, inputs_BT, dx_BTD)
    np.testing.assert_allclose(grad_VD, expected_VD, atol=1e-5)


@pytest.mark.slow
def test_a_step_in_a_tpus_layout_is_the_same_step():
    """Positions split in two and exchanged for heads, in the layout that the TPU's kernels take, and plain ones."""
    changes = dict(
        model__d_model=160, model__num_heads=2, model__d_ff=70, model__remat="matmuls_saved", mup__base_d_model=80.0,
        curriculum__seq_len=(24, 48), mesh__context=2,
    )  # fmt: skip
    config = tiny_config(**changes)
    phase = config.curriculum.table.phases[0]
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, config.model.vocab_size, (1, phase.batch_size, phase.seq_len + 1)).astype(np.int32)
    batch = {"inputs_BT": tokens[..., :-1], "targets_BT": tokens[..., 1:]}
    batch["weights_BT"] = np.ones(batch["inputs_BT"].shape, np.float32)

    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:2])
    program = make_program(config, mesh)
    initial = jax.device_get(make_state(params_on(mesh, program.model, seed=3), program.optimizer, mesh))

    def step(platform: str, attention: str):
        with on_a(platform), jax.set_mesh(mesh):
            program = make_program(tiny_config(**changes, model__attention=attention), mesh)
            compiled = program.compile(program.trace_train_step(phase))
            state = jax.device_put(initial, jax.tree.map(lambda leaf: leaf.sharding, program.state))
            state, metrics = compiled(state, jax.device_put(batch), np.float32(0.01))
        return jax.device_get(metrics)

    plain, tiled = step("cpu", "reference"), step("tpu", "tpu")
    assert plain.pop("grad_norm/key_bias") < 1e-6 * plain["grad_norm"] > tiled["grad_norm/key_bias"]  # its truth is 0
    for name, value in plain.items():
        np.testing.assert_allclose(tiled[name], value, rtol=1e-3 if "update" in name else 1e-4, err_msg=name)
