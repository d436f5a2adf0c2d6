"""Weights in the layout of the kernels, tiles of 32 outputs: float32, bfloat16, 8-bit or 4-bit codes; and products.

Letters: L layers, K inputs, M outputs, R rows, C tiles of TILE_OUTPUTS = 32 outputs, G groups of GROUP_INPUTS = 64
inputs. matmul.cc has the layouts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.kernels.build import GROUP_INPUTS, TILE_OUTPUTS, has_kernels

_INPUTS_PER_WORD = {"float32": 1, "bfloat16": 2}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatTiles:
    """Matrices [L, K, M] as float32 [L, C, K, 32], or as words of two bfloat16 [L, C, K/2, 32], uint32."""

    data: jax.Array
    num_inputs: int = dataclasses.field(metadata={"static": True})
    num_outputs: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Tiles:
    """Matrices [L, K, M] as codes x scale + offset, eight codes to a word."""

    words: jax.Array  # uint32 [L, C, G, 8, 32]
    scale: jax.Array  # float16 [L, C, G, 32]
    offset: jax.Array  # float16 [L, C, G, 32]
    num_inputs: int = dataclasses.field(metadata={"static": True})
    num_outputs: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Tiles:
    """Matrices [L, K, M] as codes -127..127 x scale, four codes to a word."""

    words: jax.Array  # uint32 [L, C, G, 16, 32]
    scale: jax.Array  # float16 [L, C, G, 32]
    num_inputs: int = dataclasses.field(metadata={"static": True})
    num_outputs: int = dataclasses.field(metadata={"static": True})


Tiles = FloatTiles | Int4Tiles | Int8Tiles


def float_tiles(matrix_KM: np.ndarray, *, dtype: str) -> np.ndarray:
    """Return one matrix in the layout of `FloatTiles.data`, without the layers."""
    K, M = matrix_KM.shape
    per_word = _INPUTS_PER_WORD[dtype]
    padded_KM = np.pad(matrix_KM, ((0, -K % per_word), (0, -M % TILE_OUTPUTS))).astype(jnp.dtype(dtype))
    tiles_CKM = padded_KM.reshape(len(padded_KM), -1, TILE_OUTPUTS).transpose(1, 0, 2)
    if dtype == "float32":
        return np.ascontiguousarray(tiles_CKM)
    halves = tiles_CKM.view(np.uint16).astype(np.uint32)
    return halves[:, 0::2] | halves[:, 1::2] << 16


def pack_codes(codes_KM: np.ndarray) -> np.ndarray:
    """Return codes of one matrix in the layout of `words`: of Int4Tiles (uint8, 0..15) or of Int8Tiles (int8).

    K and M are padded with zeros to whole groups and tiles.
    """
    bits = 8 if codes_KM.dtype == np.int8 else 4
    per_word = 32 // bits
    K, M = codes_KM.shape
    padded_KM = np.pad(codes_KM, ((0, -K % GROUP_INPUTS), (0, -M % TILE_OUTPUTS))).view(np.uint8).astype(np.uint32)
    codes = padded_KM.reshape(-1, GROUP_INPUTS // per_word, per_word, padded_KM.shape[1] // TILE_OUTPUTS, TILE_OUTPUTS)
    shifted = codes << (bits * np.arange(per_word, dtype=np.uint32))[None, None, :, None, None]
    return np.ascontiguousarray(np.bitwise_or.reduce(shifted, axis=2).transpose(2, 0, 1, 3))


def tile_factors(factors_GM: np.ndarray) -> np.ndarray:
    """Return scales or offsets of one matrix in the layout of the tiles, without the layers."""
    G, M = factors_GM.shape
    padded_GM = np.pad(factors_GM, ((0, 0), (0, -M % TILE_OUTPUTS))).astype(np.float16)
    return np.ascontiguousarray(padded_GM.reshape(G, -1, TILE_OUTPUTS).transpose(1, 0, 2))


def matmul(x_RK, tiles: Tiles, *, layer):
    """Return x_RK times the matrix of a layer, float32 [R, M]; `layer` is an int32 scalar."""
    padded_RK = jnp.pad(x_RK, ((0, 0), (0, _padded_inputs(tiles) - x_RK.shape[1])))
    if not has_kernels():
        matrix_KM = _matrix(tiles, layer)
        return jnp.matmul(padded_RK, matrix_KM, precision="highest")[:, : tiles.num_outputs]
    out = jax.ShapeDtypeStruct((len(x_RK), tiles.num_outputs), jnp.float32)
    return jax.ffi.ffi_call(f"btlm_matmul{_suffix(tiles)}", out)(padded_RK, *_operands(tiles, layer))


def target_scores(x_RK, tiles: Tiles, targets_R, *, scale: float):
    """Return the losses_R of targets under a softmax over `scale` times the product with the first layer's matrix.

    The losses are float32 and in nats; is_greedy_R besides says whether each target is the likeliest output, of equals
    the first. The product is never in memory as a whole. Only where `has_kernels`. With bfloat16 weights a single row
    is rounded as several are.
    """
    assert has_kernels()  # which also hands them to XLA
    padded_RK = jnp.pad(x_RK, ((0, 0), (0, _padded_inputs(tiles) - x_RK.shape[1])))
    out = [jax.ShapeDtypeStruct(targets_R.shape, dtype) for dtype in (jnp.float32, jnp.bool_)]
    call = jax.ffi.ffi_call(f"btlm_scores{_suffix(tiles)}", out)
    operands = (padded_RK, *_operands(tiles, 0), targets_R.astype(jnp.int32))
    losses_R, is_greedy_R = call(*operands, scale=np.float32(scale), num_outputs=np.int64(tiles.num_outputs))
    return losses_R, is_greedy_R


def columns(tiles: Tiles, column_R):
    """Return columns of the first layer's matrix as rows, float32 [R, K]: embeddings of tokens from a matrix [D, V]."""
    tile_R, lane_R = column_R // TILE_OUTPUTS, column_R % TILE_OUTPUTS
    if isinstance(tiles, FloatTiles):
        values_RK = _unpacked(tiles.data[0, tile_R, :, lane_R])
    else:
        values_RGK = _codes(tiles.words[0, tile_R, :, :, lane_R]) * tiles.scale[0, tile_R, :, lane_R][..., None]
        if isinstance(tiles, Int4Tiles):
            values_RGK = values_RGK + tiles.offset[0, tile_R, :, lane_R][..., None]
        values_RK = values_RGK.reshape(len(tile_R), -1)
    return values_RK[:, : tiles.num_inputs]


