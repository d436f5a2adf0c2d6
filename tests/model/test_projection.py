"""Projections and the lookup: values and gradients on any mesh, in both layouts, against plain float64 products."""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from support.tiny import tiny_config

from btlm_jax.model.lookup import look_up
from btlm_jax.model.projection import Projection, heads_as_held, project, used_shape
from btlm_jax.parallel.mesh import RULES, make_mesh, make_run_mesh
from btlm_jax.train.program import make_program
from btlm_jax.train.step import init_state

B, T, D = 4, 6, 16
MESHES = [(1, 1, 1, 1), (4, 1, 1, 2), (1, 2, 1, 4), (2, 1, 2, 2)]  # fsdp, shared, context, tensor
SIDES = {  # hidden shape, its axes, and letters for einsum
    "heads": ((8, 80), ("heads", "head_dim"), "NH"),
    "mlp": ((70,), ("mlp",), "F"),  # divides by 2 only
}


def on_a(platform: str):
    """Lay activations out as on a platform: a TPU's tiles are emulated here."""
    return mock.patch("btlm_jax.model.projection.platform", return_value=platform)


def projection_of(side: str, *, is_from_model_dim: bool) -> Projection:
    shape, axes, _ = SIDES[side]
    ends = [((D,), ("embed",)), (shape, axes)]
    (in_shape, in_axes), (out_shape, out_axes) = ends if is_from_model_dim else ends[::-1]
    return Projection(in_shape=in_shape, in_axes=in_axes, out_shape=out_shape, out_axes=out_axes, rules=RULES)


def widened(x, shape: tuple[int, ...]):
    return np.pad(x, [(0, 0), (0, 0), *((0, new - old) for old, new in zip(x.shape[2:], shape, strict=True))])


@pytest.mark.parametrize("is_from_model_dim", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("mesh_shape", MESHES)
def test_values_and_gradients_equal_the_plain_product(mesh_shape, platform, side, is_from_model_dim):
    fsdp, shared, context, tensor = mesh_shape
    mesh = make_mesh(devices=jax.devices()[: math.prod(mesh_shape)], tensor=tensor, context=context, shared=shared)
    projection = projection_of(side, is_from_model_dim=is_from_model_dim)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, *projection.in_shape))
    kernel = rng.normal(size=(*projection.in_shape, *projection.out_shape))
    bias = rng.normal(size=projection.out_shape)
    dy = rng.normal(size=(B, T, *projection.out_shape))
    letters = SIDES[side][2]
    i, o = ("D", letters) if is_from_model_dim else (letters, "D")
    expected = (
        np.einsum(f"BT{i},{i}{o}->BT{o}", x, kernel) + bias,
        np.einsum(f"BT{o},{i}{o}->BT{i}", dy, kernel),
        np.einsum(f"BT{i},BT{o}->{i}{o}", x, dy),
        dy.sum((0, 1)),
    )
    with on_a(platform), jax.set_mesh(mesh):
        used = used_shape(projection.hidden_shape, tensor=tensor)
        held = heads_as_held(used[0], RULES, mesh=mesh) if side == "heads" else np.arange(used[0])
        if is_from_model_dim:
            dy = widened(dy, used)[:, :, held]
        else:
            x = widened(x, used)[:, :, held]
        x_spec, kernel_spec, bias_spec, y_spec = projection.specs()
        arguments = [
            jax.device_put(value.astype(np.float32), NamedSharding(mesh, spec))
            for value, spec in ((x, x_spec), (kernel, kernel_spec), (bias, bias_spec), (dy, y_spec))
        ]

        @jax.jit
        def run(x, kernel, bias, dy):
            y, pull = jax.vjp(lambda *inputs: project(projection, *inputs), x, kernel, bias)
            return y, *pull(dy)

        found = run(*arguments)
    y, dx, dkernel, dbias = (np.asarray(value) for value in found)
    if is_from_model_dim:
        y = y[:, :, np.argsort(held)]
    else:
        dx = dx[:, :, np.argsort(held)]
    cut_y, cut_x = (
        tuple(slice(size) for size in (B, T, *shape)) for shape in (projection.out_shape, projection.in_shape)
    )
    if is_from_model_dim:  # what is beyond the kernel is zero
        assert np.count_nonzero(y) == np.count_nonzero(y[cut_y])
    values = {"y": y[cut_y], "dx": dx[cut_x], "dkernel": dkernel, "dbias": dbias}
    for (name, value), true in zip(values.items(), expected, strict=True):
        np.testing.assert_allclose(value, true, rtol=1e-4, atol=1e-4, err_msg=name)


