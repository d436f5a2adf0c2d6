"""Write a 4-bit model for `btlm generate`, and prove that the CPU kernels compute with the values of its codes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from btlm_jax.convert.prove import Proof, compare
from btlm_jax.data.loader import read_rows
from btlm_jax.data.reader import open_store
from btlm_jax.data.store import TRAIN
from btlm_jax.decode.cpu_decoder import CpuDecoder
from btlm_jax.hub.native import is_run, store_of_run
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.source import Source, published_metadata
from btlm_jax.kernels.build import GROUP_INPUTS
from btlm_jax.quantize.int4_directory import EMBEDDING_BITS, Int4Tensors, read_int4_directory, write_int4_directory
from btlm_jax.quantize.quantize_model import Method, QuantizedTensor, dequantize_tensor, quantize_model
from btlm_jax.tokenizers.tokenizer import Tokenizer

_CALIBRATION_ROWS, _CALIBRATION_LENGTH = 32, 512
_READ_OF_TEXT = 1 << 20  # characters, of which many more than those rows are made
# Both are relative to the largest logit. The first allows for float32 sums in another order. Rounding to 4 bits gives
# 0.01 on trained models and 0.5 on tiny random ones; logits of 0 would give 1, unrelated logits 1.4.
_SAME_VALUES_TOLERANCE = 1e-4
_ROUNDING_TOLERANCE = 0.9


def _hash_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data).hexdigest()


def calibration_ids(directory: Path, tokenizer: Tokenizer | None, *, text: Path | None) -> np.ndarray:
    """Return ids_BT to calibrate on: the beginning of a text, or else evenly spaced parts of a run's training data.

    Raises:
      FileNotFoundError, ValueError: there is neither, it is too short, or the store is not the one of the run.
      OSError: the run's store cannot be reached.
    """
    if text is not None:
        if tokenizer is None:
            raise ValueError(f"{directory} holds no tokenizer to read {text} with; use --method=hqq, without a text")
        try:
            with open(text, encoding="utf-8") as file:
                ids = np.array(tokenizer.encode(file.read(_READ_OF_TEXT)))
        except UnicodeDecodeError as error:
            raise ValueError(f"calibration={text} is no text: {error}") from error
        num_rows = min(_CALIBRATION_ROWS, len(ids) // _CALIBRATION_LENGTH)
        if num_rows == 0:
            raise ValueError(f"calibration={text} has {len(ids):,} tokens; at least {_CALIBRATION_LENGTH:,} are needed")
        return ids[: num_rows * _CALIBRATION_LENGTH].reshape(num_rows, _CALIBRATION_LENGTH)
    if not is_run(directory):
        raise ValueError(f"{directory} is no training run: give --calibration=TEXTFILE, or --method=hqq, without one")
    instead = "give --calibration=TEXTFILE, or --method=hqq, which needs no text"
    given = store_of_run(directory)
    try:
        token_store = open_store(given.location, expected_fingerprint="")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the token store of the run {directory} is not here ({error}): {instead}") from error
    given.check(token_store.manifest.fingerprint, instead=instead)
    reader = token_store.split(TRAIN)
    seq_len = min(reader.block_len, _CALIBRATION_LENGTH)
    per_block = reader.block_len // seq_len
    windows = np.unique(np.linspace(0, len(reader) * per_block - 1, _CALIBRATION_ROWS).astype(int)).tolist()
    starts = [(window // per_block, window % per_block * seq_len) for window in windows]
    rows = read_rows(reader, starts, seq_len=seq_len)
    ids_BT = rows["inputs_BT"][rows["weights_BT"].any(1)]  # a stream's last block may be padding for the most part
    if ids_BT.size < _CALIBRATION_LENGTH:
        raise ValueError(
            f"token store {given.location} has {ids_BT.size:,} tokens to calibrate on; at least "
            f"{_CALIBRATION_LENGTH:,} are needed: {instead}"
        )
    return ids_BT


def write_int4(
    source: Source, directory: Path, *, method: Method, calibration_BT: np.ndarray | None, report: Callable[[str], None]
) -> dict[str, str]:
    """Quantize a model to 4 bits, block by block, and write its directory.

    Returns the sha256 of the values that each tensor was quantized to.
    """
    hashes: dict[str, str] = {}

    def recorded(quantized: Iterable[tuple[str, QuantizedTensor]]) -> Iterator[tuple[str, QuantizedTensor]]:
        for name, tensor in quantized:
            hashes[name] = _hash_of(dequantize_tensor(name, tensor))
            yield name, tensor

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
        directory,
        metadata=dataclasses.replace(metadata, notes=notes),
        quantized=recorded(quantized),
        tokenizer=source.tokenizer,
    )
    return hashes


def prove_int4(source: Source, directory: Path, ids_T: np.ndarray, *, hashes: Mapping[str, str]) -> Iterator[Proof]:
    """Compare the file's values with `hashes`; its kernels' logits with those of its values, and with the source's.

    That quantized values are near the source's is checked group by group when they are made (quantize_model).

    Raises:
      ValueError: a tensor of the file is not what the source was quantized to.
    """
    tensors = Int4Tensors(directory)
    for name in tensors.shapes:
        if _hash_of(tensors.read(name)) != hashes[name]:
            raise ValueError(
                f"what was written is not the quantized source, so it was not kept: tensor {name} has other values"
            )
    if source.config.alibi_train_len:  # beyond it a whole pass and decoding differ by definition
        ids_T = ids_T[: source.config.alibi_train_len]
    model = read_int4_directory(directory)
    decoder = CpuDecoder(
        model.metadata.network(), model.weights, num_rows=1, num_slots=len(ids_T), cache_dtype="float32"
    )
    ids = ids_T.tolist()
    logits_1V = [decoder.prefill([ids[:1]])]
    logits_1V += [decoder.decode([ids[: end + 1]]) for end in range(1, len(ids))]
    actual_TV = np.concatenate(logits_1V)
    del model, decoder
    same_values_TV = streamed_logits(source.config, tensors, ids_T)
    yield compare("the codes' values, and the kernels", same_values_TV, actual_TV, tolerance=_SAME_VALUES_TOLERANCE)
    yield compare("the 4-bit model", source.logits(ids_T), actual_TV, tolerance=_ROUNDING_TOLERANCE)
