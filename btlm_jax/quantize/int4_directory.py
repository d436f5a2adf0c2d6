"""A 4-bit model directory: `model.json`, the tokenizer's file, and weights laid out as the CPU kernels read them.

The weights are one safetensors file with a published name for every vector, and three tensors for every 4-bit matrix:
`<name>.words`, `<name>.scale`, `<name>.offset` (cpu/tiles.py has the layout). The embedding, as [D, V], has 8 bits and
no offset: at 4 bits it alone costs five times what all other matrices do (benchmarks/results/int4_methods.md).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from btlm_jax.hub.native import MODEL_FILE, ModelMetadata, read_metadata, read_tokenizer, write_metadata
from btlm_jax.hub.published import PublishedConfig, tensor_shapes
from btlm_jax.hub.safetensors_files import SINGLE_FILE, TensorToWrite, write_safetensors
from btlm_jax.hub.source import published_config
from btlm_jax.kernels.tiles import GROUP, TILE, Int4Tiles, Int8Tiles, factors_of, words_of
from btlm_jax.kernels.weights import Weights, aligned, taken_over
from btlm_jax.quantize.grouped import Int4Matrix, Int8Matrix, dequantize
from btlm_jax.quantize.quantize_model import EMBEDDING, QuantizedTensor
from btlm_jax.tokenizers.tokenizer import Tokenizer

FORMAT = "btlm_jax int4 model 1"
EMBEDDING_BITS = 8
_WORDS, _SCALE, _OFFSET = "words", "scale", "offset"
_SHAPE, _SHAPE_FIELDS = "shape", ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff")
_NUMPY = {"U32": np.uint32, "F16": np.float16, "F32": np.float32}

# Our stacked matrices -> published ones, side by side, each filled up to whole tiles if there are several.
MATRICES = {
    "qkv": ("attn.c_attn",),
    "out": ("attn.c_proj",),
    "up_gate": ("mlp.c_fc", "mlp.c_fc2"),
    "down": ("mlp.c_proj",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Model:
    """A 4-bit model in memory."""

    metadata: ModelMetadata
    weights: Weights
    tokenizer: Tokenizer | None


def is_int4_directory(directory: Path) -> bool:
    """Whether this is a directory that `write_int4_directory` wrote."""
    path = directory / MODEL_FILE
    return path.is_file() and FORMAT in path.read_text()


def write_int4_directory(
    directory: Path,
    *,
    metadata: ModelMetadata,
    rounded: Iterable[tuple[str, QuantizedTensor]],
    tokenizer: Tokenizer | None,
) -> None:
    """Write what `quantize_model` yields for groups of GROUP and EMBEDDING_BITS, one tensor in memory at a time."""
    written = list(_to_write(published_config(metadata), iter(rounded)))
    header = {"format": FORMAT, _SHAPE: _shape_of(metadata)}
    write_safetensors(directory, written, max_shard_bytes=1 << 62, metadata=header)
    write_metadata(directory, metadata, tokenizer=tokenizer, format=FORMAT)


def read_int4_directory(directory: Path) -> Int4Model:
    """Read a 4-bit model into memory, straight into the arrays that the kernels use.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or does not fit model.json.
    """
    metadata, file = _opened(directory)
    config, matrices = published_config(metadata), {}
    for ours, modules in MATRICES.items():
        shapes = [tensor_shapes(config)[f"transformer.h.0.{module}.weight"] for module in modules]
        names = [[f"transformer.h.{layer}.{module}.weight" for module in modules] for layer in range(config.n_layer)]
        matrices[ours] = _stacked(file, names, shapes)
    vectors = stacked_vectors(config, file.read)
    embedding = _stacked(file, [[EMBEDDING]], [(config.n_embd, config.vocab_size)])
    weights = Weights(embedding=embedding, vectors={k: taken_over(v) for k, v in vectors.items()}, **matrices)
    return Int4Model(metadata=metadata, weights=weights, tokenizer=read_tokenizer(directory, metadata))


def stacked_vectors(config: PublishedConfig, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Return `cpu.forward.Weights.vectors` from published vectors."""

    def of_layers(make: Callable[[str], np.ndarray]) -> np.ndarray:
        return np.stack([make(f"transformer.h.{layer}.") for layer in range(config.n_layer)])

    def bias(prefix: str, modules: tuple[str, ...]) -> np.ndarray:
        parts = [read(f"{prefix}{module}.bias") for module in modules]
        return parts[0] if len(parts) == 1 else np.concatenate([np.pad(part, (0, -len(part) % TILE)) for part in parts])

    vectors = {"ln_f.scale": read("transformer.ln_f.weight"), "ln_f.bias": read("transformer.ln_f.bias")}
    for norm in ("ln_1", "ln_2"):
        vectors[f"{norm}.scale"] = of_layers(lambda prefix, norm=norm: read(f"{prefix}{norm}.weight"))
        vectors[f"{norm}.bias"] = of_layers(lambda prefix, norm=norm: read(f"{prefix}{norm}.bias"))
    for ours, modules in MATRICES.items():
        vectors[f"{ours}.bias"] = of_layers(lambda prefix, modules=modules: bias(prefix, modules))
    return vectors


