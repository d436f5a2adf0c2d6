"""Tokenizers: train and load SentencePiece byte-pair models that give every text back unchanged. Its only importer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from btlm_jax import store

TOKENIZER_FILE = "tokenizer.model"
UNK_ID, EOS_ID = 0, 1
MIN_VOCAB_SIZE = 300  # 256 byte pieces, the control pieces, a newline and some letters
MAX_LINE_CHARACTERS = 4096
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, so a text that has it would not come back


class SentencePieceTokenizer:
    """Text to ids and back; no text makes `eos_id`."""

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.eos_id = self._processor.eos_id()
        self.vocab_size = self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """Return the ids of each text; the same for any number of threads."""
        return self._processor.encode(list(texts), out_type=int, num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control ids give nothing."""
        return self._processor.decode(list(ids))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a byte-pair model with byte fallback and no normalisation; return the model file's contents.

    Raises:
      ValueError: the vocabulary is too small, or too large for these texts.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"model.vocab_size={vocab_size} is too small for a byte-fallback tokenizer: {MIN_VOCAB_SIZE} or more"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            unk_id=UNK_ID,
            eos_id=EOS_ID,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            max_sentence_length=4 * MAX_LINE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be trained on this text: {error}") from error
    return model.getvalue()


def load_tokenizer(directory: Path, tokenizer: store.Tokenizer) -> SentencePieceTokenizer:
    """Load a store's tokenizer.

    Raises:
      FileNotFoundError: its file is missing.
      ValueError: its contents are not what the manifest says, or it is of an unknown kind.
    """
    path = directory / tokenizer.file
    if tokenizer.kind != "sentencepiece":
        raise ValueError(
            f"tokenizer kind {tokenizer.kind!r} of {directory} is not known; this version reads sentencepiece"
        )
    if not path.is_file():
        raise FileNotFoundError(f"token store {directory} lacks its tokenizer file {tokenizer.file}")
    model = path.read_bytes()
    if hashlib.sha256(model).hexdigest() != tokenizer.sha256:
        raise ValueError(f"tokenizer {path} is not the one the manifest records; restore it or rebuild the store")
    return SentencePieceTokenizer(model)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield pieces of lines; SentencePiece trains on lines and knows the newline as a symbol of its own."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                yield line[start : start + MAX_LINE_CHARACTERS]
