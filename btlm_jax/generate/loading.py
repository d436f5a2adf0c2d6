"""Load a model of any form for generation, as what is fastest here: in tiles on a CPU, as a tree elsewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from btlm_jax.hub.native import NativeModel, one_device_mesh
from btlm_jax.hub.published import EMBEDDING, PublishedConfig, Tensors, tensor_shapes
from btlm_jax.hub.source import load_native, open_source, published_metadata
from btlm_jax.kernels.build import GROUP_INPUTS, TILE_OUTPUTS, has_kernels
from btlm_jax.kernels.tiles import FloatTiles, float_tiles
from btlm_jax.kernels.weights import Weights, aligned_empty, from_numpy_zero_copy
from btlm_jax.quantize.int4_directory import (
    EMBEDDING_BITS,
    MATRICES,
    is_int4_directory,
    read_int4_directory,
    stacked_vectors,
    write_int4_directory,
)
from btlm_jax.quantize.quantize_model import Method, quantize_model


def load_for_generation(directory: Path, *, as_int4: bool) -> NativeModel:
    """Load a training run, a model directory, a 4-bit directory or a Hugging Face directory.

    `as_int4` rounds the weights to 4 bits on the way, by HQQ, which needs no text; a 4-bit directory may do better.

    Raises:
      FileNotFoundError, ValueError: there is no model, or it is damaged.
    """
    if is_int4_directory(directory):
        if as_int4:
            raise ValueError(f"{directory} has 4 bits already; leave out --int4")
        return _from_int4_directory(directory)
    if not as_int4 and not has_kernels():
        return load_native(directory)
    source = open_source(directory)
    metadata = published_metadata(source)
    if not as_int4:
        weights = float_weights(source.config, source.tensors, dtype=metadata.model.dtype)
        return NativeModel(metadata=metadata, params=weights, mesh=one_device_mesh(), tokenizer=source.tokenizer)
    quantized = quantize_model(
        source.config, source.tensors, method=Method.HQQ, group_size=GROUP_INPUTS, embedding_bits=EMBEDDING_BITS,
        calibration_BT=None, report=lambda name: None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        write_int4_directory(Path(scratch), metadata=metadata, quantized=quantized, tokenizer=source.tokenizer)
        return _from_int4_directory(Path(scratch))


def float_weights(config: PublishedConfig, tensors: Tensors, *, dtype: str) -> Weights:
    """Return a model's weights in tiles, its matrices in float32 or bfloat16; one tensor is read at a time."""
    shapes, layers = tensor_shapes(config), range(config.n_layer)

    def stacked(names: list[list[str]], *, transposed: bool) -> FloatTiles:
        made = None
        for layer, parts in enumerate(names):
            matrices = [tensors.read(name) for name in parts]
            pieces = [float_tiles(matrix.T if transposed else matrix, dtype=dtype) for matrix in matrices]
            if made is None:
                made = aligned_empty((len(names), sum(map(len, pieces)), *pieces[0].shape[1:]), pieces[0].dtype)
            np.concatenate(pieces, out=made[layer])
        shape = shapes[names[0][0]][:: -1 if transposed else 1]
        num_outputs = shape[1] if len(names[0]) == 1 else made.shape[1] * TILE_OUTPUTS
        return FloatTiles(data=from_numpy_zero_copy(made), num_inputs=shape[0], num_outputs=num_outputs)

    matrices = {
        ours: stacked(
            [[f"transformer.h.{layer}.{module}.weight" for module in modules] for layer in layers], transposed=False
        )
        for ours, modules in MATRICES.items()
    }
    vectors = stacked_vectors(config, lambda name: tensors.read(name).astype(np.float32))
    return Weights(
        embedding=stacked([[EMBEDDING]], transposed=True),
        vectors={name: jnp.asarray(vector) for name, vector in vectors.items()},
        **matrices,
    )


def _from_int4_directory(directory: Path) -> NativeModel:
    read = read_int4_directory(directory)
    return NativeModel(metadata=read.metadata, params=read.weights, mesh=one_device_mesh(), tokenizer=read.tokenizer)
