"""Prove a GGUF file: compare its values with the source's, the logits of both networks, and the ids of texts.

The rounding of block types changes logits by more than some mistakes do. So there are two steps with tight tolerances:
no value is off by more than its type's rounding; and with the file's values, the source's network and llama.cpp's
compute the same logits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from btlm_jax.convert.fold import FoldedTensors, unfolded_query
from btlm_jax.convert.to_gguf import GGUFTensor, gguf_tensors
from btlm_jax.convert.tokenizer_files import first_difference, probe_texts
from btlm_jax.hub.gguf import GGUFFile, GGUFTokenizer
from btlm_jax.hub.published import HEAD, PublishedConfig, tensor_shapes
from btlm_jax.tokenizers.tokenizer import Tokenizer

_ROWS = 1024  # compared at a time

# The largest error of a value, relative to the largest magnitude in its block: half of the last bit, or one step of the
# block. K-quants choose the step that minimizes squared errors and clip the extremes, which adds up to one step:
# ggml-quants tries scales of 14 to 16 steps where there are 15, and of 31.1 to 32.9 where there are 32 on either side.
_ROUNDING = {
    "F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q4_0": 1 / 8,
    "Q4_K": 1.5 * 2 / 15, "Q5_K": 1.5 * 2 / 31, "Q6_K": 2 / 32,
}  # fmt: skip
_SCALE_ROUNDING = 2**-10  # relative, of a block's float16 scale
# The largest factor of a block's float16 scale. Times half the distance of the smallest float16 numbers, it is an error
# that any value may have.
_LARGEST_MULTIPLE = {
    "F32": 0, "F16": 1, "BF16": 0, "Q8_0": 127, "Q4_0": 8, "Q4_K": 63 * 16, "Q5_K": 63 * 32, "Q6_K": 128 * 32,
}  # fmt: skip
_BLOCK = {"Q8_0": 32, "Q4_0": 32, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}  # values; other types round each value alone


def prove_tensors(
    file: GGUFFile, folded: FoldedTensors, *, file_type: str, report: Callable[[str], None]
) -> dict[str, float]:
    """Compare every value of a file with the source's; return the largest error of each type, relative to its bound.

    `report` gets each tensor's name before it is compared.

    Raises:
      ValueError: a tensor is missing, has another shape or type, or a value is off by more than its type's rounding.
    """
    entries = {entry.name: entry for entry in gguf_tensors(folded.config, file_type=file_type)}
    if file.tensors.keys() != entries.keys():
        raise ValueError(f"tensors {sorted(file.tensors.keys() ^ entries.keys())} are missing or too many in the file")
    errors = dict.fromkeys((entry.type_name for entry in entries.values()), 0.0)
    for entry in entries.values():
        report(entry.name)
        stored = file.tensors[entry.name]
        if (stored.shape, stored.type_name) != (entry.shape, entry.type_name):
            raise ValueError(f"tensor {entry.name} of the file is {stored}, not {entry.type_name} {entry.shape}")
        errors[entry.type_name] = max(errors[entry.type_name], _error_of(file, entry, folded.read(entry.published)))
    return errors


def _error_of(file: GGUFFile, entry: GGUFTensor, source: np.ndarray) -> float:
    """Return the largest error of a tensor's values, relative to the allowed one. Raises ValueError above it."""
    source = source.T if entry.transposed else source
    block = _BLOCK.get(entry.type_name, 1)
    rounding = _ROUNDING[entry.type_name] + (_SCALE_ROUNDING if block > 1 else 0)
    smallest = _LARGEST_MULTIPLE[entry.type_name] * 2.0**-25
    largest = 0.0
    for start in range(0, len(source), _ROWS):
        stop = min(start + _ROWS, len(source))
        expected = source[start:stop].astype(np.float32) * np.float32(entry.scale)
        actual = file.rows(entry.name, start, stop)
        errors = np.abs(actual - expected).reshape(-1, block).max(-1)
        highest = np.abs(expected).reshape(-1, block).max(-1)
        allowed = rounding * highest + smallest
        wrong = ~(errors <= allowed)  # including NaN
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"what was written is not the source, so it was not kept: in tensor {entry.name} ({entry.type_name}) "
                f"{int(wrong.sum()):,} of {len(wrong):,} blocks from row {start} are wrong, the first by "
                f"{errors[at]:.3g} with values up to {highest[at]:.3g}"
            )
        largest = max(largest, float((errors / np.maximum(allowed, np.float32(1e-30))).max()))
    return largest


class UnfoldedTensors:
    """The file's values as the source's tensors, by published name; see `published.Tensors`. The head is not tied."""

    def __init__(self, file: GGUFFile, config: PublishedConfig, folded: PublishedConfig, *, file_type: str):
        self._file, self._config = file, config
        self.shapes = tensor_shapes(config) | {HEAD: (config.vocab_size, config.n_embd)}
        entries = list(gguf_tensors(folded, file_type=file_type))
        self._entry_of = {entry.published: entry for entry in reversed(entries)} | {HEAD: entries[-1]}

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, float32."""
        entry = self._entry_of[name]
        array = self._file.read(entry.name)
        if entry.scale != 1:
            array /= np.float32(entry.scale)
        array = array.T if entry.transposed else array
        array = array[tuple(slice(size) for size in self.shapes[name])]  # without the padding
        return unfolded_query(array, name, self._config)


def prove_vocabulary(
    file: GGUFFile, tokenizer: Tokenizer, *, vocab_size: int, eos_id: int, prompt_bos_id: int | None = None
) -> None:
    """Compare the ids that llama.cpp gives with the file's keys with those of the tokenizer.

    Raises:
      ValueError: they differ; it names the text and the first ids that do.
    """
    by_gguf = GGUFTokenizer(file.keys)
    if (by_gguf.eos_id, by_gguf.num_tokens) != (eos_id, vocab_size):
        raise ValueError(
            f"the file has {by_gguf.num_tokens} tokens and eos_id={by_gguf.eos_id}; they must be {vocab_size} and "
            f"{eos_id}"
        )
    if by_gguf.prompt_bos_id != prompt_bos_id:
        raise ValueError(
            f"llama.cpp would put the id {by_gguf.prompt_bos_id} in front of every prompt, not {prompt_bos_id}"
        )
    for text in probe_texts(tokenizer):
        expected, actual = tokenizer.encode(text), by_gguf.encode(text)
        if expected != actual:
            raise ValueError(
                f"llama.cpp would make other ids than the tokenizer: {first_difference(text, expected, actual)}"
            )
