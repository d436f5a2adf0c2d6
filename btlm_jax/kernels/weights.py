"""A whole model's weights in the layout of the kernels, and NumPy memory that JAX uses without a copy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from btlm_jax.kernels.tiles import Tiles

_ALIGNMENT = 64  # bytes; JAX copies arrays that are not aligned so


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's parameters: matrices in tiles, and float32 vectors by name; those of the layers are stacked."""

    embedding: Tiles  # [1, D, V]: the readout; a token's embedding is a column
    qkv: Tiles  # [L, D, 3 N H]
    out: Tiles  # [L, N H, D]
    up_gate: Tiles  # [L, D, 2 F'], F' being F padded to whole tiles
    down: Tiles  # [L, F, D]
    vectors: dict[str, jax.Array]  # of blocks [L, width]: ln_1, qkv, out, ln_2, up_gate, down; and ln_f [width]


def num_bytes(weights: Weights) -> int:
    """Return the size of all weights in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return an uninitialised array that `from_numpy_zero_copy` does not copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def from_numpy_zero_copy(array: np.ndarray) -> jax.Array:
    """Return the array as one of JAX, without a copy where it is aligned; the caller must not write to it any more."""
    return jax.device_put(array, jax.devices()[0], may_alias=True)
