"""The z-loss: gradients against NumPy in float64, in every division of the loss, and its way from the config."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.model.loss import loss_sum
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import RULES
from btlm_jax.train.program import make_program
from btlm_jax.train.setup import describe_run

B, T, D, V = 8, 12, 16, 37
SCALE, Z_LOSS = 0.7, 0.03


def arrays() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    hidden_BTD, table_VD = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets_BT, weights_BT = rng.integers(0, V, (B, T)), rng.integers(0, 3, (B, T)).astype(float)
    return hidden_BTD.astype(np.float32), table_VD.astype(np.float32), targets_BT, weights_BT.astype(np.float32)


def by_formula(hidden_BTD, table_VD, targets_BT, weights_BT, *, z_loss: float):
    """d/dlogit of w (log Z - logit of the target + z log(Z)^2), with every exponential in float64."""
    hidden_BTD, table_VD = hidden_BTD.astype(np.float64), table_VD.astype(np.float64)
    logits_BTV = SCALE * hidden_BTD @ table_VD.T
    log_Z_BT = np.log(np.exp(logits_BTV).sum(-1))
    one_hot_BTV = np.eye(V)[targets_BT]
    losses_BT = log_Z_BT - (logits_BTV * one_hot_BTV).sum(-1)
    p_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
    delta_BTV = p_BTV - one_hot_BTV + 2 * z_loss * log_Z_BT[..., None] * p_BTV
    delta_BTV = SCALE * weights_BT[..., None] * delta_BTV
    return (weights_BT * losses_BT).sum(), delta_BTV @ table_VD, np.einsum("BTV,BTD->VD", delta_BTV, hidden_BTD)


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("layout, chunk", [((1, 1, 1), 50), ((2, 2, 2), 5)])
def test_gradients_are_those_of_the_formula(layout, chunk, by_kernels, monkeypatch):
    if not by_kernels:
        monkeypatch.setattr("btlm_jax.model.loss.are_for_training", lambda: False)
    case = arrays()
    loss, grad_BTD, grad_VD = by_formula(*case, z_loss=Z_LOSS)
    _, plain_BTD, _ = by_formula(*case, z_loss=0.0)
    assert np.abs(grad_BTD - plain_BTD).max() > 0.05 * np.abs(grad_BTD).max()  # it is there to be seen

    def chunked(*arrays):
        return loss_sum(*arrays, output_scale=SCALE, chunk=chunk, rules=RULES, z_loss=Z_LOSS)

    mesh = make_mesh(devices=jax.devices()[: math.prod(layout)], context=layout[1], tensor=layout[2])
    with jax.set_mesh(mesh):
        found, (found_BTD, found_VD) = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(*map(jnp.asarray, case))
    np.testing.assert_allclose(found, loss, rtol=1e-5)  # the loss itself is without it
    np.testing.assert_allclose(found_BTD, grad_BTD, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_VD, grad_VD, rtol=1e-4, atol=1e-4)


def test_the_config_decides_and_zero_changes_nothing():
    def step(z_loss: float) -> str:
        config = tiny_config(optimizer__z_loss=z_loss)
        program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
        assert (f"z-loss {z_loss:g}" in describe_run(config, program.table)) == (z_loss > 0)
        return str(program.trace_train_step(config.curriculum.table.phases[0]).jaxpr)

    plain, with_z = step(0.0), step(0.015625)
    assert "('z_loss', 0.0)" in plain.replace("np.float32(0.0)", "0.0")
    assert "('z_loss', 0.015625)" in with_z.replace("np.float32(0.015625)", "0.015625")
    with pytest.raises(ValueError, match="optimizer.z_loss=-0.1 must not be negative"):
        tiny_config(optimizer__z_loss=-0.1)
