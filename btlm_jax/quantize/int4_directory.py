"""A 4-bit model directory: `model.json`, the tokenizer's file, and weights in the layout that the CPU kernels read.

The weights are one safetensors file: every vector under its published name, float32, and for every 4-bit matrix three
tensors, `<name>.words`, `<name>.scale` and `<name>.offset` (kernels/tiles.py has the layout). The embedding, as [D, V],
has 8 bits and no offset: at 4 bits it alone costs five times as much loss as all other matrices together
(benchmarks/results/int4_methods.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from btlm_jax.hub.native import MODEL_FILE, ModelMetadata, read_metadata, read_tokenizer, write_metadata
from btlm_jax.hub.published import EMBEDDING, FINAL_NORM, PublishedConfig, block_prefix, tensor_shapes
from btlm_jax.hub.safetensors_files import SINGLE_FILE, SafetensorsFile, TensorToWrite, write_safetensors
from btlm_jax.hub.source import published_config
from btlm_jax.kernels.build import GROUP_INPUTS, TILE_OUTPUTS
from btlm_jax.kernels.tiles import Int4Tiles, Int8Tiles, pack_codes, tile_factors
from btlm_jax.kernels.weights import Weights, aligned_empty, from_numpy_zero_copy
from btlm_jax.quantize.grouped import Int4Matrix, Int8Matrix, dequantize
from btlm_jax.quantize.quantize_model import QuantizedTensor
from btlm_jax.tokenizers.tokenizer import Tokenizer

FORMAT = "btlm_jax int4 model 1"
EMBEDDING_BITS = 8
_WORDS, _SCALE, _OFFSET = "words", "scale", "offset"
# The key of the file's metadata, and its fields, that say which model.json the weights belong to
_SHAPE, _SHAPE_FIELDS = "shape", ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff")

# Fields of kernels.weights.Weights -> published matrices side by side, each padded to whole tiles if there are several.
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
    return path.is_file() and FORMAT.encode() in path.read_bytes()


def write_int4_directory(
    directory: Path,
    *,
    metadata: ModelMetadata,
    quantized: Iterable[tuple[str, QuantizedTensor]],
    tokenizer: Tokenizer | None,
) -> None:
    """Write what `quantize_model` yields for GROUP_INPUTS and EMBEDDING_BITS, one tensor in memory at a time."""
    tensors = list(_tensors_to_write(published_config(metadata), iter(quantized)))
    header = {"format": FORMAT, _SHAPE: _shape_of(metadata)}
    write_safetensors(directory, tensors, max_shard_bytes=1 << 62, metadata=header)
    write_metadata(directory, metadata, tokenizer=tokenizer, format=FORMAT)


def read_int4_directory(directory: Path) -> Int4Model:
    """Read a 4-bit model into memory, into the arrays that the kernels use.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or does not fit model.json.
    """
    metadata, file = _open_directory(directory)
    config = published_config(metadata)
    shapes = tensor_shapes(config)
    # The embedding first: it is the largest tensor, and for a moment there are two of it.
    embedding = _read_tiles(file, [[EMBEDDING]], num_inputs=config.n_embd, widths=[config.vocab_size])
    matrices = {}
    for field, modules in MATRICES.items():
        names = [[f"{block_prefix(layer)}{module}.weight" for module in modules] for layer in range(config.n_layer)]
        widths = [shapes[name][1] for name in names[0]]
        matrices[field] = _read_tiles(file, names, num_inputs=shapes[names[0][0]][0], widths=widths)
    vectors = stacked_vectors(config, lambda name: _read(file, name, shape=shapes[name], dtype=np.float32))
    weights = Weights(embedding=embedding, vectors={k: from_numpy_zero_copy(v) for k, v in vectors.items()}, **matrices)
    return Int4Model(metadata=metadata, weights=weights, tokenizer=read_tokenizer(directory, metadata))


def stacked_vectors(config: PublishedConfig, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Return `kernels.weights.Weights.vectors` from published vectors."""

    def of_layers(vector_of: Callable[[str], np.ndarray]) -> np.ndarray:
        return np.stack([vector_of(block_prefix(layer)) for layer in range(config.n_layer)])

    def bias(prefix: str, modules: tuple[str, ...]) -> np.ndarray:
        parts = [read(f"{prefix}{module}.bias") for module in modules]
        return (
            parts[0]
            if len(parts) == 1
            else np.concatenate([np.pad(part, (0, -len(part) % TILE_OUTPUTS)) for part in parts])
        )

    vectors = {"ln_f.scale": read(f"{FINAL_NORM}.weight"), "ln_f.bias": read(f"{FINAL_NORM}.bias")}
    for norm in ("ln_1", "ln_2"):
        vectors[f"{norm}.scale"] = of_layers(lambda prefix, norm=norm: read(f"{prefix}{norm}.weight"))
        vectors[f"{norm}.bias"] = of_layers(lambda prefix, norm=norm: read(f"{prefix}{norm}.bias"))
    for field, modules in MATRICES.items():
        vectors[f"{field}.bias"] = of_layers(lambda prefix, modules=modules: bias(prefix, modules))
    return vectors


