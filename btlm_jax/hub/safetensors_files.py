"""Safetensors files, one tensor in memory at a time: written as a stream, read through the safetensors library.

The library's own writer wants all tensors at once, so the writer is ours. Format: the length of a JSON header as 8
little-endian bytes, the header, the tensors' bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}


class SafetensorsFile:
    """A file whose header has been read; it is opened anew for every tensor, so that mapped pages are given back."""

    def __init__(self, path: Path):
        """Read the header.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is damaged: cut short, or its header contradicts itself or the file's size.
        """
        self.path = path
        try:
            with safe_open(path, "numpy") as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                self.metadata: dict[str, str] = file.metadata() or {}
        except SafetensorError as error:
            size = path.stat().st_size
            raise ValueError(f"{path} is damaged or not a safetensors file, of {size:,} bytes: {error}") from error

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in the dtype it is stored in."""
        with safe_open(self.path, "numpy") as file:
            return file.get_tensor(name)


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
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [*files, directory / INDEX_FILE]


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
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that tensors start at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            array = tensor.make()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"tensor {tensor.name} came out as {array.dtype} {array.shape}, not {tensor.dtype} {tensor.shape}"
                )
            file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        file.flush()
        os.fsync(file.fileno())
