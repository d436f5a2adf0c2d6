"""What a CPU computes in a form of its own: SwiGLU, the loss and transpositions in C++, bfloat16 as bits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax import kernels
from btlm_jax.kernels.build import has_training_kernels
from btlm_jax.model import init_params, loss, projection, transformer
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import RULES
from btlm_jax.train.program import make_program
from btlm_jax.train.step import make_gradients

ROUNDING = {jnp.float32: 1e-6, jnp.bfloat16: 2.0**-8}
SPEC = RULES.spec("batch", "length", "act_mlp")


@pytest.fixture(autouse=True)
def mesh():
    assert has_training_kernels()
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (65, 130), (200, 77)])
def test_a_transposition_moves_bits(dtype, shape):
    assert has_training_kernels()
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype).at[0, 0].set(jnp.nan)
    bits = np.uint16 if dtype == jnp.bfloat16 else np.uint32
    np.testing.assert_array_equal(np.asarray(kernels.transpose(x)).view(bits), np.asarray(x).T.copy().view(bits))


def test_other_dtypes_are_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="the kernels of training take float32 and bfloat16"):
        jax.block_until_ready(kernels.transpose(jnp.zeros((2, 3), jnp.float16)))


def swiglu_by_formula(up, gate, dy):
    up, gate, dy = (np.asarray(x, np.float64) for x in (up, gate, dy))
    with np.errstate(over="ignore", invalid="ignore"):
        sigmoid = 1 / (1 + np.exp(-gate))
        silu = gate * sigmoid
        return up * silu, dy * silu, dy * up * (sigmoid + silu * (1 - sigmoid))


def swiglu_and_gradients(*arrays):
    up, gate, dy = (jax.sharding.reshard(x, SPEC) for x in arrays)
    y, pull = jax.vjp(functools.partial(kernels.swiglu, SPEC), up, gate)
    return y, *pull(dy)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("F", [1, 16, 37, 8193])
def test_swiglu_and_its_gradients_are_the_formula_rounded_once(dtype, F):
    up, gate, dy = (jnp.asarray(3 * x, dtype) for x in np.random.default_rng(F).normal(size=(3, 1, 2, F)))
    gate = gate.at[0, 0, 0].set(-1000.0).at[0, 1, 0].set(1000.0)
    for found, expected in zip(swiglu_and_gradients(up, gate, dy), swiglu_by_formula(up, gate, dy), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=ROUNDING[dtype], atol=3e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_swiglu_hides_nothing_that_is_not_finite(which, value):
    arrays = list(np.random.default_rng(0).normal(size=(3, 1, 1, 37)).astype(np.float32))
    arrays[which][..., 20] = value
    found = [np.isfinite(x).all((0, 1)) for x in swiglu_and_gradients(*map(jnp.asarray, arrays))]
    expected = [np.isfinite(x).all((0, 1)) for x in swiglu_by_formula(*arrays)]
    reached = (0, 1) if which == 2 else (0, 2) if which == 0 else (0, 1, 2)
    for number, (ours, true) in enumerate(zip(found, expected, strict=True)):
        assert np.delete(ours, 20).all()
        assert ours[20] == true[20] or number not in reached


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_loss_hides_nothing_that_is_not_finite(value):
    hidden = np.ones((1, 3, 4), np.float32)
    hidden[0, 1] = value
    table, targets, weights = (
        np.eye(40, 4, dtype=np.float32),
        np.full((1, 3), 39, np.int32),
        np.ones((1, 3), np.float32),
    )
    run = jax.value_and_grad(functools.partial(loss.loss_sum, output_scale=1.0, chunk=3, rules=RULES), argnums=(0, 1))
    total, (grad_BTD, grad_VD) = jax.jit(run)(hidden, table, targets, weights)
    assert not np.isfinite(total) and not np.isfinite(grad_VD).all()
    assert not np.isfinite(grad_BTD[0, 1]).any() and np.isfinite(grad_BTD[0, ::2]).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_kernels_gradients_are_the_same(mesh, monkeypatch, dtype):
    """XLA's forms, which TPUs and GPUs have, against those of the C++ kernels."""
    config = tiny_config(model__dtype=dtype, model__remat="none")
    program = make_program(config, mesh)
    params = init_params(program.model, mesh, seed=0)
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, config.model.vocab_size, (2, 2, 24)).astype(np.int32)
    batch = {"inputs_BT": inputs[None], "targets_BT": targets[None], "weights_BT": np.ones((1, 2, 24), np.float32)}

    def gradients():
        return jax.jit(make_gradients(program.model, program.table, loss_chunk=8))(params, batch)

    found = gradients()
    for module in (loss, projection, transformer):
        monkeypatch.setattr(module, "are_for_training", lambda: False)
    expected = gradients()
    limit = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(found[0], expected[0], rtol=limit)
    for ours, true in zip(jax.tree.leaves(found[2]), jax.tree.leaves(expected[2]), strict=True):
        assert np.linalg.norm(ours - true) <= limit * np.linalg.norm(true) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention_saved", "matmuls_saved"])
def test_what_is_saved_is_bits_and_attention_runs_forward_once(mesh, remat):
    config = tiny_config(model__dtype="bfloat16", model__remat=remat)
    program = make_program(config, mesh)
    text = program.compile(program.trace_train_step(config.curriculum.table.phases[0])).as_text()
    calls = re.findall(r'custom_call_target="(btlm_causal_\w+)"', text)
    assert sorted(calls) == ["btlm_causal_backward", "btlm_causal_forward"]
    layers = config.model.num_layers
    saved = set(re.findall(rf"u16\[{layers},\d+,\d+,[\d,]+\]", text))
    assert len(saved) >= 1 and not re.findall(rf"f32\[{layers},\d+,\d+,{config.model.d_ff}\]", text)
