"""The first state of a run that begins with given weights: theirs to the bit, whatever form they come in."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.made_up_run import run_config, write_run
from support.published_files import NAMES, ORACLES, oracle_array

from btlm_jax.hub.given_model import (
    NewRows,
    begin_state,
    check_has_moments,
    fingerprint_of_model,
    open_given_model,
    split_step,
)
from btlm_jax.hub.native import write_model_directory
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.safetensors_files import TensorToWrite, write_safetensors
from btlm_jax.hub.source import published_config, read_native
from btlm_jax.hub.tensor_names import NativeTensors
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.train.program import make_program

NO_ROWS = NewRows(first=1, end=1)


@pytest.fixture(scope="module")
def given(token_store, tmp_path_factory):
    """(workdir of a run with checkpoints 3 and 7, its config, the state of the last)."""
    workdir = tmp_path_factory.mktemp("given")
    config = run_config(token_store)
    return workdir, config, write_run(workdir, config, steps=(3, 7))


def run_of(config, *, num_devices=1, tensor=1):
    """As much of a Run as beginning it reads."""
    mesh = make_mesh(devices=jax.devices()[:num_devices], tensor=tensor)
    program = make_program(config, mesh)
    parts = {
        "config": config,
        "mesh": mesh,
        "model": program.model,
        "table": program.table,
        "optimizer": program.optimizer,
    }
    return types.SimpleNamespace(**parts, state=program.state)


def bits(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_laid_out(state, abstract):
    assert jax.tree.all(
        jax.tree.map(
            lambda leaf, wanted: (
                (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
                and leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
            ),
            state,
            abstract,
        )
    )


def test_a_run_gives_its_parameters_and_a_fresh_optimizer(given):
    workdir, config, expected = given
    run = run_of(config, num_devices=8, tensor=2)
    state = begin_state(open_given_model(workdir, step=0), run, keep_optimizer=False, rows=NO_ROWS)
    assert bits(state.params) == bits(expected.params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state)) and state.step == 0
    assert_laid_out(state, run.state)


def test_an_earlier_checkpoint_of_a_run_is_another_model(given):
    workdir, config, last = given
    earlier, latest = (open_given_model(workdir, step=step) for step in (3, 0))
    assert (earlier.step, latest.step) == (3, 7) and earlier.fingerprint != latest.fingerprint
    assert (earlier.metadata.max_length, latest.metadata.max_length) == (24, 48)  # 6 steps at 24, then 4 at 48
    assert latest.fingerprint == open_given_model(workdir, step=7).fingerprint
    state = begin_state(earlier, run_of(config), keep_optimizer=False, rows=NO_ROWS)
    assert bits(state.params).keys() == bits(last.params).keys() and bits(state.params) != bits(last.params)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5; there are 3, 7"):
        open_given_model(workdir, step=5)


@pytest.mark.parametrize("form", ["of another program", "ours", "ours of before"])
def test_the_last_weight_makes_another_model(tmp_path, form):
    """A weight far behind the first 64 KiB, beside a header that is the same."""

    def fingerprint(last):
        array = np.append(np.zeros(40_000, np.float32), np.float32(last))
        if form == "of another program":
            save_file({"w": array}, tmp_path / "model.safetensors")
        elif form == "ours":
            tensor = TensorToWrite(name="w", shape=array.shape, dtype=array.dtype, make=lambda: array)
            write_safetensors(tmp_path, [tensor], max_shard_bytes=10**9, metadata={})
        else:
            (tmp_path / "params").mkdir(exist_ok=True)
            (tmp_path / "params" / "w").write_bytes(array.tobytes())
        return fingerprint_of_model(tmp_path)

    assert fingerprint(1.0) == fingerprint(1.0) != fingerprint(2.0)


def test_names_of_checkpoints():
    assert split_step("/runs/a/checkpoints/400/") == ("/runs/a", 400)
    assert split_step("gs://bucket/a/checkpoints/7") == ("gs://bucket/a", 7)
    for name in ("/runs/a", "/runs/checkpoints", "/runs/checkpoints/last", "400"):
        assert split_step(name) == (name, 0)


def test_the_optimizer_is_kept_to_the_bit(given):
    workdir, config, expected = given
    run = run_of(config, num_devices=8, tensor=2)
    state = begin_state(open_given_model(workdir, step=0), run, keep_optimizer=True, rows=NO_ROWS)
    assert bits(state.params) == bits(expected.params) and state.step == 0
    assert bits(state.opt_state) == bits(expected.opt_state)
    assert_laid_out(state, run.state)


def test_of_a_kept_optimizer_a_frozen_parameter_has_no_moments(given, token_store):
    workdir, _, expected = given
    config = run_config(token_store, optimizer__freeze="embedding,ln_*")
    model, run = open_given_model(workdir, step=0), run_of(config)
    check_has_moments(model, config, name="given")
    state = begin_state(model, run, keep_optimizer=True, rows=NewRows(first=400, end=420))
    found, kept = bits(state.opt_state), bits(expected.opt_state)
    assert len(found) < len(kept)
    assert sorted(found.values()) == sorted(
        value for path, value in kept.items() if "ln_" not in path and "emb" not in path
    )


def test_moments_that_a_run_has_not_are_refused(token_store, tmp_path):
    frozen = run_config(token_store, optimizer__freeze="mlp/up,ln_f")
    write_run(tmp_path, frozen, steps=(2,))
    model = open_given_model(tmp_path, step=0)
    check_has_moments(model, run_config(token_store, optimizer__freeze="mlp,ln_*"), name="given")
    with pytest.raises(
        ValueError, match="no moments of blocks/mlp/up/bias, blocks/mlp/up/kernel; give --config.*mlp/up"
    ):
        check_has_moments(model, run_config(token_store, optimizer__freeze="ln_*"), name="given")


@pytest.mark.parametrize("keep_optimizer", [False, True])
def test_new_rows_are_the_mean_of_the_others(given, token_store, keep_optimizer):
    workdir, _, expected = given
    rows, run = NewRows(first=390, end=410), run_of(run_config(token_store, model__vocab_size=410))
    state = begin_state(open_given_model(workdir, step=0), run, keep_optimizer=keep_optimizer, rows=rows)
    old_VD, new_VD = (np.asarray(each.params["embedding"]["embedding"]) for each in (expected, state))
    assert new_VD.shape == (410, 40) and new_VD[:390].tobytes() == old_VD[:390].tobytes()
    exact_D = np.array([sum(map(float, column)) / 390 for column in old_VD[:390].T])
    np.testing.assert_allclose(new_VD[390:], np.tile(exact_D, (20, 1)), rtol=1e-7)
    before, after = bits(expected.params["blocks"]), bits(state.params["blocks"])
    assert before == after
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        if leaf.shape == (410, 40):
            values = np.asarray(leaf)
            assert values[:390].all() == keep_optimizer and not values[390:].any(), path
    assert_laid_out(state, run.state)


def test_rows_that_the_table_has_beyond_the_tokenizer_stay(given, token_store):
    workdir, _, expected = given
    state = begin_state(
        open_given_model(workdir, step=0), run_of(run_config(token_store)), keep_optimizer=False,
        rows=NewRows(first=380, end=390),
    )  # fmt: skip
    old_VD, new_VD = (np.asarray(each.params["embedding"]["embedding"]) for each in (expected, state))
    assert (old_VD != new_VD).any(1).nonzero()[0].tolist() == list(range(380, 390))


def test_a_model_directory_gives_its_parameters(given, tmp_path):
    workdir, config, expected = given
    native = read_native(workdir)
    write_model_directory(
        tmp_path / "native", metadata=native.metadata, params=native.params, tokenizer=native.tokenizer
    )
    model = open_given_model(tmp_path / "native", step=0)
    assert model.metadata == native.metadata and model.tokenizer.contents == native.tokenizer.contents
    state = begin_state(model, run_of(config), keep_optimizer=False, rows=NO_ROWS)
    assert bits(state.params) == bits(expected.params)
    with pytest.raises(ValueError, match="native is a model directory, which has no optimizer state"):
        check_has_moments(model, config, name="native")


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_computes_in_a_run_what_the_published_code_did(name, token_store):
    model = open_given_model(ORACLES / name, step=0)
    taken = ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff", "layer_norm_eps", "alibi_scaling")
    changes = {f"model__{key}": getattr(model.metadata.model, key) for key in taken}
    changes |= {f"mup__{key}": value for key, value in vars(model.metadata.mup).items()}
    run = run_of(run_config(token_store, **changes))
    params = begin_state(model, run, keep_optimizer=False, rows=NO_ROWS).params
    assert run.config.mup.preset == ("sp" if name == "tiny_sp" else "btlm")
    config = published_config(dataclasses.replace(model.metadata, model=run.config.model, mup=run.config.mup))
    tensors = NativeTensors(
        params, config, residual_scale=make_parametrization(run.config.mup, run.config.model).residual_scale
    )
    expected_TV = oracle_array(name, "logits")[0]
    actual_TV = streamed_logits(config, tensors, oracle_array(name, "input_ids")[0])
    np.testing.assert_allclose(actual_TV, expected_TV, atol=2e-5 * np.abs(expected_TV).max())


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model: looked for checkpoints/"):
        open_given_model(tmp_path, step=0)
    (tmp_path / "starts").mkdir()
    with pytest.raises(FileNotFoundError, match="is a run without a checkpoint yet: btlm status"):
        open_given_model(tmp_path, step=0)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="x.gguf is a GGUF file, of which btlm reads no weights; give a run"):
        open_given_model(tmp_path / "x.gguf", step=0)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="model_type='llama'"):
        open_given_model(tmp_path, step=0)
