"""Read the tensors of a Hugging Face BTLM directory: safetensors or .bin, sharded or single, one at a time, checked.

A file is opened anew for every tensor, so that mapped pages never add up to the file's size.
"""

from __future__ import annotations

import functools
import importlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.hub.published import PublishedConfig, tensor_shapes
from btlm_jax.hub.safetensors_files import INDEX_FILE, SINGLE_FILE

HEAD, EMBEDDING, SLOPES = "lm_head.weight", "transformer.wte.weight", "transformer.relative_pe.slopes"
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_BIN_INDEX, _BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
_READABLE = ("float32", "float16", "bfloat16")


class HuggingFaceTensors:
    """The tensors of a directory; see `published.Tensors`. Made only when all of them are there and right."""

    def __init__(self, directory: Path, config: PublishedConfig):
        self.directory = directory
        self._file_of = _file_of_tensor(directory)
        self.shapes: Mapping[str, tuple[int, ...]] = tensor_shapes(config)
        self._check_names_and_shapes()
        self._check_extras(config)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as it is stored.

        Raises:
          ValueError: it holds NaN or infinity, or is of a dtype that no BTLM checkpoint has.
        """
        array = _open(self._file_of[name]).read(name)
        if array.dtype.name not in _READABLE:
            raise ValueError(
                f"tensor {name} of {self.directory} is {array.dtype}; only {', '.join(_READABLE)} can be read"
            )
        finite = np.isfinite(array)
        if not finite.all():
            bad = int((~finite).sum())
            raise ValueError(f"tensor {name} of {self.directory} holds {bad:,} values that are not finite")
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
        for path in sorted(set(self._file_of.values())):
            for name, shape in _open(path).shapes().items():
                if name in self.shapes and shape != self.shapes[name]:
                    raise ValueError(
                        f"tensor {name} in {path} has shape {shape}, but config.json asks for {self.shapes[name]}"
                    )

    def _check_extras(self, config: PublishedConfig) -> None:
        if HEAD in self._file_of and not np.array_equal(self.read(HEAD), self.read(EMBEDDING)):
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
        for name, path in self._file_of.items():
            if _MASK.fullmatch(name) and name.endswith(".attn.bias"):
                mask = _open(path).read(name)
                if not np.array_equal(mask[0, 0] != 0, np.tri(*mask.shape[-2:], dtype=bool)):
                    raise ValueError(f"{name} in {self.directory} is not a causal mask; only causal ones are computed")


def _is_known_extra(name: str) -> bool:
    return name in (HEAD, SLOPES) or _MASK.fullmatch(name) is not None


def _file_of_tensor(directory: Path) -> dict[str, Path]:
    """Return which file holds each tensor.

    Raises:
      FileNotFoundError: there are no weights, or a shard that the index names is missing.
      ValueError: the index or a file is damaged.
    """
    for index in (INDEX_FILE, _BIN_INDEX):
        if (directory / index).is_file():
            return _file_of_index(directory / index)
    for single in (SINGLE_FILE, _BIN):
        if (directory / single).is_file():
            return dict.fromkeys(_open(directory / single).shapes(), directory / single)
    raise FileNotFoundError(
        f"{directory} holds no weights: looked for {INDEX_FILE}, {_BIN_INDEX}, {SINGLE_FILE} and {_BIN}"
    )


def _file_of_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        found = {name: path.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of shards: {error!r}") from error
    for shard in sorted(set(found.values())):
        if not shard.is_file():
            raise FileNotFoundError(f"shard {shard} is missing; {path.name} names it")
    for name, shard in found.items():
        if name not in _open(shard).shapes():
            raise ValueError(f"{path.name} says that {shard.name} holds {name}, but it does not")
    return found


def _open(path: Path) -> _SafetensorsFile | _PickledFile:
    return _pickled_file(path) if path.suffix == ".bin" else _SafetensorsFile(path)


class _SafetensorsFile:
    def __init__(self, path: Path):
        self._path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _safetensors_shapes(self._path)

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._path, "numpy") as file:
            return file.get_tensor(name)


@functools.lru_cache(maxsize=256)
def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


class _PickledFile:
    """A pickled state dict, mapped; PyTorch reads it with code execution forbidden."""

    def __init__(self, path: Path):
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            raise ValueError(f"{path} needs PyTorch to be read; pip install 'btlm_jax[hf]'") from error
        try:
            mapped = zipfile.is_zipfile(path)  # the format before PyTorch 1.6 cannot be
            self._tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is damaged or not a PyTorch state dict: {reason}") from error
        self._bfloat16 = torch.bfloat16
        self._int16 = torch.int16

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if tensor.dtype != self._bfloat16:
            return tensor.numpy().copy()
        return tensor.contiguous().view(self._int16).numpy().copy().view("bfloat16")


@functools.lru_cache(maxsize=1)
def _pickled_file(path: Path) -> _PickledFile:
    return _PickledFile(path)