class Int4Tensors:
    """The tensors that a 4-bit directory stands for, float32, by published name; see `convert.published.Tensors`."""

    def __init__(self, directory: Path):
        metadata, self._file = _opened(directory)
        self._config = published_config(metadata)
        self.shapes = tensor_shapes(self._config)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return self._file.read(name)
        K, M = shape[::-1] if name == EMBEDDING else shape
        words_CGWM = self._file.read(f"{name}.{_WORDS}")
        C, per_word = len(words_CGWM), GROUP // words_CGWM.shape[2]
        places = words_CGWM[..., None, :] >> (32 // per_word * np.arange(per_word, dtype=np.uint32))[:, None]
        codes_KM = places.reshape(C, -1, TILE).transpose(1, 0, 2).reshape(-1, C * TILE)[:K, :M].astype(np.uint8)

        def factors(part: str) -> np.ndarray:
            return self._file.read(f"{name}.{part}").transpose(1, 0, 2).reshape(-1, C * TILE)[:, :M]

        if name == EMBEDDING:
            codes_KM = codes_KM.view(np.int8)
            return dequantize(Int8Matrix(codes_KM=codes_KM, scale_GM=factors(_SCALE), group_size=GROUP)).T
        codes_KM &= 15
        return dequantize(
            Int4Matrix(codes_KM=codes_KM, scale_GM=factors(_SCALE), offset_GM=factors(_OFFSET), group_size=GROUP)
        )


def _opened(directory: Path) -> tuple[ModelMetadata, _File]:
    """Open a directory whose two files belong together."""
    metadata, file = read_metadata(directory, format=FORMAT), _File(directory / SINGLE_FILE)
    if file.metadata.get(_SHAPE) != _shape_of(metadata):
        raise ValueError(
            f"{directory / MODEL_FILE} asks for a model of {_shape_of(metadata)}, but {SINGLE_FILE} is of one of "
            f"{file.metadata.get(_SHAPE)}"
        )
    if metadata.tokenizer is not None and metadata.tokenizer.vocab_size > metadata.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {directory} has {metadata.tokenizer.vocab_size:,} ids, more than the model's "
            f"{metadata.model.vocab_size:,}"
        )
    return metadata, file


def _shape_of(metadata: ModelMetadata) -> str:
    """Return what the tensors' sizes follow from, as one line."""
    return ", ".join(f"{name} {getattr(metadata.model, name)}" for name in _SHAPE_FIELDS)


