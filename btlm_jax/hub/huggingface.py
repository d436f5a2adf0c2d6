"""Read the tensors of a Hugging Face BTLM directory: safetensors or .bin, sharded or single, one at a time, checked."""

from __future__ import annotations

import functools
import importlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from btlm_jax import install_command
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.hub.published import EMBEDDING, HEAD, SLOPES, PublishedConfig, tensor_shapes
from btlm_jax.hub.safetensors_files import INDEX_FILE, SINGLE_FILE, SafetensorsFile

_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_BIN_INDEX, _BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
_READABLE = ("float32", "float16", "bfloat16")


class HuggingFaceTensors:
    """The tensors of a directory; see `published.Tensors`. Names and shapes are checked when this is made."""

    def __init__(self, directory: Path, config: PublishedConfig):
        """Open every file of weights.

        Raises:
          FileNotFoundError: there are no weights, or a shard is missing.
          ValueError: a file is damaged or contradicts the config; it cannot be computed here, such as an untied head.
        """
        self.directory = directory
        self._file_of = _open_weights(directory)
        self.shapes: Mapping[str, tuple[int, ...]] = tensor_shapes(config)
        self._check_names_and_shapes()
        self._check_extras(config)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as it is stored.

        Raises:
          ValueError: it holds NaN or infinity, or has a dtype that no BTLM checkpoint has.
        """
        array = self._file_of[name].read(name)
        if array.dtype.name not in _READABLE:
            raise ValueError(
                f"tensor {name} of {self.directory} is {array.dtype}; only {', '.join(_READABLE)} can be read"
            )
        finite = np.isfinite(array)
        if not finite.all():
            num_bad = int((~finite).sum())
            raise ValueError(f"tensor {name} of {self.directory} holds {num_bad:,} values that are not finite")
        return array

    @property
    def has_head(self) -> bool:
        """Whether there is an lm_head.weight, which is then equal to the embedding."""
        return HEAD in self._file_of

    def _check_names_and_shapes(self) -> None:
        missing = [name for name in self.shapes if name not in self._file_of]
        if missing:
            raise ValueError(
                f"{self.directory} lacks {len(missing)} of {len(self.shapes)} tensors, the first is {missing[0]}; "
                "config.json does not belong to these weights, or a shard is missing"
            )
        extras = [name for name in self._file_of if name not in self.shapes and not _is_known_extra(name)]
        if extras:
            raise ValueError(
                f"{self.directory} has {len(extras)} tensors that no BTLM has, the first is {extras[0]}; "
                "config.json does not belong to these weights"
            )
        for name, expected in self.shapes.items():
            file = self._file_of[name]
            if file.shapes[name] != expected:
                raise ValueError(
                    f"tensor {name} in {file.path} has shape {file.shapes[name]}, but config.json asks for {expected}"
                )

    def _check_extras(self, config: PublishedConfig) -> None:
        if self.has_head and not np.array_equal(self.read(HEAD), self.read(EMBEDDING)):
            raise ValueError(
                f"{HEAD} in {self.directory} differs from {EMBEDDING}; only tied embeddings can be computed"
            )
        if SLOPES in self._file_of:
            slopes_N1 = self.read(SLOPES)
            expected_N1 = alibi_slopes(config.n_head, scaling=1.0).astype(slopes_N1.dtype)[:, None]
            if slopes_N1.shape != expected_N1.shape or not np.allclose(
                np.abs(slopes_N1).astype(np.float32), expected_N1.astype(np.float32), rtol=8e-3
            ):
                raise ValueError(f"{SLOPES} in {self.directory} are not the ALiBi slopes of {config.n_head} heads")
        for name, file in self._file_of.items():
            if _MASK.fullmatch(name) and name.endswith(".attn.bias"):
                mask = file.read(name)
                if not np.array_equal(mask[0, 0] != 0, np.tri(*mask.shape[-2:], dtype=bool)):
                    raise ValueError(f"{name} in {self.directory} is not a causal mask; only causal ones are computed")


def _is_known_extra(name: str) -> bool:
    return name in (HEAD, SLOPES) or _MASK.fullmatch(name) is not None


class _TensorFile(Protocol):
    """A file of weights; its tensors are read one at a time."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


def _open_weights(directory: Path) -> dict[str, _TensorFile]:
    """Return the file that holds each tensor.

    Raises:
      FileNotFoundError: there are no weights, or a shard that the index names is missing.
      ValueError: the index or a file is damaged.
    """
    for index in (INDEX_FILE, _BIN_INDEX):
        if (directory / index).is_file():
            return _open_shards(directory / index)
    for single in (SINGLE_FILE, _BIN):
        if (directory / single).is_file():
            file = _open(directory / single)
            return dict.fromkeys(file.shapes, file)
    raise FileNotFoundError(
        f"{directory} holds no weights: looked for {INDEX_FILE}, {_BIN_INDEX}, {SINGLE_FILE} and {_BIN}"
    )


def _open_shards(index: Path) -> dict[str, _TensorFile]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        path_of = {name: index.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from error
    shards = sorted(set(path_of.values()))
    for path in shards:
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} is missing; {index.name} names it")
    files = {path: _open(path) for path in shards}
    for name, path in path_of.items():
        if name not in files[path].shapes:
            raise ValueError(f"{index.name} says that {path.name} holds {name}, but it does not")
    return {name: files[path] for name, path in path_of.items()}


def _open(path: Path) -> _TensorFile:
    return _PickledFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


class _PickledFile:
    """A pickled state dict; PyTorch reads it with code execution forbidden."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes = {name: tuple(tensor.shape) for name, tensor in _state_dict(path).items()}

    def read(self, name: str) -> np.ndarray:
        tensor = _state_dict(self.path)[name]
        torch = _torch(self.path)
        if tensor.dtype != torch.bfloat16:
            return tensor.numpy().copy()
        return tensor.contiguous().view(torch.int16).numpy().copy().view("bfloat16")


@functools.lru_cache(maxsize=1)  # one shard is open at a time
def _state_dict(path: Path) -> dict[str, Any]:
    """Return a file's torch tensors by name, mapped where the format allows it."""
    torch = _torch(path)
    try:
        mapped = zipfile.is_zipfile(path)  # the format before PyTorch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or not a PyTorch state dict: {reason}") from error


def _torch(path: Path) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ValueError(f"{path} needs PyTorch to be read: {install_command('hf')}") from error
