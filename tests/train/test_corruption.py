"""Devices that compute wrongly are found and named: a copy with another bit, a step that is another the second time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.loop_run import train, train_step
from support.tiny import tiny_config

from btlm_jax.data.reader import open_store
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import FSDP, TENSOR
from btlm_jax.recipe.config import with_later_keys
from btlm_jax.train import loop
from btlm_jax.train.corruption import Checks
from btlm_jax.train.step import CorruptionError


def checks_of(mesh, **changes):
    return Checks(tiny_config(**{f"bad_numbers__{key}": value for key, value in changes.items()}).bad_numbers, mesh)


def flip(x, *, device, bit=0):
    """Flip the lowest bit of the last element of what one device has of an array."""
    parts = []
    for shard in x.addressable_shards:
        values = np.array(shard.data)
        if shard.device == device:
            values.reshape(-1).view(np.uint32)[-1] ^= 1 << bit
        parts.append(jax.device_put(values, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices(), tensor=2)  # fsdp 4 x tensor 2


@pytest.fixture
def state(mesh):
    rng = np.random.default_rng(0)
    specs = {"w": (FSDP, TENSOR), "half": (FSDP, None), "scale": (None, None)}
    arrays = {name: jnp.asarray(rng.normal(size=(8, 6)).astype(np.float32)) for name in specs}
    return {name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*specs[name]))) for name, x in arrays.items()}


def test_copies_that_are_equal_are_well(mesh, state):
    checks_of(mesh, compare_every=4).compare(4, state, is_saving=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scale", "scale: device 5 of process 0 differs from 7 other copies"),
        ("half", "half: device 4 of process 0 and device 5 of process 0 have copies with different bits"),
    ],
)
def test_a_copy_with_another_bit_is_named_with_its_device(mesh, state, name, said):
    state[name] = flip(state[name], device=jax.devices()[5])
    checks = checks_of(mesh, compare_every=4)
    with pytest.raises(CorruptionError, match=f"^step 8: {said}$"):
        checks.compare(8, state, is_saving=False)
    with pytest.raises(CorruptionError):
        checks.compare(7, state, is_saving=True)  # nothing of it is saved
    checks.compare(7, state, is_saving=False)
    checks_of(mesh, compare_every=0).compare(8, state, is_saving=True)


def wrong_once(step_function, *, device, at, array=None):
    """A step that one device computes otherwise the first time."""
    done = []

    def computed(state, batch, learning_rate):
        number = int(state.step) + 1
        after, metrics = step_function(state, batch, learning_rate)
        if number == at and not done:
            done.append(number)
            after = dataclasses.replace(after, params={"w": flip(after.params["w"], device=device)})
        return after, metrics

    return computed


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, 0])
def test_a_step_that_is_computed_wrongly_stops_the_run_and_is_not_saved(
    token_store, tmp_path, monkeypatch, capsys, every
):
    store = open_store(token_store, expected_fingerprint="")
    wrong = wrong_once(train_step, device=jax.devices()[2], at=12)
    changes = {"bad_numbers__recompute_every": every, "bad_numbers__compare_every": every}
    found = train(tmp_path / "run", store, monkeypatch, [(4, 0)], step_function=wrong, **changes)
    if not every:  # it is not even seen
        assert found.outcomes == [loop.DONE]
        return
    assert (
        found.outcomes == [loop.WRONG_DEVICE]
        and sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())[-1] == "8"
    )
    said = "step 12: computed twice it has other bits on device 2 of process 0"
    assert found.events == [(12, f"stopped because a device computes wrongly: {said}")]
    assert f"{said}. Nothing of this step is saved." in capsys.readouterr().out
    again = train(tmp_path / "run", store, monkeypatch, [(4, 0)], **changes)
    whole = train(tmp_path / "whole", store, monkeypatch, [(4, 0)])
    assert again.outcomes == [loop.DONE] and (again.final == whole.final).all()


def test_a_config_from_before_has_the_checks_off():
    values = dataclasses.asdict(tiny_config())
    for name in ("compare_every", "recompute_every"):
        assert values["bad_numbers"].pop(name) == 0
    assert with_later_keys(values) == dataclasses.asdict(tiny_config())
