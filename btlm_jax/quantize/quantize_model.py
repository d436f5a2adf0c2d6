"""Round a whole model, block by block from its published tensors; one block is in memory at a time."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator

import numpy as np

from btlm_jax.hub import numpy_network as forward
from btlm_jax.hub.published import EMBEDDING, FINAL_NORM, PublishedConfig, Tensors, block_prefix, block_shapes
from btlm_jax.quantize.awq import BlockTensors, scaled_block
from btlm_jax.quantize.gptq import gptq
from btlm_jax.quantize.grouped import Int4Matrix, Int8Matrix, dequantize, round_to_nearest, round_to_nearest_int8
from btlm_jax.quantize.hqq import half_quadratic

_EMBEDDING_COLUMNS = 4096  # of the embedding, rounded at a time

QuantizedTensor = np.ndarray | Int4Matrix | Int8Matrix


class Method(enum.StrEnum):
    """How a matrix is rounded."""

    RTN = "rtn"
    HQQ = "hqq"
    GPTQ = "gptq"
    AWQ = "awq"
    AWQ_GPTQ = "awq+gptq"  # AWQ's scales, then GPTQ

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs token ids of the kind of text that the model is for."""
        return self not in (Method.RTN, Method.HQQ)

    @property
    def is_scaled(self) -> bool:
        """Whether AWQ's scales are folded in first."""
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
    """Yield every published tensor by name in the order of the network: matrices rounded, the rest float32.

    A rounded matrix [in, out] keeps its orientation. The embedding [V, D] comes as w_DV, grouped along D as the
    readout's matrix. Calibration activations run through what is rounded already (GPTQ's section 4).
    `report` is called once with each tensor's name.

    Raises:
      ValueError: a tensor is not finite or too large; names it. Or the method lacks its calibration ids, or
        embedding_bits is neither 4 nor 8.
    """
    if method.is_calibrated and (calibration_BT is None or calibration_BT.size == 0):
        raise ValueError(f"method={method} needs calibration token ids; give some, or use {Method.RTN} or {Method.HQQ}")
    if embedding_bits not in (4, 8):
        raise ValueError(f"embedding_bits={embedding_bits} is not known; allowed are 4 and 8")
    report(EMBEDDING)
    table = _named(EMBEDDING, _round_table, _read(tensors, EMBEDDING).T, group_size, embedding_bits)
    yield EMBEDDING, table
    x_BTD = None
    if method.is_calibrated:
        x_BTD = forward.embed(config, dequantize(table).T, calibration_BT)
    del table
    for layer in range(config.n_layer):
        prefix = block_prefix(layer)
        block = {name: _read(tensors, prefix + name) for name in block_shapes(config)}

        def announced(name: str, round_matrix: Callable, *arguments, prefix=prefix, **options) -> Int4Matrix:
            report(prefix + name)
            return _named(prefix + name, round_matrix, *arguments, **options)

        if method.is_calibrated:
            block, x_BTD = _round_on(config, block, x_BTD, method=method, group_size=group_size, announced=announced)
        else:
            block = _round_alone(block, method=method, group_size=group_size, announced=announced)
        for name, rounded in block.items():
            if isinstance(rounded, np.ndarray):
                report(prefix + name)
            yield prefix + name, rounded
    for name in (f"{FINAL_NORM}.weight", f"{FINAL_NORM}.bias"):
        report(name)
        yield name, _read(tensors, name)


def dequantize_tensor(name: str, rounded: QuantizedTensor) -> np.ndarray:
    """Return the float32 tensor in the published layout that a rounded one stands for."""
    if isinstance(rounded, np.ndarray):
        return rounded
    return dequantize(rounded).T if name == EMBEDDING else dequantize(rounded)


def _round_alone(
    block: BlockTensors, *, method: Method, group_size: int, announced: Callable
) -> dict[str, QuantizedTensor]:
    round_matrix = {Method.RTN: round_to_nearest, Method.HQQ: half_quadratic}[method]
    return {
        name: announced(name, round_matrix, array, group_size) if array.ndim == 2 else array
        for name, array in block.items()
    }


def _round_on(
    config: PublishedConfig,
    block: BlockTensors,
    x_BTD: np.ndarray,
    *,
    method: Method,
    group_size: int,
    announced: Callable,
) -> tuple[dict[str, QuantizedTensor], np.ndarray]:
    """Return the rounded block and its output on the block's calibration input."""
    if method.is_scaled:
        block = scaled_block(block, _layer_inputs(config, block, x_BTD), group_size)
    rounded = dict(block)

    def linear(x_BTK: np.ndarray, name: str) -> np.ndarray:
        weight, w_KM = f"{name}.weight", block[f"{name}.weight"]
        if method == Method.AWQ:
            rounded[weight] = announced(weight, round_to_nearest, w_KM, group_size)
        else:
            x_RK = x_BTK.reshape(-1, x_BTK.shape[-1])
            rounded[weight] = announced(weight, gptq, w_KM, group_size, hessian_KK=x_RK.T @ x_RK)
        return x_BTK @ dequantize(rounded[weight]) + block[f"{name}.bias"]

    x_BTD = forward.block(config, x_BTD, norm=_norm_of(config, block), linear=linear)
    return rounded, x_BTD


def _layer_inputs(config: PublishedConfig, block: BlockTensors, x_BTD: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs x_RK of each matrix of the float block."""
    inputs = {}

    def linear(x_BTK: np.ndarray, name: str) -> np.ndarray:
        inputs[name] = x_BTK.reshape(-1, x_BTK.shape[-1])
        return x_BTK @ block[f"{name}.weight"] + block[f"{name}.bias"]

    forward.block(config, x_BTD, norm=_norm_of(config, block), linear=linear)
    return inputs


def _norm_of(config: PublishedConfig, block: BlockTensors) -> forward.Layer:
    return lambda x_BTD, name: forward.layer_norm(config, x_BTD, block[f"{name}.weight"], block[f"{name}.bias"])


def _round_table(w_DV: np.ndarray, group_size: int, bits: int) -> Int4Matrix | Int8Matrix:
    """Round the embedding, some columns at a time: they are independent, and the whole has float32 temporaries."""
    round_columns = half_quadratic if bits == 4 else round_to_nearest_int8
    columns = [
        round_columns(w_DV[:, start : start + _EMBEDDING_COLUMNS], group_size)
        for start in range(0, w_DV.shape[1], _EMBEDDING_COLUMNS)
    ]

    def joined(field: str) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part in columns], axis=1)

    if bits == 8:
        return Int8Matrix(codes_KM=joined("codes_KM"), scale_GM=joined("scale_GM"), group_size=group_size)
    return Int4Matrix(
        codes_KM=joined("codes_KM"),
        scale_GM=joined("scale_GM"),
        offset_GM=joined("offset_GM"),
        group_size=group_size,
    )


def _read(tensors: Tensors, name: str) -> np.ndarray:
    array = tensors.read(name).astype(np.float32)
    num_bad = int((~np.isfinite(array)).sum())
    if num_bad:
        raise ValueError(f"tensor {name} holds {num_bad:,} values that are not finite; the model cannot be quantized")
    return array


def _named(name: str, round_matrix: Callable, *arguments, **options) -> Int4Matrix | Int8Matrix:
    """Round, and say in an error which tensor it was."""
    try:
        return round_matrix(*arguments, **options)
    except ValueError as error:
        raise ValueError(f"tensor {name} cannot be quantized: {error}") from error
