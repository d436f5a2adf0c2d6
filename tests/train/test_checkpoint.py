"""Checkpoints: exact, atomic, restorable onto any mesh, and refused when they are of another run or damaged."""

import dataclasses
import json
import os
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.tiny import tiny_config

from btlm_jax.cli import errors
from btlm_jax.model import make_model, parameter_table
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import CheckpointConfig
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.train.checkpoint import (
    Checkpointer,
    CheckpointReader,
    Position,
    changed_settings,
    check_same_run,
    environment_changes,
)
from btlm_jax.train.step import abstract_state, init_state

KEEP = CheckpointConfig(every_steps=1, keep_last=2, keep_every=10, keep_hours=0.0)


def build(*, devices: int, tensor: int):
    config = tiny_config(mesh__tensor=tensor)
    mesh = make_mesh(devices=jax.devices()[:devices], tensor=tensor)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    table = parameter_table(model, mesh)
    optimizer = make_optimizer(config.optimizer, table)
    return config, mesh, model, optimizer, abstract_state(table, optimizer, mesh)


def position(step: int) -> Position:
    return Position(step=step, tokens_seen=384 * step, store_fingerprint="abc")


def assert_equal_states(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoint 7, saved from a 4 x 2 mesh, and the state on the host."""
    workdir = tmp_path_factory.mktemp("run")
    config, mesh, model, optimizer, _ = build(devices=8, tensor=2)
    state = init_state(model, optimizer, mesh, seed=4)
    checkpointer = Checkpointer(workdir, config=KEEP)
    checkpointer.save(state, position=position(7), config=config)
    checkpointer.wait()
    checkpointer.close()
    return workdir, jax.device_get(state)


@pytest.fixture(scope="module")
def single():
    """(config, state, its abstract state) on one device; no test may change the state."""
    config, mesh, model, optimizer, abstract = build(devices=1, tensor=1)
    return config, init_state(model, optimizer, mesh, seed=4), abstract


@pytest.mark.slow
@pytest.mark.parametrize("devices, tensor", [(8, 2), (8, 4), (1, 1)])
def test_a_checkpoint_restores_onto_any_mesh(saved, devices, tensor):
    workdir, expected = saved
    config, mesh, _, _, abstract = build(devices=devices, tensor=tensor)
    checkpointer = Checkpointer(workdir, config=KEEP)
    state = checkpointer.restore_state(7, abstract=abstract)
    assert checkpointer.read_metadata(7) == (position(7), tiny_config(mesh__tensor=2))
    checkpointer.close()
    assert_equal_states(state, expected)
    assert state.params["blocks"]["mlp"]["up"]["kernel"].sharding == NamedSharding(
        mesh, PartitionSpec(None, ("fsdp", "tensor"), None)
    )


def test_the_parameters_are_restored_alone(saved):
    workdir, expected = saved
    *_, abstract = build(devices=8, tensor=4)
    checkpointer = Checkpointer(workdir, config=KEEP)
    params = checkpointer.restore_params(7, abstract=abstract.params)
    checkpointer.close()
    assert_equal_states(params, expected.params)
    assert jax.tree.all(jax.tree.map(lambda x, shape: x.sharding == shape.sharding, params, abstract.params))


def test_a_checkpoint_from_before_mesh_context_is_read(single, tmp_path):
    config, state, _ = single
    checkpointer = Checkpointer(tmp_path, config=KEEP)
    older = json.loads(config.to_json())
    del older["mesh"]["context"]
    with mock.patch.object(type(config), "to_json", return_value=json.dumps(older)):
        checkpointer.save(state, position=position(1), config=config)
    checkpointer.wait()
    assert checkpointer.read_metadata(1) == (position(1), config)
    checkpointer.close()


def test_donating_the_state_right_after_save_does_not_reach_the_checkpoint(single, tmp_path):
    config, expected, abstract = single
    state = jax.tree.map(jnp.copy, expected)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 1, state), donate_argnums=0)
    checkpointer = Checkpointer(tmp_path, config=KEEP)
    checkpointer.save(state, position=position(1), config=config)
    for _ in range(5):
        state = overwrite(state)
    jax.block_until_ready(state)
    checkpointer.wait()
    assert_equal_states(checkpointer.restore_state(1, abstract=abstract), expected)
    checkpointer.close()


def test_the_last_ones_and_every_so_many_are_kept(single, tmp_path):
    config, state, _ = single
    config = dataclasses.replace(config, checkpoint=KEEP)
    checkpointer = Checkpointer(tmp_path, config=KEEP)
    for step in (5, 10, 15, 20, 25, 26):
        checkpointer.save(state, position=position(step), config=config)
    checkpointer.wait()
    assert checkpointer.steps() == [10, 20, 25, 26]
    checkpointer.close()


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path):
    unfinished = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "state").mkdir()
    checkpointer = Checkpointer(tmp_path, config=KEEP)
    assert checkpointer.steps() == []
    checkpointer.close()


def test_a_damaged_checkpoint_is_named_with_the_remedy(single, tmp_path):
    config, state, abstract = single
    checkpointer = Checkpointer(tmp_path, config=KEEP)
    for step in (10, 13, 14):
        checkpointer.save(state, position=position(step), config=config)
    checkpointer.wait()
    for path in (tmp_path / "checkpoints" / "14" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(ValueError, match=r"checkpoints/14 cannot be used: .*; delete it to go on from step 13"):
        checkpointer.restore_state(14, abstract=abstract)
    checkpointer.close()
    reader = CheckpointReader(tmp_path)  # of a model that another command only reads: nothing of it is to be deleted
    with pytest.raises(ValueError, match=r"cannot be used: .*; the run also has .*/checkpoints/13$"):
        reader.restore_state(14, abstract=abstract)


def test_what_decides_the_last_bits_is_in_a_checkpoint_and_a_difference_is_said(saved, tmp_path):
    workdir, _ = saved
    checkpointer = Checkpointer(workdir, config=KEEP)
    facts = checkpointer.read_environment(7)
    assert facts["devices"] == "8 x cpu" and facts["jax"] == jax.__version__ and facts["instructions"]
    assert facts["threads"] == str(len(os.sched_getaffinity(0)))
    assert environment_changes(checkpointer, 7) == []
    elsewhere = {"threads": "77", "instructions": facts["instructions"], "training_kernels": facts["training_kernels"]}
    with mock.patch("btlm_jax.train.checkpoint.cpu_facts", return_value=elsewhere):
        assert environment_changes(checkpointer, 7) == [f"threads was '{facts['threads']}', is now '77'"]
    checkpointer.close()
    shutil.copytree(workdir, tmp_path / "older")
    shutil.rmtree(tmp_path / "older" / "checkpoints" / "7" / "environment")
    checkpointer = Checkpointer(tmp_path / "older", config=KEEP)
    assert environment_changes(checkpointer, 7) == []
    assert checkpointer.read_metadata(7) == (position(7), tiny_config(mesh__tensor=2))
    checkpointer.close()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model__vocab_size": 301}, "model.vocab_size: checkpoint 300, config 301"),
        ({"model__num_layers": 3}, "model.num_layers: "),
        ({"model__d_model": 80}, "model.d_model: checkpoint 40, config 80"),
        ({"model__num_heads": 5}, "model.num_heads: "),
        ({"model__d_ff": 55}, "model.d_ff: "),
        ({"model__layer_norm_eps": 1e-6}, "model.layer_norm_eps: "),
        ({"model__dtype": "bfloat16"}, "model.dtype: checkpoint 'float32', config 'bfloat16'"),
        ({"model__alibi_scaling": 2.0}, "model.alibi_scaling"),
        ({"mup__init_std": 0.1}, "mup: "),
        ({"seed": 9}, "seed: checkpoint 1, config 9"),
        ({"data__seed": 9}, "data.seed"),
        (
            {"data__weights": "a=1", "corpus__source": "prepared"},
            "data.weights_by_phase: checkpoint \\(\\), config \\({'a': 1},\\)",
        ),
        ({"curriculum__seq_len": (48, 24), "curriculum__batch_size": (8, 16)}, "curriculum.seq_len: "),
        ({"curriculum__batch_size": (32, 16), "curriculum__num_tokens": (768, 768)}, "curriculum.batch_size: "),
        ({"curriculum__num_tokens": (5 * 384, 5 * 384)}, "before the last phase"),
    ],
)
def test_another_run_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        check_same_run(tiny_config(), tiny_config(**change), where="somewhere")


def test_a_longer_run_on_another_mesh_is_the_same_run():
    longer = tiny_config(curriculum__num_tokens=(6 * 384, 9 * 384), mesh__tensor=2, checkpoint__every_steps=50)
    check_same_run(tiny_config(), longer, where="somewhere")


def test_weights_that_are_written_otherwise_are_the_same_run():
    one, other = (
        tiny_config(data__weights=text, corpus__source="prepared") for text in ("a=3,b=1;b=1,a=1", "b=2,a=6; a=1,b=1")
    )
    check_same_run(one, other, where="somewhere")


def test_every_changed_setting_is_told_with_both_values(saved, tmp_path):
    workdir, _ = saved
    checkpointer = Checkpointer(workdir, config=KEEP)
    assert changed_settings(checkpointer, tiny_config(mesh__tensor=2)) == []
    other = tiny_config(mesh__tensor=2, optimizer__beta2=0.5, curriculum__num_tokens=(6 * 384, 9 * 384))
    changes = changed_settings(checkpointer, other)
    assert [change.key for change in changes] == ["curriculum.num_tokens", "optimizer.beta2"]
    assert str(changes[1]) == "optimizer.beta2 was 0.95, is now 0.5"
    checkpointer.close()
    empty = Checkpointer(tmp_path, config=KEEP)
    assert changed_settings(empty, other) == []
    empty.close()


def test_a_checkpoint_s_position_and_config_are_plain_json(saved):
    workdir, _ = saved
    folder = workdir / "checkpoints" / "7"
    assert json.loads((folder / "position" / "metadata").read_text()) == {
        "step": 7,
        "tokens_seen": 384 * 7,
        "store_fingerprint": "abc",
        "passed_over": [],
        "is_evaluated": True,
    }
    config = json.loads((folder / "config" / "metadata").read_text())
    assert config == json.loads(tiny_config(mesh__tensor=2).to_json())


@pytest.mark.parametrize(
    ("item", "contents", "said"),
    [
        ("position", "[]", "position must be a table of keys, got []"),
        ("position", "{}", "config key position.step is missing"),
        ("position", "[" * 100_000, ""),
        ("position", {"step": "7"}, "position.step='7' must be of type int"),
        ("position", {"step": 6, "tokens_seen": 6 * 384}, "its position is step 6 with 2,304 tokens seen"),
        (
            "position",
            {"tokens_seen": 7},
            "7 tokens seen, and it is checkpoint 7, with 2,688 by its config",
        ),
        ("config", "[]", "config must be a table of keys"),
        ("config", {"mesh": None}, "config.mesh must be a table of keys, got None"),
        ("config", {"mesh": {}}, "config key config.mesh.tensor is missing"),
        ("config", {"future": 1}, "unknown config key config.future"),
        ("config", {"seed": 1.5}, "config.seed=1.5 must be of type int"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_json_of_a_checkpoint_is_named_with_the_remedy(saved, tmp_path, item, contents, said):
    workdir, _ = saved
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "7" / "digests")  # of a checkpoint from before them
    path = tmp_path / "checkpoints" / "7" / item / "metadata"
    text = contents if isinstance(contents, str) else json.dumps(json.loads(path.read_text()) | contents)
    path.write_text(text)
    checkpointer = Checkpointer(tmp_path, config=KEEP)
    with pytest.raises(ValueError, match="checkpoints/7 cannot be used: .*delete it to start again") as raised:
        checkpointer.read_metadata(7)
    assert said in str(raised.value) and errors.is_named(raised.value)
    checkpointer.close()
