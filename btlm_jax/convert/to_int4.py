"""Write a 4-bit model for `btlm generate`, and prove that the kernels compute what its codes stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from btlm_jax.convert.prove import Proof, compare
from btlm_jax.data.loader import read_rows
from btlm_jax.data.reader import open_store
from btlm_jax.decode.cpu_decoder import CpuDecoder
from btlm_jax.hub.native import is_run, store_of_run
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.source import Source, published_metadata
from btlm_jax.kernels.build import GROUP_INPUTS
from btlm_jax.quantize.int4_directory import EMBEDDING_BITS, Int4Tensors, read_int4_directory, write_int4_directory
from btlm_jax.quantize.quantize_model import Method, quantize_model
from btlm_jax.tokenizers.tokenizer import Tokenizer

_CALIBRATION_ROWS, _CALIBRATION_LENGTH = 32, 512
_SAME_VALUES_TOLERANCE = 1e-4  # of float32 sums in another order
# Relative to the largest logit. Trained models come to 0.01, tiny random ones to 0.5; a model of zeros would be 1
# apart, one with nothing in common 1.4.
_ROUNDING_TOLERANCE = 0.9


def calibration_ids(directory: Path, tokenizer: Tokenizer | None, *, text: Path | None) -> np.ndarray:
    """Return ids_BT to calibrate on: of a text file, or else blocks evenly spread over a run's training data.

    Raises:
      FileNotFoundError, ValueError: there is neither, or the text is too short.
    """
    if text is not None:
        if tokenizer is None:
            raise ValueError(f"{directory} holds no tokenizer to read {text} with; use --method=hqq, without a text")
        try:
            ids = np.array(tokenizer.encode(text.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(f"calibration={text} is no text: {error}") from error
        num_rows = min(_CALIBRATION_ROWS, len(ids) // _CALIBRATION_LENGTH)
        if num_rows == 0:
            raise ValueError(f"calibration={text} has {len(ids):,} tokens; at least {_CALIBRATION_LENGTH:,} are needed")
        return ids[: num_rows * _CALIBRATION_LENGTH].reshape(num_rows, _CALIBRATION_LENGTH)
    if not is_run(directory):
        raise ValueError(f"{directory} is no training run: give --calibration=TEXTFILE, or --method=hqq, without one")
    reader = open_store(store_of_run(directory), expected_fingerprint="").split("train")
    starts = [(int(block), 0) for block in np.linspace(0, len(reader) - 1, _CALIBRATION_ROWS)]
    return read_rows(reader, starts, seq_len=min(reader.block_len, _CALIBRATION_LENGTH))["inputs_BT"]


def write_int4(
    source: Source, directory: Path, *, method: Method, calibration_BT: np.ndarray | None, report: Callable[[str], None]
) -> None:
    """Round a model to 4 bits, block by block, and write its directory."""
    metadata = published_metadata(source)
    notes = metadata.notes | {"4 bits": f"{method}, groups of {GROUP_INPUTS}, embedding {EMBEDDING_BITS} bits"}
    quantized = quantize_model(
        source.config,
        source.tensors,
        method=method,
        group_size=GROUP_INPUTS,
        embedding_bits=EMBEDDING_BITS,
        calibration_BT=calibration_BT,
        report=report,
    )
    write_int4_directory(
        directory, metadata=dataclasses.replace(metadata, notes=notes), quantized=quantized, tokenizer=source.tokenizer
    )


def prove_int4(source: Source, directory: Path, ids_T: np.ndarray) -> Iterator[Proof]:
    """Compare the logits of the written model with those of its codes' values, and with the source's."""
    model = read_int4_directory(directory)
    decoder = CpuDecoder(
        model.metadata.network(), model.weights, num_rows=1, num_slots=len(ids_T), cache_dtype="float32"
    )
    found_TV = [decoder.prefill([ids_T[:1]])]
    found_TV += [decoder.decode([ids_T[: end + 1]]) for end in range(1, len(ids_T))]
    found_TV = np.concatenate(found_TV)
    del model, decoder
    same_values_TV = streamed_logits(source.config, Int4Tensors(directory), ids_T)
    yield compare("the codes' values, and the kernels", same_values_TV, found_TV, tolerance=_SAME_VALUES_TOLERANCE)
    yield compare("the 4-bit model", source.logits(ids_T), found_TV, tolerance=_ROUNDING_TOLERANCE)