def _suffix(tiles: Tiles) -> str:
    """Return what the name of a kernel for these tiles ends in."""
    return {FloatTiles: "", Int4Tiles: "_int4", Int8Tiles: "_int8"}[type(tiles)]


def _operands(tiles: Tiles, layer) -> tuple:
    """Return what a kernel takes of a layer's matrix."""
    at = jnp.reshape(layer, (1,)).astype(jnp.int32)
    if isinstance(tiles, FloatTiles):
        return tiles.data, at
    return tiles.words, tiles.scale, tiles.offset if isinstance(tiles, Int4Tiles) else tiles.scale, at


def _padded_inputs(tiles: Tiles) -> int:
    if not isinstance(tiles, FloatTiles):
        return tiles.words.shape[2] * GROUP_INPUTS
    return tiles.data.shape[2] * (1 if tiles.data.dtype == jnp.float32 else 2)


def _matrix(tiles: Tiles, layer):
    """Return the matrix of a layer, float32 [padded K, padded M]."""
    at = lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)  # noqa: E731
    if isinstance(tiles, FloatTiles):
        tiles_CKM = jnp.swapaxes(_unpacked(jnp.swapaxes(at(tiles.data), 1, 2)), 1, 2)
    else:
        wide_CGKM = jnp.swapaxes(_codes(jnp.swapaxes(at(tiles.words), 2, 3)), 2, 3) * at(tiles.scale)[:, :, None]
        if isinstance(tiles, Int4Tiles):
            wide_CGKM = wide_CGKM + at(tiles.offset)[:, :, None]
        tiles_CKM = wide_CGKM.reshape(len(wide_CGKM), -1, TILE_OUTPUTS)
    return jnp.swapaxes(tiles_CKM, 0, 1).reshape(tiles_CKM.shape[1], -1)


def _unpacked(data):
    """Return float32 data of float32 or pairs of bfloat16 along the last axis."""
    if data.dtype == jnp.float32:
        return data
    pairs = jnp.stack([data << 16, data & jnp.uint32(0xFFFF0000)], axis=-1)
    return jax.lax.bitcast_convert_type(pairs, jnp.float32).reshape(*data.shape[:-1], -1)


def _codes(words):
    """Return float32 codes [..., 64] of the words [..., 8 or 16] of groups: 0..15, or -127..127."""
    per_word = GROUP_INPUTS // words.shape[-1]
    shifted = words[..., None] << (32 // per_word * jnp.arange(per_word - 1, -1, -1, dtype=jnp.uint32))
    if per_word == 8:
        codes = shifted >> 28
    else:
        codes = jax.lax.bitcast_convert_type(shifted, jnp.int32) >> 24
    return codes.astype(jnp.float32).reshape(*words.shape[:-1], GROUP_INPUTS)
