"""Safetensors files, one tensor in memory at a time: written as a stream, read through the safetensors library.

The library's own writer wants all tensors at once, so the writer is ours. Format: the length of a JSON header as 8
little-endian bytes, the header, the tensors' bytes (https://github.com/huggingface/safetensors).

Files written here have the sha256 of every tensor, and of the header, in the header's __metadata__. A file that another
program has written is read without them, even if it took over the __metadata__: it is not laid out as it is here, where
__metadata__ comes last and tensors are in the order of the network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from btlm_jax.storage.files import check_no_lfs_pointer, hash_file, naming, write_atomically

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}


# What numpy has; PyTorch's narrower types have none.
_READABLE = {
    "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64",
}  # fmt: skip
_METADATA, _HASHES, _OF_HEADER = "__metadata__", "btlm_jax.sha256", ""  # _OF_HEADER: the name of the header's own hash
_NO_HASH = "0" * 64
_LARGEST_HEADER = 100_000_000  # bytes, of the library


class SafetensorsFile:
    """A file whose header has been read; it is opened anew for every tensor, so that mapped pages are given back."""

    def __init__(self, path: Path):
        """Read the header.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is damaged: cut short, or its header contradicts itself, the file's size or its own hash; or it
            is a Git LFS pointer.
        """
        self.path = path
        check_no_lfs_pointer(path)
        try:
            with safe_open(path, "numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self._dtypes = {name: part.get_dtype() for name, part in slices.items()}
                self.metadata: dict[str, str] = file.metadata() or {}
        except SafetensorError as error:
            size = path.stat().st_size
            raise ValueError(f"{path} is damaged or not a safetensors file, of {size:,} bytes: {error}") from error
        self._hashes = _stored_hashes(path)

    @property
    def is_ours(self) -> bool:
        """Whether it was written here, and not changed by another program since."""
        return bool(self._hashes)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in the dtype it is stored in.

        Raises:
          ValueError: its dtype has no NumPy, or its bytes are not those that were written.
        """
        if self._dtypes[name] not in _READABLE:
            raise ValueError(
                f"tensor {name} of {self.path} is {self._dtypes[name]}, which cannot be read here; save it as float32, "
                "float16 or bfloat16"
            )
        with safe_open(self.path, "numpy") as file:
            array = file.get_tensor(name)
        if name in self._hashes and hashlib.sha256(_bytes_of(array)).hexdigest() != self._hashes[name]:
            raise ValueError(
                f"tensor {name} of {self.path} is damaged: its sha256 is not the one that was written with it; restore "
                "the file from a copy or convert the model again (saving it with another program drops the hashes)"
            )
        return array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """A tensor that is not in memory yet: `make` returns it when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    directory: Path, tensors: Sequence[TensorToWrite], *, max_shard_bytes: int, metadata: Mapping[str, str]
) -> list[Path]:
    """Write the tensors in order to `model.safetensors`, or, if they exceed `max_shard_bytes`, to shards with an index.

    Every file is synced to disk. `directory` is a temporary one of the caller: until this returns, a file under its
    final name may be incomplete. Returns the files.

    Raises:
      ValueError: `make` returned another shape or dtype than the tensor's.
    """
    shards = _split(tensors, max_shard_bytes=max_shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, shards[0], metadata=metadata)
        return [directory / SINGLE_FILE]
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, metadata=metadata)
        files.append(directory / name)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return [*files, directory / INDEX_FILE]


def hash_contents(path: Path) -> str:
    """Return a hash of a file's contents; one that was written here has it in its header, and is not read whole.

    Raises:
      OSError: it cannot be read.
      ValueError: it was written here, and its header is not as it was.
    """
    return _stored_hashes(path).get(_OF_HEADER) or hash_file(path)


def _split(tensors: Iterable[TensorToWrite], *, max_shard_bytes: int) -> list[list[TensorToWrite]]:
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[TensorToWrite], *, metadata: Mapping[str, str]) -> None:
    hashes = dict.fromkeys((_OF_HEADER, *(tensor.name for tensor in tensors)), _NO_HASH)
    header: dict[str, dict] = {}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    header[_METADATA] = dict(metadata)
    encoded = _encode_header(header, hashes)
    with naming(path), open(path, "wb") as file:  # on a full disk closing fails too
        file.write(encoded)
        for tensor in tensors:
            array = tensor.make()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"tensor {tensor.name} came out as {array.dtype} {array.shape}, not {tensor.dtype} {tensor.shape}"
                )
            data = _bytes_of(array)
            hashes[tensor.name] = hashlib.sha256(data).hexdigest()
            file.write(data)
        hashes[_OF_HEADER] = hashlib.sha256(_encode_header(header, hashes)).hexdigest()
        file.seek(0)
        file.write(_encode_header(header, hashes))  # as long as before
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _encode_header(header: Mapping[str, dict], hashes: Mapping[str, str]) -> bytes:
    """Return the header with the hashes in its __metadata__, which comes last, and its length before it."""
    metadata = {**header[_METADATA], _HASHES: json.dumps(hashes, separators=(",", ":"))}
    encoded = json.dumps({**header, _METADATA: metadata}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that tensors start at a multiple of 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


def _stored_hashes(path: Path) -> dict[str, str]:
    """Return each tensor's hash; none for a file that was not written here.

    Raises:
      ValueError: it was written here, and its header is not as it was.
    """
    with open(path, "rb") as file:
        length = file.read(8)
        encoded = length + file.read(min(int.from_bytes(length, "little"), _LARGEST_HEADER))
    try:
        header = json.loads(encoded[8:])
        hashes = json.loads(header[_METADATA].pop(_HASHES))
        is_ours = list(header)[-1] == _METADATA and _encode_header(header, hashes) == encoded
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    if not is_ours:
        return {}
    expected = hashlib.sha256(_encode_header(header, hashes | {_OF_HEADER: _NO_HASH})).hexdigest()
    if hashes.get(_OF_HEADER) != expected:
        raise ValueError(f"{path} is damaged: its header is not as it was written; restore it from a copy")
    return hashes
