"""Load a model of any form for generation, with its weights in the layout that is fastest on this machine."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from btlm_jax import notices
from btlm_jax.hub.native import ModelMetadata, one_device_mesh
from btlm_jax.hub.published import EMBEDDING, PublishedConfig, Tensors, block_prefix, tensor_shapes
from btlm_jax.hub.source import UnpublishedError, load_native, open_source, published_metadata
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
from btlm_jax.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationModel:
    """A model as `decode` takes it."""

    metadata: ModelMetadata
    params: dict | Weights  # Weights are in the tiles of the CPU kernels
    mesh: Mesh
    tokenizer: Tokenizer | None


def load_for_generation(directory: Path, *, as_int4: bool) -> GenerationModel:
    """Load a training run, a model directory, a 4-bit directory or a Hugging Face directory.

    `as_int4` first quantizes the weights to 4 bits by HQQ, which needs no text to calibrate on; the methods that
    `btlm convert` offers lose less.

    Raises:
      FileNotFoundError, ValueError: there is no model, or it is damaged.
    """
    if is_int4_directory(directory):
        if as_int4:
            raise ValueError(f"{directory} has 4 bits already; leave out --int4")
        return _read_int4(directory)
    source = None
    if as_int4 or has_kernels():
        try:
            source = open_source(directory)
        except UnpublishedError as error:
            if as_int4:
                raise
            notices.report("without-kernels", f"{directory} decodes without the CPU kernels, slower: {error}")
    if source is None:
        native = load_native(directory)
        return GenerationModel(
            metadata=native.metadata, params=native.params, mesh=native.mesh, tokenizer=native.tokenizer
        )
    metadata = published_metadata(source)
    if not as_int4:
        weights = float_weights(source.config, source.tensors, dtype=metadata.model.dtype)
        return GenerationModel(metadata=metadata, params=weights, mesh=one_device_mesh(), tokenizer=source.tokenizer)
    quantized = quantize_model(
        source.config, source.tensors, method=Method.HQQ, group_size=GROUP_INPUTS, embedding_bits=EMBEDDING_BITS,
        calibration_BT=None, report=lambda name: None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        write_int4_directory(Path(scratch), metadata=metadata, quantized=quantized, tokenizer=source.tokenizer)
        return _read_int4(Path(scratch))


def float_weights(config: PublishedConfig, tensors: Tensors, *, dtype: str) -> Weights:
    """Return a model's weights in tiles, its matrices in float32 or bfloat16; those of one layer are read at a time."""
    shapes = tensor_shapes(config)

    def stacked_tiles(names: Sequence[Sequence[str]], *, transposed: bool) -> FloatTiles:
        """Return the matrices `names[layer]` side by side, of all layers, in an array that is allocated once."""
        stacked = None
        for layer, side_by_side in enumerate(names):
            matrices = [tensors.read(name) for name in side_by_side]
            tiles = [float_tiles(matrix.T if transposed else matrix, dtype=dtype) for matrix in matrices]
            if stacked is None:
                shape = (len(names), sum(map(len, tiles)), *tiles[0].shape[1:])
                stacked = aligned_empty(shape, tiles[0].dtype)
            np.concatenate(tiles, out=stacked[layer])
        assert stacked is not None
        num_inputs, num_columns = shapes[names[0][0]][:: -1 if transposed else 1]
        num_outputs = num_columns if len(names[0]) == 1 else stacked.shape[1] * TILE_OUTPUTS
        return FloatTiles(data=from_numpy_zero_copy(stacked), num_inputs=num_inputs, num_outputs=num_outputs)

    matrices = {}
    for field, modules in MATRICES.items():
        names = [[f"{block_prefix(layer)}{module}.weight" for module in modules] for layer in range(config.n_layer)]
        matrices[field] = stacked_tiles(names, transposed=False)
    vectors = stacked_vectors(config, lambda name: tensors.read(name).astype(np.float32))
    return Weights(
        embedding=stacked_tiles([[EMBEDDING]], transposed=True),
        vectors={name: jnp.asarray(vector) for name, vector in vectors.items()},
        **matrices,
    )


def _read_int4(directory: Path) -> GenerationModel:
    model = read_int4_directory(directory)
    return GenerationModel(
        metadata=model.metadata, params=model.weights, mesh=one_device_mesh(), tokenizer=model.tokenizer
    )