def test_what_a_tpu_pads():
    with on_a("tpu"):
        assert used_shape((6826,), tensor=1) == (6912,)
        assert used_shape((6826,), tensor=4) == (7168,)
        assert used_shape((32, 80), tensor=4) == (32, 80)  # side by side they fill tiles
        assert used_shape((48,), tensor=1) == (48,)  # more than twice as wide would be too much
    with on_a("cpu"):
        assert used_shape((6826,), tensor=1) == (6826,)
        assert used_shape((6826,), tensor=4) == (6828,)


def test_gradients_of_bfloat16_products_are_summed_in_float32():
    """Over many devices, 1 + 2^-9 + 2^-9 + ...: in bfloat16 every addition would be lost."""
    mesh = make_mesh(devices=jax.devices(), tensor=1)
    projection = projection_of("mlp", is_from_model_dim=True)
    x = np.full((8, 1, D), 2.0**-9, np.float32)
    x[0] = 1
    specs = projection.specs()
    kernel = jax.device_put(np.zeros((D, 70), np.float32), NamedSharding(mesh, specs[1]))
    bias = jax.device_put(np.zeros(70, np.float32), NamedSharding(mesh, specs[2]))
    with jax.set_mesh(mesh):
        x_BTD = jax.device_put(x, NamedSharding(mesh, specs[0])).astype(jnp.bfloat16)

        def total(kernel, bias):
            return project(projection, x_BTD, kernel, bias).astype(jnp.float32).sum()

        dkernel, dbias = jax.jit(jax.grad(total, argnums=(0, 1)))(kernel, bias)
    assert dkernel.dtype == jnp.float32 and np.all(np.asarray(dkernel) == 1 + 7 * 2.0**-9)
    assert np.all(np.asarray(dbias) == 8)


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_the_lookup_and_its_gradient(mesh_shape):
    fsdp, shared, context, tensor = mesh_shape
    mesh = make_mesh(devices=jax.devices()[: math.prod(mesh_shape)], tensor=tensor, context=context, shared=shared)
    rng = np.random.default_rng(1)
    table_VD, inputs_BT = rng.normal(size=(37, D)).astype(np.float32), rng.integers(0, 9, (B, T))
    dx_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    with jax.set_mesh(mesh):
        stored = jax.device_put(table_VD, NamedSharding(mesh, RULES.spec("vocab", "embed")))
        inputs = jax.device_put(inputs_BT, NamedSharding(mesh, RULES.spec("batch", "length")))
        given = jax.device_put(dx_BTD, NamedSharding(mesh, RULES.spec("batch", "length", "act_embed")))
        x_BTD, pull = jax.vjp(lambda table: look_up(RULES, jnp.dtype("float32"), table, inputs), stored)
        (grad_VD,) = pull(given)
    np.testing.assert_array_equal(x_BTD, table_VD[inputs_BT])
    expected_VD = np.zeros((37, D))
    np.add.at(expected_VD, inputs_BT, dx_BTD)
    np.testing.assert_allclose(grad_VD, expected_VD, atol=1e-5)


def test_a_step_in_a_tpus_layout_is_the_same_step():
    """Positions split in two and exchanged for heads, in the layout that the TPU's kernels take."""
    config = tiny_config(
        model__d_model=160, model__num_heads=2, model__d_ff=70, model__attention="tpu",
        model__remat="matmuls_saved", mup__base_d_model=80.0, curriculum__seq_len=(24, 48), mesh__context=2,
    )  # fmt: skip
    phase = config.curriculum.table.phases[0]
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, config.model.vocab_size, (1, phase.batch_size, phase.seq_len + 1)).astype(np.int32)
    batch = {"inputs_BT": tokens[..., :-1], "targets_BT": tokens[..., 1:]}
    batch["weights_BT"] = np.ones(batch["inputs_BT"].shape, np.float32)

    def step(platform: str):
        mesh = make_run_mesh(config, devices=jax.devices()[:2])
        with on_a(platform), jax.set_mesh(mesh):
            program = make_program(config, mesh)
            state = init_state(program.model, program.optimizer, mesh, seed=3)
            compiled = program.compile(program.trace_train_step(phase))
            state, metrics = compiled(state, jax.device_put(batch), np.float32(0.01))
        return jax.device_get(metrics)

    plain, tiled = step("cpu"), step("tpu")
    for name, value in plain.items():
        np.testing.assert_allclose(tiled[name], value, rtol=1e-3 if "update" in name else 1e-4, err_msg=name)
