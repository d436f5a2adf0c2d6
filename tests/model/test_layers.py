"""LayerNorm against float64 whatever a row's mean is, and multipliers that bfloat16 cannot hold."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.decode.cpu_forward import _norm
from btlm_jax.hub import numpy_network
from btlm_jax.model import init_params, make_model
from btlm_jax.model.layers import normalise, scale
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.mup import make_parametrization

EPS, D = 1e-5, 320


def exact(x, scale_D, bias_D, dy):
    """y and the gradients of x, scale and bias, in float64, from the definition (arXiv:1607.06450)."""
    x, scale_D, bias_D, dy = (np.asarray(array, np.float64) for array in (x, scale_D, bias_D, dy))
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPS)
    normal, dnormal = centred * inverse, dy * scale_D
    dx = inverse * (dnormal - dnormal.mean(-1, keepdims=True) - normal * (dnormal * normal).mean(-1, keepdims=True))
    return normal * scale_D + bias_D, dx, (dy * normal).sum((0, 1)), dy.sum((0, 1))


@jax.jit
def normalise_and_gradients(x, scale_D, bias_D, dy):
    y, vjp = jax.vjp(lambda *inputs: normalise(EPS, *inputs), x, scale_D, bias_D)
    return y, *vjp(dy)


@jax.jit
def generating(x_RD, scale_D, bias_D):
    return _norm(x_RD, scale_D, bias_D, eps=EPS)


def error(found, expected) -> float:
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def rows(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 9, D))
    if kind == "one channel":  # nearly all of the row's variance, and where the shift is taken from
        x[..., 0] += 3000
    elif kind == "first channels":
        x[..., :128] += rng.choice([-1, 1], size=(2, 9, 1)) * 500
    else:
        x = (x + float(kind)) * 0.07
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", ["0", "-30", "300", "3000", "-10000", "one channel", "first channels"])
def test_layer_norm_is_exact_whatever_the_mean_of_a_row_is(kind):
    rng = np.random.default_rng(4)
    x, dy = rows(kind), rng.normal(size=(2, 9, D)).astype(np.float32)
    scale_D, bias_D = (1 + 0.1 * rng.normal(size=D)).astype(np.float32), (0.1 * rng.normal(size=D)).astype(np.float32)
    expected = exact(x, scale_D, bias_D, dy)
    results = normalise_and_gradients(x, scale_D, bias_D, dy)
    for name, found, value in zip(("y", "dx", "dscale", "dbias"), results, expected, strict=True):
        assert error(found, value) < 1e-6, name
    config = types.SimpleNamespace(layer_norm_epsilon=EPS)
    assert error(numpy_network.layer_norm(config, x, scale_D, bias_D), expected[0]) < 1e-6
    assert error(generating(x.reshape(-1, D), scale_D, bias_D), expected[0].reshape(-1, D)) < 1e-6


def test_a_multiplier_is_exact_in_bfloat16():
    x = np.random.default_rng(5).normal(size=4096).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) * 14.6
    found = np.asarray(jax.jit(lambda x: scale(x, 14.6))(x), np.float64)
    assert np.abs(found / exact - 1).max() < 2**-8  # half a unit in the last place of 8 bits
    assert abs((found / exact).mean() - 1) < 1e-4  # 14.625 / 14.6 is 1.0017


@pytest.mark.slow
def test_a_bfloat16_network_has_its_multipliers():
    """The residual stream after a block is what its parts make with the exact multipliers, on average over many."""
    config = tiny_config(model__dtype="bfloat16", model__num_layers=3, mup__preset="completep", mup__base_num_layers=1)
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    assert (model.parametrization.embedding_scale, model.parametrization.residual_scale) == (14.6, 1 / 3)
    ids = np.random.default_rng(6).integers(0, config.model.vocab_size, (4, 48)).astype(np.int32)

    @jax.jit
    def run(params, ids):
        return model.apply({"params": params}, ids, capture_intermediates=True, mutable=["intermediates"])[1]

    params = init_params(model, mesh, seed=0)
    with jax.set_mesh(mesh):
        kept = jax.device_get(run(params, ids))["intermediates"]
    blocks, embedded = kept["blocks"], kept["embedding"]["__call__"][0].astype(np.float64)
    branches = sum(blocks[name]["__call__"][0][0].astype(np.float64) for name in ("attention", "mlp"))
    after = blocks["__call__"][0][0][0].astype(np.float64)
    parts = np.stack([embedded.ravel(), branches.ravel()], axis=1)
    embedding, residual = np.linalg.lstsq(parts, after.ravel(), rcond=None)[0]
    assert embedding == pytest.approx(14.6, rel=5e-4)  # 14.625 / 14.6 is 1.0017
    assert residual == pytest.approx(1 / 3, rel=2e-2)  # there, and once; the stream's roundings hide more