class Int4Tensors:
    """The float32 tensors that a 4-bit directory stands for, by published name; see `hub.published.Tensors`."""

    def __init__(self, directory: Path):
        metadata, self._file = _open_directory(directory)
        self.shapes = tensor_shapes(published_config(metadata))

    def read(self, name: str) -> np.ndarray:
        """Return one tensor."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return self._file.read(name)
        K, M = _matrix_shape(name, shape)
        words_CGWM = self._file.read(f"{name}.{_WORDS}")
        C, per_word = len(words_CGWM), GROUP_INPUTS // words_CGWM.shape[2]
        shifts = 32 // per_word * np.arange(per_word, dtype=np.uint32)
        codes_CGWIM = words_CGWM[..., None, :] >> shifts[:, None]
        codes_KM = (
            codes_CGWIM.reshape(C, -1, TILE_OUTPUTS)
            .transpose(1, 0, 2)
            .reshape(-1, C * TILE_OUTPUTS)[:K, :M]
            .astype(np.uint8)
        )

        def factors(part: str) -> np.ndarray:
            return self._file.read(f"{name}.{part}").transpose(1, 0, 2).reshape(-1, C * TILE_OUTPUTS)[:, :M]

        if name == EMBEDDING:
            codes_KM = codes_KM.view(np.int8)
            return dequantize(Int8Matrix(codes_KM=codes_KM, scale_GM=factors(_SCALE), group_size=GROUP_INPUTS)).T
        codes_KM &= 15
        return dequantize(
            Int4Matrix(codes_KM=codes_KM, scale_GM=factors(_SCALE), offset_GM=factors(_OFFSET), group_size=GROUP_INPUTS)
        )


def _open_directory(directory: Path) -> tuple[ModelMetadata, SafetensorsFile]:
    """Open a directory; its two files must belong together."""
    metadata, path = read_metadata(directory, formats=(FORMAT,)), directory / SINGLE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the weights of a 4-bit model")
    file = SafetensorsFile(path)
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
    """Return the fields that determine the tensors' shapes, as one line."""
    return ", ".join(f"{name} {getattr(metadata.model, name)}" for name in _SHAPE_FIELDS)


def _tensors_to_write(
    config: PublishedConfig, quantized: Iterator[tuple[str, QuantizedTensor]]
) -> Iterator[TensorToWrite]:
    """Yield the file's tensors in the order of `quantized`, from which each is taken when it is written."""

    def take(name: str) -> QuantizedTensor:
        next_name, tensor = next(quantized)
        assert next_name == name, (next_name, name)
        return tensor

    def vector(name: str) -> np.ndarray:
        tensor = take(name)
        assert isinstance(tensor, np.ndarray)
        return tensor

    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            make = functools.partial(vector, name)
            yield TensorToWrite(name=name, shape=shape, dtype=np.dtype(np.float32), make=make)
        else:
            yield from _matrix_to_write(name, shape, functools.partial(take, name))


