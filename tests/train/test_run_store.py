"""Which token store a run takes: never silently another one than its config describes, and one that serves it."""

import dataclasses
import shutil
import threading
import types

import pytest
from support.real_store import BLOCK_LEN, VOCAB_SIZE
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.data import store
from btlm_jax.storage import location
from btlm_jax.train import setup
from btlm_jax.train.setup import check_curriculum, locate_store, make_workdir, open_run_store, prepare_store

MADE = {
    "model__vocab_size": VOCAB_SIZE,
    "corpus__source": "installed_python",
    "corpus__max_bytes": 10**6,
    "corpus__heldout_fraction": 0.1,
    "corpus__heldout_bytes_per_source": 2_000,
    "data__seed": 1,
}


def config_of(directory, **changes):
    return tiny_config(data__store=str(directory), **{**MADE, **changes})


def unbuildable(*arguments, **named):
    raise AssertionError("a store is built")


ALONE = {"build_store": unbuildable, "wait_for_all": lambda: None}


def test_the_store_that_the_config_would_build_is_taken(token_store, tmp_path):
    found = prepare_store(config_of(token_store), workdir=tmp_path, expected_fingerprint="", **ALONE)
    assert found.manifest == store.read_manifest(token_store)


def test_a_process_other_than_the_first_makes_a_store_only_where_they_share_no_folder(
    token_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(setup.jax, "process_index", lambda: 1)
    made = {"build_store": lambda *_, directory, **__: shutil.copytree(token_store, directory)}
    made |= {"wait_for_all": lambda: None}
    monkeypatch.setattr(setup, "_SEEN_SECONDS", 0.1)
    with pytest.raises(FileNotFoundError, match="process 0 has the token store .*/store, and this host does not see"):
        prepare_store(config_of("store"), workdir=tmp_path, expected_fingerprint="", **made)
    monkeypatch.setattr(setup, "_SEEN_SECONDS", 60)
    late = threading.Timer(0.3, lambda: (tmp_path / "late").rename(tmp_path / "store"))  # as NFS shows it
    shutil.copytree(token_store, tmp_path / "late")
    late.start()
    assert prepare_store(config_of("store"), workdir=tmp_path, expected_fingerprint="", **made).directory
    shutil.rmtree(tmp_path / "store")
    monkeypatch.setitem(location._mirrors, tmp_path, types.SimpleNamespace(is_remote=True))
    assert prepare_store(config_of("store"), workdir=tmp_path, expected_fingerprint="", **made).directory


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corpus__max_bytes": 999_999}, "corpus.max_bytes: store 1000000, config 999999"),
        ({"corpus__heldout_fraction": 0.2}, "corpus.heldout_fraction: store 0.1, config 0.2"),
        ({"corpus__heldout_bytes_per_source": 3}, "corpus.heldout_bytes_per_source: store 2000, config 3"),
        ({"data__seed": 7}, "data.seed: store 1, config 7"),
        ({"model__vocab_size": 480}, "model.vocab_size: store 400, config 480"),
        (
            {"curriculum__seq_len": (24, 24), "curriculum__batch_size": (16, 16)},
            "the longest of curriculum.seq_len: store 48, config 24",
        ),
    ],
)
def test_a_store_of_other_settings_is_refused_with_both_values_and_both_ways_on(token_store, tmp_path, changes, said):
    with pytest.raises(ValueError, match="was made with other settings") as raised:
        open_run_store(config_of(token_store, **changes), token_store, expected_fingerprint="")
    assert f"\n  {said}\n" in str(raised.value)
    assert "--config.corpus.source=prepared" in str(raised.value) and "--config.data.store=NAME" in str(raised.value)
    taken = config_of(token_store, **changes, corpus__source="prepared")
    assert open_run_store(taken, token_store, expected_fingerprint="").manifest.block_len == BLOCK_LEN


def test_a_store_of_other_text_is_not_taken_for_the_installed_documentation(token_store, tmp_path):
    directory = shutil.copytree(token_store, tmp_path / "own")
    own = dataclasses.replace(store.read_manifest(directory), made_by={"stage": "tokenize"})
    store.write_manifest(directory, own)
    with pytest.raises(ValueError, match="store made by btlm corpus tokenize, config installed_python"):
        open_run_store(config_of(directory), directory, expected_fingerprint="")


def test_a_store_beside_the_shell_is_not_replaced_by_a_new_one(token_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(token_store, "runs/x/store")
    config, workdir = config_of("runs/x/store"), tmp_path / "runs/x"
    with pytest.raises(ValueError) as raised:
        prepare_store(config, workdir=workdir, expected_fingerprint="", **ALONE)
    here, there = tmp_path / "runs/x/store", workdir / "runs/x/store"
    assert f"--config.data.store={here}," in str(raised.value) and str(raised.value).endswith(f"store={there}")
    absolute = config_of(here)
    assert prepare_store(absolute, workdir=workdir, expected_fingerprint="", **ALONE)
    (here / store.MANIFEST_FILE).unlink()  # then it is a folder like others, which is only mentioned
    notices.begin(strict=())
    assert locate_store(config.data, workdir=workdir) == there
    assert notices.counts() == {"not-the-store": 1} and str(here) in capsys.readouterr().err


def test_a_home_directory_is_found(token_store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_store(config_of("~/mine").data, workdir=tmp_path / "run") == tmp_path / "mine"


def manifest_with(token_store, **changes):
    return dataclasses.replace(store.read_manifest(token_store), **changes)


def test_what_the_curriculum_reads_is_checked(token_store):
    config, splits = config_of(token_store), store.read_manifest(token_store).splits
    capacity = splits["train"].num_blocks * BLOCK_LEN
    assert check_curriculum(config, store.read_manifest(token_store)).capacity_tokens == capacity
    for name in splits:
        others = {key: split for key, split in splits.items() if key != name}
        with pytest.raises(ValueError, match=f"has no split '{name}' with a block in it, only {next(iter(others))}"):
            check_curriculum(config, manifest_with(token_store, splits=others))
    no_sources = splits | {"heldout": dataclasses.replace(splits["heldout"], sources={})}
    with pytest.raises(ValueError, match="no source of the token store's split 'heldout'"):
        check_curriculum(config, manifest_with(token_store, splits=no_sources))
    with pytest.raises(ValueError, match="does not divide the token store's block length 36"):
        check_curriculum(config, manifest_with(token_store, block_len=36))
    steps = capacity // 384 + 1
    with pytest.raises(ValueError, match=rf"lower curriculum.num_tokens to {(steps - 1) * 384:,} in all"):
        check_curriculum(
            config_of(token_store, curriculum__num_tokens=(384, (steps - 1) * 384)), store.read_manifest(token_store)
        )


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "m.gguf", "pytorch_model.bin"]
)
def test_nothing_is_trained_into_a_model(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(ValueError, match="holds a model .*: choose another --workdir.*generate --checkpoint="):
        make_workdir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
