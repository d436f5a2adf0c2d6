"""The check of devices before a run."""

from unittest import mock

import jax
import jax.numpy as jnp

from btlm_jax.parallel import health


def test_all_devices_compute_and_exchange(capsys):
    devices = jax.devices()
    assert health.main([f"--devices={len(devices)}"]) == 0
    assert f"{len(devices)} devices compute and exchange" in capsys.readouterr().out


def test_a_missing_device_is_counted(capsys):
    assert health.main([f"--devices={len(jax.devices()) + 1}"]) == 1
    assert f"{len(jax.devices()) + 1} are expected" in capsys.readouterr().err


def test_the_cpu_in_place_of_an_accelerator_is_no_health(capsys):
    assert health.main([f"--devices={len(jax.devices())}", "--platform=gpu"]) == 1
    assert "JAX found no gpu and took cpu" in capsys.readouterr().err


def test_a_wrong_product_and_a_wrong_sum_are_found():
    devices = jax.devices()
    dot, psum = jnp.dot, jax.lax.psum
    with mock.patch.object(jnp, "dot", lambda *a, **k: dot(*a, **k).at[3, 5].add(1)):
        assert "multiplies matrices wrongly" in health.fault_of_devices(devices, expected=len(devices))
    with mock.patch.object(jax.lax, "psum", lambda x, axis: psum(x, axis) * 2):
        assert "the sum over all devices is wrong" in health.fault_of_devices(devices, expected=len(devices))
