"""Read the tensors of a Hugging Face BTLM directory: safetensors or .bin, sharded or single, one at a time, checked."""

from __future__ import annotations

import functools
import importlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from btlm_jax import install_command, notices
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.hub.published import CONFIG_FILE, EMBEDDING, HEAD, SLOPES, PublishedConfig, tensor_shapes
from btlm_jax.hub.safetensors_files import INDEX_FILE, SINGLE_FILE, SafetensorsFile
from btlm_jax.storage.files import check_no_lfs_pointer, hash_file, parse_json_object, read_json_object

# Key of the weights' metadata: the sha256 by name of files that were written beside them and decide numbers or ids
FILE_HASHES = "btlm_jax.files"
_HASHED_FILES = (CONFIG_FILE, "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_BIN_INDEX, _BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
# In the order in which transformers looks for them (modeling_utils.py, _get_resolved_checkpoint_files)
WEIGHT_FILES = (SINGLE_FILE, INDEX_FILE, _BIN, _BIN_INDEX)
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
        if config.n_layer > len(self._file_of):  # each layer has several tensors; listing all of them would take hours
            raise ValueError(
                f"{directory / CONFIG_FILE}: n_layer={config.n_layer:,} does not belong to weights of "
                f"{len(self._file_of):,} tensors"
            )
        self.shapes: Mapping[str, tuple[int, ...]] = tensor_shapes(config)
        self._check_names_and_shapes()
        self._check_extras(config)
        self._report_changed_files()

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

    @property
    def files(self) -> set[str]:
        """The names of the files that hold the tensors."""
        return {file.path.name for file in self._file_of.values()}

    def _report_changed_files(self) -> None:
        """Say which files are not as they were when these weights were written here; that may be on purpose."""
        file = self._file_of[EMBEDDING]
        if not isinstance(file, SafetensorsFile) or not file.is_ours or FILE_HASHES not in file.metadata:
            return
        recorded = parse_json_object(file.metadata[FILE_HASHES], name=f"{FILE_HASHES} of {file.path}")
        found = file_hashes(self.directory)
        changed = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
        if changed:
            notices.report(
                "changed-since-export",
                f"{', '.join(changed)} of {self.directory} changed since btlm convert wrote them beside these weights",
                count=len(changed),
            )

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
                if mask.ndim != 4 or not np.array_equal(mask[0, 0] != 0, np.tri(*mask.shape[-2:], dtype=bool)):
                    raise ValueError(f"{name} in {self.directory} is not a causal mask; only causal ones are computed")


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 by name of a directory's files that FILE_HASHES is about."""
    return {name: hash_file(directory / name) for name in _HASHED_FILES if (directory / name).is_file()}


def _is_known_extra(name: str) -> bool:
    return name in (HEAD, SLOPES) or _MASK.fullmatch(name) is not None


class _TensorFile(Protocol):
    """A file of weights; its tensors are read one at a time."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


def _open_weights(directory: Path) -> dict[str, _TensorFile]:
    """Return the file that holds each tensor: of the first of WEIGHT_FILES that exists, as transformers reads them.

    Raises:
      FileNotFoundError: there are no weights, or a shard that the index names is missing.
      ValueError: the index or a file is damaged.
    """
    found = [name for name in WEIGHT_FILES if (directory / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{directory} holds no weights: looked for {', '.join(WEIGHT_FILES)}")
    if len(found) > 1:
        notices.report(
            "weights-preferred",
            f"{directory} has {', '.join(found)}: {found[0]} is read, as transformers does, and the rest is not",
            count=len(found) - 1,
        )
    path = directory / found[0]
    if found[0] in (INDEX_FILE, _BIN_INDEX):
        return _open_shards(path)
    file = _open(path)
    return dict.fromkeys(file.shapes, file)


def _open_shards(index: Path) -> dict[str, _TensorFile]:
    """Return the tensors of all files that an index names, as transformers does, which asks the files themselves."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} is not an index of shards: it needs a weight_map of tensors' names to files' names")
    shards = sorted(set(weight_map.values()))
    files: dict[str, _TensorFile] = {}
    for shard in shards:
        path = index.parent / shard
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}; a shard is a file beside it")
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} is missing; {index.name} names it")
        files[shard] = _open(path)
    file_of = {name: file for file in files.values() for name in file.shapes}
    wrong = [name for name, shard in weight_map.items() if name not in file_of or file_of[name] is not files[shard]]
    wrong += [name for name in file_of if name not in weight_map]
    if wrong:
        notices.report(
            "index-contradicts",
            f"{index} is wrong about {len(wrong)} tensors, such as {wrong[0]}: what the shards themselves hold is read",
            count=len(wrong),
        )
    return file_of


def _open(path: Path) -> _TensorFile:
    return _PickledFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


class _PickledFile:
    """A pickled state dict; PyTorch reads it with code execution forbidden."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes = {name: tuple(tensor.shape) for name, tensor in _state_dict(path).items()}

    def read(self, name: str) -> np.ndarray:
        torch, tensor = _torch(self.path), _state_dict(self.path)[name].detach()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_meta or tensor.layout != torch.strided or not hasattr(np, dtype) and dtype != "bfloat16":
            kind = "on the meta device, without values" if tensor.is_meta else f"{dtype}, {tensor.layout}"
            raise ValueError(
                f"tensor {name} of {self.path} is {kind}; only plain tensors of {', '.join(_READABLE)} can be read"
            )
        if tensor.dtype != torch.bfloat16:
            return tensor.numpy().copy()
        return tensor.contiguous().view(torch.int16).numpy().copy().view("bfloat16")


@functools.lru_cache(maxsize=1)  # one shard is open at a time
def _state_dict(path: Path) -> dict[str, Any]:
    """Return a file's torch tensors by name, mapped where the format allows it.

    Raises:
      ValueError: it is damaged, holds other objects than tensors by name, or would run code.
    """
    torch = _torch(path)
    check_no_lfs_pointer(path)
    try:
        mapped = zipfile.is_zipfile(path)  # the format before PyTorch 1.6 cannot be mapped
        state = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch's message recommends to run the code after all
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (
            f"names {refused[1]}, which is no tensor and could run code" if refused else "is damaged or no state dict"
        )
        raise ValueError(
            f"{path} {what}; only files of plain tensors by name are read: get the model as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or not a PyTorch state dict: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict of tensors by name")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path} holds a {type(tensor).__name__} under {name!r}; a state dict has tensors by name and nothing "
                "else: save model.state_dict() alone"
            )
    return state


def _torch(path: Path) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ValueError(f"{path} needs PyTorch to be read: {install_command('hf')}") from error
