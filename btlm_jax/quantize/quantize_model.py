"""Quantize a whole model from its published tensors; one block is in memory at a time."""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np

from btlm_jax.hub import numpy_network
from btlm_jax.hub.published import EMBEDDING, FINAL_NORM, PublishedConfig, Tensors, block_prefix, block_shapes
from btlm_jax.quantize.awq import BlockTensors, scaled_block
from btlm_jax.quantize.gptq import gptq
from btlm_jax.quantize.grouped import (
    MAX_CODE,
    MAX_CODE_8,
    Int4Matrix,
    Int8Matrix,
    dequantize,
    round_to_nearest,
    round_to_nearest_int8,
)
from btlm_jax.quantize.hqq import half_quadratic

_EMBEDDING_COLUMNS = 4096  # quantized at a time
# The largest rms error of a group's weights, relative to the distance of its smallest and largest weight. Rounding
# gives 1 / (15 sqrt(12)) = 0.019 on average, and at most 0.022 in 320 groups of 64 normal weights. GPTQ also moves
# weights to make up for the errors of others: at most 0.04 on inputs of full or low rank, 0.07 with fewer tokens than
# inputs (2026-11-29). A scale wrong by a quarter gives 0.14, since a group's offset is its smallest weight.
_LARGEST_ERROR, _LARGEST_ERROR_GPTQ = 0.04, 0.12

QuantizedTensor = np.ndarray | Int4Matrix | Int8Matrix


class Method(enum.StrEnum):
    """How matrices are quantized."""

    RTN = "rtn"
    HQQ = "hqq"
    GPTQ = "gptq"
    AWQ = "awq"
    AWQ_GPTQ = "awq+gptq"  # AWQ's scales, then GPTQ

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs calibration: token ids of text like the text that the model is for."""
        return self not in (Method.RTN, Method.HQQ)

    @property
    def is_scaled(self) -> bool:
        """Whether AWQ's scales are folded into the weights first."""
        return self in (Method.AWQ, Method.AWQ_GPTQ)