def _matrix_to_write(name: str, shape: tuple[int, ...], take: Callable[[], QuantizedTensor]) -> Iterator[TensorToWrite]:
    """Yield the parts of a quantized matrix; it is in memory from the first part's turn to the last one's."""
    K, M = _matrix_shape(name, shape)
    C, G = -(-M // TILE_OUTPUTS), -(-K // GROUP_INPUTS)
    parts = _factors_of(name)
    in_memory: list[Int4Matrix | Int8Matrix] = []

    def words() -> np.ndarray:
        matrix = take()
        assert not isinstance(matrix, np.ndarray)
        in_memory.append(matrix)
        return pack_codes(matrix.codes_KM)

    def factors(part: str) -> np.ndarray:
        matrix = in_memory.pop() if part == parts[-1] else in_memory[0]
        return tile_factors(getattr(matrix, f"{part}_GM"))

    words_shape = (C, G, _words_per_group(name), TILE_OUTPUTS)
    yield TensorToWrite(name=f"{name}.{_WORDS}", shape=words_shape, dtype=np.dtype(np.uint32), make=words)
    for part in parts:
        make = functools.partial(factors, part)
        yield TensorToWrite(name=f"{name}.{part}", shape=(C, G, TILE_OUTPUTS), dtype=np.dtype(np.float16), make=make)


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (inputs K, outputs M): a published [K, M], or the embedding [V, D] as the readout's [D, V]."""
    rows, columns = shape
    return (columns, rows) if name == EMBEDDING else (rows, columns)


def _words_per_group(name: str) -> int:
    return GROUP_INPUTS * (EMBEDDING_BITS if name == EMBEDDING else 4) // 32


def _factors_of(name: str) -> tuple[str, ...]:
    return (_SCALE,) if name == EMBEDDING else (_SCALE, _OFFSET)


def _read_tiles(
    file: SafetensorsFile, names: Sequence[Sequence[str]], *, num_inputs: int, widths: Sequence[int]
) -> Int4Tiles | Int8Tiles:
    """Read matrices side by side, `names` by layer and `widths` their outputs, into arrays that are allocated once."""
    num_tiles, G = [-(-width // TILE_OUTPUTS) for width in widths], -(-num_inputs // GROUP_INPUTS)
    first_name = names[0][0]
    arrays = {
        _WORDS: aligned_empty((len(names), sum(num_tiles), G, _words_per_group(first_name), TILE_OUTPUTS), np.uint32)
    }
    arrays |= {
        part: aligned_empty((len(names), sum(num_tiles), G, TILE_OUTPUTS), np.float16)
        for part in _factors_of(first_name)
    }
    for layer, side_by_side in enumerate(names):
        start = 0
        for name, count in zip(side_by_side, num_tiles, strict=True):
            for part, array in arrays.items():
                target = array[layer, start : start + count]
                target[...] = _read(file, f"{name}.{part}", shape=target.shape, dtype=array.dtype)
            start += count
    num_outputs = widths[0] if len(widths) == 1 else sum(num_tiles) * TILE_OUTPUTS
    tiles = Int8Tiles if first_name == EMBEDDING else Int4Tiles
    device_arrays = {part: from_numpy_zero_copy(array) for part, array in arrays.items()}
    return tiles(**device_arrays, num_inputs=num_inputs, num_outputs=num_outputs)


def _read(file: SafetensorsFile, name: str, *, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Return a tensor of this shape and dtype."""
    if name not in file.shapes:
        raise ValueError(f"{file.path} has no tensor {name}; model.json does not belong to it")
    array = file.read(name)
    if (array.shape, array.dtype) != (shape, dtype):
        raise ValueError(
            f"tensor {name} in {file.path} is {array.dtype} {array.shape}, but model.json asks for "
            f"{np.dtype(dtype)} {shape}"
        )
    return array
