"""Load a model of any form for generation, as what is fastest here: in tiles on a CPU, as a tree elsewhere."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from btlm_jax.convert.native import NativeModel, one_device_mesh
from btlm_jax.convert.source import load_native, open_source
from btlm_jax.cpu.build import has_kernels
from btlm_jax.cpu.forward import float_weights
from btlm_jax.cpu.tiles import GROUP
from btlm_jax.quantize.directory import EMBEDDING_BITS, is_int4_directory, read_int4_directory, write_int4_directory
from btlm_jax.quantize.walk import Method, quantize_model


def load_for_generation(directory: Path, *, as_int4: bool) -> NativeModel:
    """Load a training run, a model directory, a 4-bit directory or a Hugging Face directory.

    `as_int4` rounds the weights to 4 bits on the way, by HQQ, which needs no text; a 4-bit directory may do better.

    Raises:
      FileNotFoundError, ValueError: there is no model, or it is damaged.
    """
    if is_int4_directory(directory):
        return _from_int4_directory(directory)
    if as_int4:
        source = open_source(directory)
        rounded = quantize_model(
            source.config, source.tensors, method=Method.HQQ, group_size=GROUP, embedding_bits=EMBEDDING_BITS,
            calibration_BT=None, report=lambda name: None,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            write_int4_directory(Path(scratch), facts=source.facts(), rounded=rounded, tokenizer=source.tokenizer)
            del source, rounded
            return _from_int4_directory(Path(scratch))
    native = load_native(directory)
    if not has_kernels():
        return native
    return dataclasses.replace(native, params=float_weights(native.params, dtype=native.facts.model.dtype))


def _from_int4_directory(directory: Path) -> NativeModel:
    read = read_int4_directory(directory)
    return NativeModel(facts=read.facts, params=read.weights, mesh=one_device_mesh(), tokenizer=read.tokenizer)
