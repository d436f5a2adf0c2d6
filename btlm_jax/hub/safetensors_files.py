"""Safetensors written one tensor at a time, in shards with an index, so that no more than one is ever in memory.

The library's own writer wants all tensors at once; it reads what is written here. Format: the length of a JSON header
as 8 little-endian bytes, the header, the tensors' bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """A tensor before it exists: `make` returns it when its turn comes."""

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
    """Write the tensors in their order to `model.safetensors`, or to shards with an index when they are too large.

    Every file is synced to disk. The directory is the caller's temporary one: a file under its final name may be a part
    until this returns. Returns the files.

    Raises:
      ValueError: a tensor came out with another shape or dtype than announced.
    """
    shards = _split(tensors, max_shard_bytes=max_shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, shards[0], metadata=metadata)
        return [directory / SINGLE_FILE]
    written, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, metadata=metadata)
        written.append(directory / name)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [*written, directory / INDEX_FILE]


def _split(tensors: Iterable[TensorToWrite], *, max_shard_bytes: int) -> list[list[TensorToWrite]]:
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[TensorToWrite], *, metadata: Mapping[str, str]) -> None:
    header, offset = {"__metadata__": dict(metadata)}, 0
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
            file.write(memoryview(np.ascontiguousarray(array).view(np.uint8).reshape(-1)))
        file.flush()
        os.fsync(file.fileno())
