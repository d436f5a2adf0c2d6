"""The chunked cross-entropy against the plain one, with its gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax.model.loss import loss_sum, token_losses
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import RULES

B, T, D, V = 8, 12, 16, 37
SCALE = 0.7


def plain_losses(hidden_BTD, table_VD, targets_BT):
    """The definition, all logits at once."""
    log_probability_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD) * SCALE, -1)
    return -jnp.take_along_axis(log_probability_BTV, targets_BT[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden_BTD = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    table_VD = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets_BT = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights_BT = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32)
    return hidden_BTD, table_VD, targets_BT, weights_BT


@pytest.fixture(scope="module")
def plain(case):
    """The weighted sum of the plain losses, its gradients, and the losses."""

    @jax.jit
    def run(hidden_BTD, table_VD, targets_BT, weights_BT):
        def sum_and_losses(hidden_BTD, table_VD):
            losses_BT = plain_losses(hidden_BTD, table_VD, targets_BT)
            return (losses_BT * weights_BT).sum(), losses_BT

        return jax.value_and_grad(sum_and_losses, argnums=(0, 1), has_aux=True)(hidden_BTD, table_VD)

    (total, losses_BT), grads = jax.device_get(run(*case))
    return total, grads, losses_BT


@pytest.mark.parametrize(
    "layout, chunk",
    [
        *(((1, 1, 1), chunk) for chunk in (5, 6, 50)),  # 5 does not divide T, nor T on two devices
        *(((2, 2, 2), chunk) for chunk in (2, 5)),
        *((layout, 5) for layout in ((8, 1, 1), (2, 1, 4), (2, 4, 1))),
    ],
)
def test_sum_and_gradients_equal_the_plain_loss(case, plain, chunk, layout):
    expected, expected_grads, expected_BT = plain

    def chunked(hidden_BTD, table_VD, targets_BT, weights_BT):
        return loss_sum(hidden_BTD, table_VD, targets_BT, weights_BT, output_scale=SCALE, chunk=chunk, rules=RULES)

    @jax.jit
    def run(hidden_BTD, table_VD, targets_BT, weights_BT):
        losses_BT = token_losses(hidden_BTD, table_VD, targets_BT, output_scale=SCALE, chunk=chunk, rules=RULES)
        given = hidden_BTD, table_VD, targets_BT, weights_BT
        return *jax.value_and_grad(chunked, argnums=(0, 1))(*given), losses_BT

    mesh = make_mesh(devices=jax.devices()[: math.prod(layout)], context=layout[1], tensor=layout[2])
    with jax.set_mesh(mesh):
        found, found_grads, losses_BT = run(*case)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        np.testing.assert_allclose(found_grad, expected_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses_BT, expected_BT, rtol=1e-5)


def test_the_sum_without_gradients_is_the_plain_one_too(case, plain):
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1], tensor=1)):
        found = jax.jit(lambda *arrays: loss_sum(*arrays, output_scale=SCALE, chunk=5, rules=RULES))(*case)
    np.testing.assert_allclose(found, plain[0], rtol=1e-5)


def test_all_the_logits_never_exist():
    tokens, vocab, chunk = 4096, 8192, 64
    shapes = [
        jax.ShapeDtypeStruct((1, tokens, 16), jnp.float32),
        jax.ShapeDtypeStruct((vocab, 16), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.float32),
    ]
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1], tensor=1)):
        grad = jax.grad(lambda *a: loss_sum(*a, output_scale=1.0, chunk=chunk, rules=RULES), argnums=(0, 1))
        memory = jax.jit(grad).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * tokens * vocab / 8
    assert memory.temp_size_in_bytes > 4 * chunk * vocab / 8  # the measure itself sees something


def test_gradient_of_a_bfloat16_hidden_state_is_accumulated_in_float32(case):
    hidden_BTD, table_VD, targets_BT, weights_BT = case
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1], tensor=1)):
        grad = jax.grad(lambda *arrays: loss_sum(*arrays, output_scale=SCALE, chunk=1, rules=RULES), argnums=(0, 1))
        low_BTD, low_VD = jax.jit(grad)(hidden_BTD.astype(jnp.bfloat16), table_VD, targets_BT, weights_BT)
        exact_BTD, exact_VD = jax.jit(grad)(hidden_BTD, table_VD, targets_BT, weights_BT)
    assert (low_BTD.dtype, low_VD.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(low_VD, exact_VD, atol=0.02 * np.abs(exact_VD).max())
    np.testing.assert_allclose(low_BTD.astype(jnp.float32), exact_BTD, atol=0.02 * np.abs(exact_BTD).max())