def quantize_model(
    config: PublishedConfig,
    tensors: Tensors,
    *,
    method: Method,
    group_size: int,
    embedding_bits: int,
    calibration_BT: np.ndarray | None,
    report: Callable[[str], None],
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield (published name, tensor) in the order of the network: quantized matrices, and float32 vectors.

    Matrices stay [in, out]. The embedding [V, D] is yielded as the readout's w_DV, grouped along D. The calibration
    activations are those of the layers quantized so far (GPTQ's section 4). `report` gets every tensor's name once.

    Raises:
      ValueError: a tensor, which it names, is not finite or too large; calibration ids are missing; or embedding_bits
        is neither 4 nor 8.
    """
    if method.is_calibrated and (calibration_BT is None or calibration_BT.size == 0):
        raise ValueError(f"method={method} needs calibration token ids; give some, or use {Method.RTN} or {Method.HQQ}")
    if embedding_bits not in (4, 8):
        raise ValueError(f"embedding_bits={embedding_bits} is not known; allowed are 4 and 8")
    report(EMBEDDING)
    table_DV = _read(tensors, EMBEDDING).T
    with _naming(EMBEDDING):
        table = _quantize_embedding(table_DV, group_size, embedding_bits)
    del table_DV
    yield EMBEDDING, table
    x_BTD = None
    if calibration_BT is not None and method.is_calibrated:
        x_BTD = numpy_network.embed(config, dequantize(table).T, calibration_BT)
    del table
    for layer in range(config.n_layer):
        prefix = block_prefix(layer)
        block = {name: _read(tensors, prefix + name) for name in block_shapes(config)}
        quantizing = functools.partial(_reporting_and_naming, prefix=prefix, report=report)
        if x_BTD is None:
            quantized = _quantize_block(block, method=method, group_size=group_size, quantizing=quantizing)
        else:
            quantized, x_BTD = _quantize_calibrated_block(
                config, block, x_BTD, method=method, group_size=group_size, quantizing=quantizing
            )
        for name, tensor in quantized.items():
            if isinstance(tensor, np.ndarray):
                report(prefix + name)
            yield prefix + name, tensor
    for name in (f"{FINAL_NORM}.weight", f"{FINAL_NORM}.bias"):
        report(name)
        yield name, _read(tensors, name)


def dequantize_tensor(name: str, tensor: QuantizedTensor) -> np.ndarray:
    """Return the float32 tensor in the published layout that a tensor of `quantize_model` represents."""
    if isinstance(tensor, np.ndarray):
        return tensor
    return dequantize(tensor).T if name == EMBEDDING else dequantize(tensor)


# name in the block -> context in which its matrix is quantized
Quantizing = Callable[[str], AbstractContextManager[None]]


def _quantize_block(
    block: BlockTensors, *, method: Method, group_size: int, quantizing: Quantizing
) -> dict[str, QuantizedTensor]:
    function = {Method.RTN: round_to_nearest, Method.HQQ: half_quadratic}[method]
    quantized: dict[str, QuantizedTensor] = {}
    for name, array in block.items():
        if array.ndim == 2:
            with quantizing(name):
                quantized[name] = matrix = function(array, group_size)
                check_groups(array, matrix, largest_error=_LARGEST_ERROR)
        else:
            quantized[name] = array
    return quantized


def _quantize_calibrated_block(
    config: PublishedConfig,
    block: BlockTensors,
    x_BTD: np.ndarray,
    *,
    method: Method,
    group_size: int,
    quantizing: Quantizing,
) -> tuple[dict[str, QuantizedTensor], np.ndarray]:
    """Return the quantized block and its output on the block's calibration input."""
    if method.is_scaled:
        block = scaled_block(block, _layer_inputs(config, block, x_BTD), group_size)
    quantized: dict[str, QuantizedTensor] = dict(block)

    def linear(x_BTK: np.ndarray, name: str) -> np.ndarray:
        w_KM = block[f"{name}.weight"]
        with quantizing(f"{name}.weight"):
            if method == Method.AWQ:
                matrix = round_to_nearest(w_KM, group_size)
            else:
                x_RK = x_BTK.reshape(-1, x_BTK.shape[-1])
                matrix = gptq(w_KM, group_size, hessian_KK=x_RK.T @ x_RK)
            is_gptq = method != Method.AWQ
            check_groups(w_KM, matrix, largest_error=_LARGEST_ERROR_GPTQ if is_gptq else _LARGEST_ERROR)
        quantized[f"{name}.weight"] = matrix
        return x_BTK @ dequantize(matrix) + block[f"{name}.bias"]

    x_BTD = numpy_network.block(config, x_BTD, norm=_norm_of(config, block), linear=linear)
    return quantized, x_BTD


def _layer_inputs(config: PublishedConfig, block: BlockTensors, x_BTD: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs x_RK of each matrix of the float block."""
    inputs = {}

    def linear(x_BTK: np.ndarray, name: str) -> np.ndarray:
        inputs[name] = x_BTK.reshape(-1, x_BTK.shape[-1])
        return x_BTK @ block[f"{name}.weight"] + block[f"{name}.bias"]

    numpy_network.block(config, x_BTD, norm=_norm_of(config, block), linear=linear)
    return inputs


def _norm_of(config: PublishedConfig, block: BlockTensors) -> numpy_network.Layer:
    return lambda x_BTD, name: numpy_network.layer_norm(config, x_BTD, block[f"{name}.weight"], block[f"{name}.bias"])


def _quantize_embedding(w_DV: np.ndarray, group_size: int, bits: int) -> Int4Matrix | Int8Matrix:
    """Quantize some columns at a time, which are independent: of all at once, the float32 temporaries are large."""
    starts = range(0, w_DV.shape[1], _EMBEDDING_COLUMNS)
    columns = [w_DV[:, start : start + _EMBEDDING_COLUMNS] for start in starts]
    if bits == 8:
        parts = [round_to_nearest_int8(part_DV, group_size) for part_DV in columns]
        for part_DV, part in zip(columns, parts, strict=True):
            check_groups(part_DV, part, largest_error=_LARGEST_ERROR)
        return Int8Matrix(
            codes_KM=np.concatenate([part.codes_KM for part in parts], axis=1),
            scale_GM=np.concatenate([part.scale_GM for part in parts], axis=1),
            group_size=group_size,
        )
    parts = [half_quadratic(part_DV, group_size) for part_DV in columns]
    return Int4Matrix(
        codes_KM=np.concatenate([part.codes_KM for part in parts], axis=1),
        scale_GM=np.concatenate([part.scale_GM for part in parts], axis=1),
        offset_GM=np.concatenate([part.offset_GM for part in parts], axis=1),
        group_size=group_size,
    )


def check_groups(w_KM: np.ndarray, matrix: Int4Matrix | Int8Matrix, *, largest_error: float) -> None:
    """Check that every group of a quantized matrix is near its weights.

    Raises:
      ValueError: the rms error of a group is above `largest_error` of the distance of its smallest and largest weight.
    """
    starts_G = np.arange(0, len(w_KM), matrix.group_size)
    sizes_G1 = np.diff(np.append(starts_G, len(w_KM)))[:, None]
    errors_KM = dequantize(matrix)
    errors_KM -= w_KM
    error_GM = np.sqrt(np.add.reduceat(np.square(errors_KM), starts_G, axis=0) / sizes_G1)
    high_GM, low_GM = (function.reduceat(w_KM, starts_G, axis=0) for function in (np.maximum, np.minimum))
    # A group may have one weight, or equal ones: then only float16's rounding is left. Of very small weights scale and
    # offset are subnormal: both are rounded by up to 2^-25, and the scale's error is multiplied by the code.
    spread_GM = np.maximum(high_GM - low_GM, (high_GM - low_GM).mean(0))
    rounding = 2.0**-25 * (1 + (MAX_CODE_8 if isinstance(matrix, Int8Matrix) else MAX_CODE))
    allowed_GM = largest_error * spread_GM + 2.0**-10 * np.maximum(np.abs(high_GM), np.abs(low_GM)) + rounding
    wrong_GM = ~(error_GM <= allowed_GM)  # including NaN
    if wrong_GM.any():
        group, column = (int(index[0]) for index in np.nonzero(wrong_GM))
        error, allowed = error_GM[group, column], allowed_GM[group, column]
        raise ValueError(
            f"the codes of {int(wrong_GM.sum()):,} groups are not near its weights; the first is group {group} of "
            f"column {column}, off by {error:.3g} (rms) where {allowed:.3g} is allowed"
        )


def _read(tensors: Tensors, name: str) -> np.ndarray:
    array = tensors.read(name).astype(np.float32)
    num_bad = int((~np.isfinite(array)).sum())
    if num_bad:
        raise ValueError(f"tensor {name} holds {num_bad:,} values that are not finite; the model cannot be quantized")
    return array


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the tensor in a ValueError of this block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"tensor {name} cannot be quantized: {error}") from error


@contextlib.contextmanager
def _reporting_and_naming(name: str, *, prefix: str, report: Callable[[str], None]) -> Iterator[None]:
    """Report the tensor, and name it in a ValueError of this block."""
    report(prefix + name)
    with _naming(prefix + name):
        yield
