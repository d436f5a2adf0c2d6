"""Group-wise quantized matrices: 4- or 8-bit codes, and a float16 scale for every group of inputs of every output.

Outputs are x_K @ w_KM, so a group is `group_size` consecutive rows of one column. The last group is shorter if
group_size does not divide K (BTLM's n_inner of 6,826). G counts groups.
"""

from __future__ import annotations

import dataclasses

import numpy as np

MAX_CODE = 15  # 4 bits: codes are 0..15
MAX_CODE_8 = 127  # 8 bits: codes are -127..127


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Int4Matrix:
    """A matrix in 4 bits: w_km ~= codes_km * scale_gm + offset_gm, g = k // group_size."""

    codes_KM: np.ndarray  # uint8, 0..15, one per byte
    scale_GM: np.ndarray  # float16
    offset_GM: np.ndarray  # float16
    group_size: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Int8Matrix:
    """A matrix in 8 bits: w_km ~= codes_km * scale_gm, g = k // group_size."""

    codes_KM: np.ndarray  # int8, -127..127
    scale_GM: np.ndarray  # float16
    group_size: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The 16 values that a group's weights can take: 0..15 * scale + offset."""

    scale_GM: np.ndarray  # float16
    offset_GM: np.ndarray  # float16


def dequantize(matrix: Int4Matrix | Int8Matrix) -> np.ndarray:
    """Return the float32 w_KM that the codes represent."""
    scale_KM = expand_groups(matrix.scale_GM, len(matrix.codes_KM), matrix.group_size)
    w_KM = matrix.codes_KM.astype(np.float32) * scale_KM
    if isinstance(matrix, Int8Matrix):
        return w_KM
    return w_KM + expand_groups(matrix.offset_GM, len(w_KM), matrix.group_size)


def round_to_nearest(w_KM: np.ndarray, group_size: int) -> Int4Matrix:
    """Round each weight to the nearest of 16 values, evenly spaced from the group's smallest weight to its largest.

    Raises:
      ValueError: a weight is not finite or too large for float16, or the group size is below 1.
    """
    grid = min_max_grid(w_KM, group_size)
    return Int4Matrix(
        codes_KM=nearest_codes(w_KM, grid, group_size),
        scale_GM=grid.scale_GM,
        offset_GM=grid.offset_GM,
        group_size=group_size,
    )


def round_to_nearest_int8(w_KM: np.ndarray, group_size: int) -> Int8Matrix:
    """Round each weight to the nearest of 255 values, evenly spaced and symmetric up to the group's largest magnitude.

    Raises:
      ValueError: as `round_to_nearest`.
    """
    check_weights(w_KM, group_size)
    largest_GM = np.maximum.reduceat(np.abs(w_KM), _group_starts(w_KM, group_size), axis=0)
    scale_GM = to_float16(largest_GM / MAX_CODE_8)
    steps_KM = _divide_where_positive(w_KM, expand_groups(scale_GM, len(w_KM), group_size))
    codes_KM = np.clip(np.rint(steps_KM), -MAX_CODE_8, MAX_CODE_8).astype(np.int8)
    return Int8Matrix(codes_KM=codes_KM, scale_GM=scale_GM, group_size=group_size)


def min_max_grid(w_KM: np.ndarray, group_size: int) -> Grid:
    """Return the grid from each group's smallest weight to its largest, in the float16 that it is stored in.

    Raises:
      ValueError: as `round_to_nearest`.
    """
    check_weights(w_KM, group_size)
    starts_G = _group_starts(w_KM, group_size)
    low_GM = np.minimum.reduceat(w_KM, starts_G, axis=0).astype(np.float32)
    high_GM = np.maximum.reduceat(w_KM, starts_G, axis=0).astype(np.float32)
    return Grid(scale_GM=to_float16((high_GM - low_GM) / MAX_CODE), offset_GM=to_float16(low_GM))


def nearest_codes(w_KM: np.ndarray, grid: Grid, group_size: int) -> np.ndarray:
    """Return the uint8 code of the grid value nearest to each weight; 0 where the grid has only one value."""
    above_KM = w_KM - expand_groups(grid.offset_GM, len(w_KM), group_size)
    steps_KM = _divide_where_positive(above_KM, expand_groups(grid.scale_GM, len(w_KM), group_size))
    return np.clip(np.rint(steps_KM), 0, MAX_CODE).astype(np.uint8)


def expand_groups(x_GM: np.ndarray, num_inputs: int, group_size: int) -> np.ndarray:
    """Return float32 x_KM, in which each row has the value of its group."""
    return np.repeat(x_GM.astype(np.float32), group_size, axis=0)[:num_inputs]


def to_float16(x_GM: np.ndarray) -> np.ndarray:
    """Round to float16.

    Raises:
      ValueError: a value is too large.
    """
    largest = float(np.abs(x_GM).max(initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise ValueError(f"a weight of {largest:.3g} is too large for the float16 of its group's scale")
    return x_GM.astype(np.float16)


def check_weights(w_KM: np.ndarray, group_size: int) -> None:
    """Check that a matrix can be quantized.

    Raises:
      ValueError: a weight is not finite, or the group size is below 1.
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1")
    num_bad = int((~np.isfinite(w_KM)).sum())
    if num_bad:
        raise ValueError(f"{num_bad:,} of its weights are not finite")


def _divide_where_positive(above_KM: np.ndarray, scale_KM: np.ndarray) -> np.ndarray:
    return np.divide(above_KM, scale_KM, out=np.zeros_like(scale_KM), where=scale_KM > 0)


def _group_starts(w_KM: np.ndarray, group_size: int) -> np.ndarray:
    return np.arange(0, len(w_KM), group_size)
