"""Streamed safetensors against the library's reader."""

import json

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from btlm_jax.hub import safetensors_files
from btlm_jax.hub.safetensors_files import (
    SINGLE_FILE,
    SafetensorsFile,
    TensorToWrite,
    hash_contents,
    write_safetensors,
)

ARRAYS = {
    "b": np.arange(15, dtype=np.float32).reshape(3, 5),
    "a": np.arange(7).astype(bfloat16),
    "c": np.arange(12, dtype=np.uint32).reshape(2, 2, 3),
    "d": np.float16(3.5).reshape(1),
}


def announced(**changes):
    return [
        TensorToWrite(name=name, shape=array.shape, dtype=array.dtype, make=lambda array=array: array)
        for name, array in (ARRAYS | changes).items()
    ]


@pytest.mark.parametrize("max_shard_bytes", [1, 70, 10**9])
def test_the_library_reads_the_same(tmp_path, max_shard_bytes):
    files = write_safetensors(tmp_path, announced(), max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})
    assert sorted(files) == sorted(tmp_path.iterdir())
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) == {1: 4, 70: 2, 10**9: 1}[max_shard_bytes]
    actual = {name: (array, file.name) for file in shards for name, array in load_file(file).items()}
    assert actual.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert actual[name][0].dtype == array.dtype
        np.testing.assert_array_equal(actual[name][0], array)
    if len(shards) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for name, (_, file) in actual.items()}
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())


def test_one_tensor_at_a_time_exists(tmp_path):
    alive = []

    def make(name):
        assert not alive or alive[-1] != name
        alive.append(name)
        return np.zeros(4, np.float32)

    tensors = [TensorToWrite(name=n, shape=(4,), dtype=np.dtype("float32"), make=lambda n=n: make(n)) for n in "xyz"]
    assert alive == []
    write_safetensors(tmp_path, tensors, max_shard_bytes=1000, metadata={})
    assert alive == ["x", "y", "z"]


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / SINGLE_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*model.safetensors"):
        write_safetensors(tmp_path, announced(), max_shard_bytes=10**9, metadata={})


def test_another_shape_than_announced(tmp_path):
    wrong = TensorToWrite(name="w", shape=(2,), dtype=np.dtype("float32"), make=lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"tensor w came out as float32 \(3,\), not float32 \(2,\)"):
        write_safetensors(tmp_path, [wrong], max_shard_bytes=100, metadata={})


def flip(path, bit):
    contents = bytearray(path.read_bytes())
    contents[bit // 8] ^= 1 << bit % 8
    path.write_bytes(contents)


def read_all(path):
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.shapes}


def test_every_flipped_bit_that_changes_a_number_is_named(tmp_path):
    [path] = write_safetensors(tmp_path, announced(), max_shard_bytes=10**9, metadata={"format": "pt"})
    whole = path.read_bytes()
    num_named = 0
    for bit in range(0, 8 * len(whole), 7):
        flip(path, bit)
        try:
            read = read_all(path)
        except ValueError as error:
            num_named += str(path) in str(error)
        else:
            assert read.keys() == ARRAYS.keys(), bit
            for name, array in ARRAYS.items():
                np.testing.assert_array_equal(read[name], array, err_msg=f"bit {bit}")
        path.write_bytes(whole)
    assert num_named > 8 * sum(array.nbytes for array in ARRAYS.values()) / 7


@pytest.mark.parametrize("tensors", [ARRAYS, {"b": ARRAYS["b"]}], ids=["several", "one"])
def test_a_stale_hash_refuses_nothing(tmp_path, tensors):
    """Another program took the metadata over: alone, with a single tensor, its header has the same parts as ours."""
    write_safetensors(tmp_path, [one for one in announced() if one.name in tensors], max_shard_bytes=10**9, metadata={})
    path = tmp_path / "model.safetensors"
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert "sha256" in "".join(metadata)
    changed = {name: (array + 1).astype(array.dtype) for name, array in tensors.items()}
    save_file(changed, path, metadata=metadata)
    assert not SafetensorsFile(path).is_ours
    for name, array in read_all(path).items():
        np.testing.assert_array_equal(array, changed[name])


def test_of_a_damaged_file_no_more_than_a_header_is_read(tmp_path, monkeypatch):
    with open(tmp_path / SINGLE_FILE, "wb") as file:
        file.write(b"\xff" * 8)
        file.truncate(1 << 42)
    monkeypatch.setattr(safetensors_files, "hash_file", lambda path: f"of {path.name}")
    assert hash_contents(tmp_path / SINGLE_FILE) == f"of {SINGLE_FILE}"
