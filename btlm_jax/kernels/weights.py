"""A whole model's weights as the kernels read them, and NumPy memory that JAX takes over without a copy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from btlm_jax.kernels.tiles import Tiles

_ALIGNMENT = 64  # of memory that JAX takes over without a copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's parameters: matrices in tiles, and vectors, float32, by name; the layers' are stacked."""

    embedding: Tiles  # [1, D, V]: the readout; a token's embedding is a column
    qkv: Tiles  # [L, D, 3 N H]
    out: Tiles  # [L, N H, D]
    up_gate: Tiles  # [L, D, 2 F'], F' being F filled up to whole tiles
    down: Tiles  # [L, F, D]
    vectors: dict[str, jax.Array]  # of blocks [L, width]: ln_1, qkv, out, ln_2, up_gate, down; and ln_f [width]


def num_bytes(weights: Weights) -> int:
    """Return the size of all weights in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return an uninitialised array that JAX can take over without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def taken_over(array: np.ndarray) -> jax.Array:
    """Return the array as JAX's, without a copy where that can be; the caller must not write to it any more."""
    return jax.device_put(array, jax.devices()[0], may_alias=True)