def _to_write(config: PublishedConfig, rounded: Iterator[tuple[str, QuantizedTensor]]) -> Iterator[TensorToWrite]:
    """Yield the file's tensors in the order in which `rounded` yields; each takes its turn when it is written."""

    def take(name: str) -> QuantizedTensor:
        found, value = next(rounded)
        assert found == name, (found, name)
        return value

    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            yield TensorToWrite(name=name, shape=shape, dtype=np.dtype(np.float32), make=lambda name=name: take(name))
            continue
        K, M = shape[::-1] if name == EMBEDDING else shape
        C, G, held, last = -(-M // TILE), -(-K // GROUP), {}, _parts(name)[-1]

        def words(name=name, held=held) -> np.ndarray:
            held[name] = take(name)
            return words_of(held[name].codes_KM)

        def factors(part: str, name=name, held=held, last=last) -> np.ndarray:
            rounded = held.pop(name) if part == last else held[name]
            return factors_of(getattr(rounded, f"{part}_GM"))

        shape = (C, G, _words_a_group(name), TILE)
        yield TensorToWrite(name=f"{name}.{_WORDS}", shape=shape, dtype=np.dtype(np.uint32), make=words)
        for part in _parts(name):
            make = functools.partial(factors, part)
            yield TensorToWrite(name=f"{name}.{part}", shape=(C, G, TILE), dtype=np.dtype(np.float16), make=make)


def _words_a_group(name: str) -> int:
    return GROUP * (EMBEDDING_BITS if name == EMBEDDING else 4) // 32


def _parts(name: str) -> tuple[str, ...]:
    return (_SCALE,) if name == EMBEDDING else (_SCALE, _OFFSET)


def _stacked(file: _File, names: list[list[str]], shapes: list[tuple[int, int]]) -> Int4Tiles | Int8Tiles:
    """Read matrices of the same inputs side by side, layer by layer, into arrays that are made once."""
    K, widths = shapes[0][0], [shape[1] for shape in shapes]
    tiles, G = [-(-width // TILE) for width in widths], -(-K // GROUP)
    first_name = names[0][0]
    made = {_WORDS: aligned((len(names), sum(tiles), G, _words_a_group(first_name), TILE), np.uint32)}
    made |= {part: aligned((len(names), sum(tiles), G, TILE), np.float16) for part in _parts(first_name)}
    for layer, parts in enumerate(names):
        first = 0
        for name, count in zip(parts, tiles, strict=True):
            for part, array in made.items():
                file.read_into(f"{name}.{part}", array[layer, first : first + count])
            first += count
    num_outputs = widths[0] if len(widths) == 1 else sum(tiles) * TILE
    kind = Int8Tiles if first_name == EMBEDDING else Int4Tiles
    arrays = {part: taken_over(array) for part, array in made.items()}
    return kind(**arrays, num_inputs=K, num_outputs=num_outputs)


class _File:
    """A safetensors file, read without mapping it: mapped pages would count as the process's memory."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the weights of a 4-bit model")
        self._path, size = path, path.stat().st_size
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._entries = json.loads(file.read(min(length, size)))
            self.metadata = self._entries.pop("__metadata__", {})
            self._start = end = 8 + length
            for entry in sorted(self._entries.values(), key=lambda entry: entry["data_offsets"]):
                num_bytes = math.prod(entry["shape"]) * np.dtype(_NUMPY[entry["dtype"]]).itemsize
                if entry["data_offsets"] != [end - self._start, end - self._start + num_bytes]:
                    raise ValueError(f"the places of its tensors contradict their shapes: {entry}")
                end += num_bytes
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged or no file of 4-bit weights: {error}") from error
        if end != size:
            raise ValueError(f"{path} is damaged: it has {size:,} bytes, not {end:,}")

    def read(self, name: str) -> np.ndarray:
        entry = self._entry(name)
        array = aligned(tuple(entry["shape"]), _NUMPY[entry["dtype"]])
        self.read_into(name, array)
        return array

    def read_into(self, name: str, array: np.ndarray) -> None:
        entry = self._entry(name)
        if tuple(entry["shape"]) != array.shape or _NUMPY[entry["dtype"]] != array.dtype:
            raise ValueError(
                f"tensor {name} in {self._path} is {entry['dtype']} {tuple(entry['shape'])}, but model.json asks for "
                f"{array.dtype} {array.shape}"
            )
        with open(self._path, "rb", buffering=0) as file:
            file.seek(self._start + entry["data_offsets"][0])
            view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{self._path} ends within tensor {name}")
                done += count

    def _entry(self, name: str) -> dict:
        if name not in self._entries:
            raise ValueError(f"{self._path} has no tensor {name}; model.json does not belong to it")
        return self._entries[name]
