"""Published checkpoints in every form, and damaged ones."""

import json

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16
from safetensors.numpy import save_file
from support.published_files import NAMES, ORACLES, oracle_weights, write_published, write_shards

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
    with pytest.raises(FileNotFoundError, match="holds no weights: looked for model.safetensors.index.json"):
        opened(directory)


def test_an_index_that_is_wrong(tmp_path):
    directory = write_shards(tmp_path / "m", oracle_weights())
    save_file({"x": np.zeros(2, np.float32)}, directory / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="says that model-00002-of-00002.safetensors holds .*, but it does not"):
        opened(directory)
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an index of shards"):
        opened(directory)


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
