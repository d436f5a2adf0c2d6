"""Published checkpoints in every form, and damaged ones."""

import json
import os

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from support.published_files import NAMES, ORACLES, oracle_weights, write_published, write_shards

from btlm_jax import notices
from btlm_jax.cli.errors import is_named
from btlm_jax.hub.huggingface import HuggingFaceTensors
from btlm_jax.hub.published import read_published_config

WTE, FC = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"


def opened(directory):
    return HuggingFaceTensors(directory, read_published_config(directory / "config.json"))


def assert_same(tensors, weights):
    assert set(tensors.shapes) <= set(weights)
    for name in tensors.shapes:
        actual = tensors.read(name)
        assert actual.dtype == weights[name].dtype
        np.testing.assert_array_equal(actual, weights[name])


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle(name):
    assert_same(opened(ORACLES / name), oracle_weights(name))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_half_precision(tmp_path, dtype):
    weights = {name: array.astype(dtype) for name, array in oracle_weights().items()}
    assert_same(opened(write_published(tmp_path, weights)), weights)


def test_shards(tmp_path):
    assert_same(opened(write_shards(tmp_path / "m", oracle_weights())), oracle_weights())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["zip", "shards", "legacy"])
def test_pickled(tmp_path, dtype, form):
    weights = {name: array.astype(dtype) for name, array in oracle_weights().items()}
    write_published(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    state = {
        name: torch.from_numpy(array.astype(np.float32)).to(getattr(torch, dtype)) for name, array in weights.items()
    }
    if form == "shards":
        weight_map = {name: f"pytorch_model-{index % 2}.bin" for index, name in enumerate(state)}
        for file in set(weight_map.values()):
            torch.save({name: state[name] for name in state if weight_map[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    assert_same(opened(tmp_path), weights)


def test_the_first_upload_had_masks_and_a_head(tmp_path):
    weights = oracle_weights() | {"lm_head.weight": oracle_weights()[WTE]}
    for layer in (0, 1):
        weights[f"transformer.h.{layer}.attn.bias"] = np.tri(512, dtype=np.uint8)[None, None]
        weights[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    assert_same(opened(write_published(tmp_path, weights)), weights)


def changed(name, array):
    return oracle_weights() | {name: array}


def without(name):
    return {key: array for key, array in oracle_weights().items() if key != name}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without(FC), f"lacks 1 of 31 tensors, the first is {FC}"),
        (
            changed("transformer.wpe.weight", np.zeros(3, np.float32)),
            "no BTLM has, the first is transformer.wpe.weight",
        ),
        (changed(FC, np.zeros((170, 64), np.float32)), "has shape (170, 64), but config.json asks for (64, 170)"),
        (changed("lm_head.weight", np.zeros((512, 64), np.float32)), "lm_head.weight"),
        (changed("transformer.relative_pe.slopes", np.full((4, 1), 0.5, np.float32)), "are not the ALiBi slopes of 4"),
        (changed("transformer.h.0.attn.bias", np.ones((1, 1, 9, 9), np.uint8)), "is not a causal mask"),
    ],
)
def test_weights_that_contradict_the_config(tmp_path, weights, message):
    with pytest.raises(ValueError) as error:
        opened(write_published(tmp_path, weights))
    assert message in str(error.value)


def test_more_layers_than_there_are_tensors_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="config.json: n_layer=2,147,483,647 does not belong to weights of 32 tensors"):
        opened(write_published(tmp_path, oracle_weights(), n_layer=2**31 - 1))


def test_numbers_that_are_not_finite(tmp_path):
    bad = oracle_weights()[FC].copy()
    bad[3, 5:7] = np.nan, np.inf
    tensors = opened(write_published(tmp_path, changed(FC, bad)))
    with pytest.raises(ValueError, match=f"{FC} of .* holds 2 values that are not finite"):
        tensors.read(FC)


def test_integers_are_no_weights(tmp_path):
    tensors = opened(write_published(tmp_path, changed(FC, np.zeros((64, 170), np.int8))))
    with pytest.raises(ValueError, match="is int8; only float32, float16, bfloat16"):
        tensors.read(FC)


def test_missing_files(tmp_path):
    directory = write_shards(tmp_path / "m", oracle_weights())
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors is missing"):
        opened(directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="holds no weights: looked for model.safetensors, model.safetensors.index.json"
    ):
        opened(directory)


def test_an_index_that_is_wrong(tmp_path):
    directory = write_shards(tmp_path / "m", oracle_weights())
    save_file({"x": np.zeros(2, np.float32)}, directory / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="lacks 16 of 31 tensors"):
        opened(directory)
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        opened(directory)


def named(notice):
    return notices.counts().get(notice, 0)


def test_files_are_preferred_as_transformers_does(tmp_path):
    """The single file before the index, safetensors before .bin, and what shards hold before what their index says."""
    old, new = oracle_weights(), {name: array + 1 for name, array in oracle_weights("tiny").items()}
    new["transformer.relative_pe.slopes"] = old["transformer.relative_pe.slopes"]
    directory = write_shards(tmp_path / "m", old)
    notices.begin(strict=())
    assert_same(opened(directory), old)
    assert not notices.counts()
    torch.save({name: torch.from_numpy(array) for name, array in new.items()}, directory / "pytorch_model.bin")
    assert_same(opened(directory), old)
    assert named("weights-preferred") == 1
    save_file(new, directory / "model.safetensors")
    assert_same(opened(directory), new)
    for shard in directory.glob("model-*"):
        shard.unlink()
    assert_same(opened(directory), new)  # the index alone is stale
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").unlink()
    assert_same(opened(directory), new)  # of the .bin
    assert named("weights-preferred") == 5


def test_the_shards_themselves_count_and_not_the_index(tmp_path):
    directory = write_shards(tmp_path / "m", oracle_weights())
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    names = sorted(index["weight_map"])
    index["weight_map"] = {name: index["weight_map"][other] for name, other in zip(names, reversed(names), strict=True)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    notices.begin(strict=())
    assert_same(opened(directory), oracle_weights())
    assert named("index-contradicts") >= 2
    index["weight_map"][WTE] = "../m/model-00001-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a shard is a file beside it"):
        opened(directory)


class Code:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, ""),
        (lambda state: {"state_dict": state}, "holds a dict under 'state_dict'"),
        (lambda state: state | {"step": 3}, "holds a int under 'step'"),
        (lambda state: list(state.values()), "holds a list, not a state dict"),
        (lambda state: state | {WTE: torch.empty(512, 64, device="meta")}, "without values"),
        (lambda state: state | {WTE: state[WTE].to_sparse()}, "torch.sparse_coo"),
        (lambda state: state | {WTE: state[WTE].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        (lambda state: state | {"code": Code()}, "which is no tensor and could run code"),
    ],
    ids=["parameters", "nested", "step", "list", "meta", "sparse", "float8", "code"],
)
def test_pickles_are_read_or_refused_by_name(tmp_path, make, message):
    state = {name: torch.from_numpy(array) for name, array in oracle_weights().items()}
    write_published(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    torch.save(make(state), tmp_path / "pytorch_model.bin")
    if not message:
        assert_same(opened(tmp_path), oracle_weights())
        return
    with pytest.raises(ValueError, match="pytorch_model.bin") as error:
        opened(tmp_path).read(WTE)
    assert message in str(error.value) and "weights_only" not in str(error.value)
    assert is_named(error.value)


def test_eight_bit_floats_and_pointers_of_git_are_named(tmp_path):
    state = {name: torch.from_numpy(array) for name, array in oracle_weights().items()}
    write_published(tmp_path, {})
    save_torch(state | {FC: state[FC].to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor {FC} of .* is F8_E5M2, which cannot be read here"):
        opened(tmp_path).read(FC)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5292\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
            opened(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_files(tmp_path, file):
    write_published(tmp_path, oracle_weights())
    if file.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save({name: torch.from_numpy(array) for name, array in oracle_weights().items()}, tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        opened(tmp_path)
