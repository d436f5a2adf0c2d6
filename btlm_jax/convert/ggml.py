"""GGML's tensor types: which of them each tensor of a file type gets, and tensors encoded in them.

Blocks of 32 values are encoded by the gguf package, with the same bits as llama.cpp; blocks of 256 (K-quants) by
llama.cpp's own ggml_quantize_chunk, from whichever installed package contains it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from btlm_jax.hub.gguf import import_gguf

_ROWS = 1024  # encoded at a time, which bounds the float32 copies
_LARGEST_F16 = 65504.0  # also the limit of block types, whose scales are float16
_LARGEST = {"F32": 3.4028235e38, "BF16": 3.3895314e38}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileType:
    """GGML's type names for the tensors of a file."""

    code: str  # name in gguf.LlamaFileType
    matrices: str
    output: str  # output.weight
    qkv: str  # attn_qkv.weight
    ffn_down_more: str  # ffn_down.weight in the layers of `_gets_more_bits`


# llama.cpp's choices (llama-quant.cpp, llama_tensor_get_type_impl), except the output of Q4_0: llama.cpp takes Q6_K; it
# is Q8_0 here, so that the file does not depend on whether a library for K-quants is installed.
FILE_TYPES = {
    "F32": FileType(code="ALL_F32", matrices="F32", output="F32", qkv="F32", ffn_down_more="F32"),
    "F16": FileType(code="MOSTLY_F16", matrices="F16", output="F16", qkv="F16", ffn_down_more="F16"),
    "BF16": FileType(code="MOSTLY_BF16", matrices="BF16", output="BF16", qkv="BF16", ffn_down_more="BF16"),
    "Q8_0": FileType(code="MOSTLY_Q8_0", matrices="Q8_0", output="Q8_0", qkv="Q8_0", ffn_down_more="Q8_0"),
    "Q4_0": FileType(code="MOSTLY_Q4_0", matrices="Q4_0", output="Q8_0", qkv="Q4_0", ffn_down_more="Q4_0"),
    "Q4_K_M": FileType(code="MOSTLY_Q4_K_M", matrices="Q4_K", output="Q6_K", qkv="Q5_K", ffn_down_more="Q6_K"),
    "Q5_K_M": FileType(code="MOSTLY_Q5_K_M", matrices="Q5_K", output="Q6_K", qkv="Q6_K", ffn_down_more="Q6_K"),
    "Q6_K": FileType(code="MOSTLY_Q6_K", matrices="Q6_K", output="Q6_K", qkv="Q6_K", ffn_down_more="Q6_K"),
}


def tensor_type(name: str, shape: tuple[int, ...], *, file_type: str, num_layers: int) -> str:
    """Return the GGML type of a tensor by its GGUF name; vectors are always F32."""
    types = FILE_TYPES[file_type]
    if len(shape) == 1:
        return "F32"
    if name == "output.weight":
        return types.output
    if name.endswith(".attn_qkv.weight"):
        return types.qkv
    if name.endswith(".ffn_down.weight") and _gets_more_bits(int(name.split(".")[1]), num_layers):
        return types.ffn_down_more
    return types.matrices


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """Whether llama.cpp gives this layer more bits: the first and last eighth, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def num_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Return the size of a tensor in a file.

    Raises:
      ValueError: the type's block size does not divide the row length.
    """
    gguf = import_gguf()
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    if shape[-1] % block_size:
        raise ValueError(
            f"{type_name} stores blocks of {block_size} values, which do not divide rows of {shape[-1]}; "
            f"use {'F16 or BF16' if block_size == 32 else 'Q8_0 or Q4_0 (blocks of 32), or F16'}"
        )
    return int(np.prod(shape)) // block_size * block_bytes


def encode(matrix: np.ndarray, type_name: str, *, scale: float) -> np.ndarray:
    """Encode the rows of a matrix, or a vector as one row, times `scale`; return uint8 [rows, bytes].

    Raises:
      ValueError: a value is not finite or too large for the type, or the type needs a library that is not installed.
    """
    rows_RC = matrix[None] if matrix.ndim == 1 else matrix
    largest = _LARGEST.get(type_name, _LARGEST_F16)
    encode_rows = row_encoder(type_name)
    encoded = np.empty((len(rows_RC), num_bytes(rows_RC.shape[1:], type_name)), np.uint8)

    def fill(start: int) -> None:
        piece_RC = np.ascontiguousarray(rows_RC[start : start + _ROWS], np.float32)
        if scale != 1:
            piece_RC = piece_RC * np.float32(scale)
        highest = float(np.abs(piece_RC).max(initial=0))
        if not highest <= largest:
            wider = {"F32": "", "BF16": "; use F32"}.get(type_name, "; use BF16 or F32")
            raise ValueError(f"values up to {highest:.3g} are too large for {type_name}{wider}")
        encoded[start : start + _ROWS] = encode_rows(piece_RC)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # both encoders release the GIL
        for _ in pool.map(fill, range(0, len(rows_RC), _ROWS)):
            pass
    return encoded


def row_encoder(type_name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that encodes contiguous float32 rows_RC as uint8 [rows, bytes].

    Raises:
      ValueError: the type needs a library that is not installed.
    """
    gguf = import_gguf()
    type_code = gguf.GGMLQuantizationType[type_name]
    if not type_name.endswith("_K"):
        return lambda rows_RC: gguf.quants.quantize(rows_RC, type_code).view(np.uint8)
    quantize_chunk = _llama_cpp_quantizer()

    def encode_rows(rows_RC: np.ndarray) -> np.ndarray:
        encoded = np.empty((len(rows_RC), num_bytes(rows_RC.shape[1:], type_name)), np.uint8)
        written = quantize_chunk(
            int(type_code), rows_RC.ctypes.data, encoded.ctypes.data, 0, *rows_RC.shape, None
        )  # fmt: skip
        assert written == encoded.nbytes
        return encoded

    return encode_rows


@functools.cache
def _llama_cpp_quantizer() -> Callable[..., int]:
    """Return ggml_quantize_chunk(type, rows, blocks, first value, number of rows, row length, importance)."""
    failed = []
    for package, pattern in (("llama_cpp", "lib/libggml-base.*"), ("xllamacpp", "xllamacpp*.so")):
        spec = importlib.util.find_spec(package)
        for path in sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else ():
            try:
                function = ctypes.CDLL(str(path)).ggml_quantize_chunk
            except (OSError, AttributeError) as error:  # of another system, or of a version that hides it
                failed.append(f"; {path} cannot be used: {error}")
                continue
            function.restype = ctypes.c_size_t
            function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
            return function
    raise ValueError(
        "K-quants are made by llama.cpp's own code, and neither package that carries it is installed: pip install "
        "xllamacpp (or llama-cpp-python); or write BF16 here and run llama-quantize on it; Q8_0 and Q4_0 need neither"
        + "".join(failed)
    )
