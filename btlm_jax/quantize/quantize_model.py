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
from btlm_jax.quantize.grouped import Int4Matrix, Int8Matrix, dequantize, round_to_nearest, round_to_nearest_int8
from btlm_jax.quantize.hqq import half_quadratic

_EMBEDDING_COLUMNS = 4096  # quantized at a time

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
                quantized[name] = function(array, group_size)
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
    columns = (w_DV[:, start : start + _EMBEDDING_COLUMNS] for start in starts)
    if bits == 8:
        parts = [round_to_nearest_int8(part_DV, group_size) for part_DV in columns]
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
