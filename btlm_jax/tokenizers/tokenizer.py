"""Tokenizers that give every text back: train SentencePiece byte-pair models, load those and GPT-2's byte-level BPE.

The only importer of sentencepiece.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from btlm_jax.data import store
from btlm_jax.storage.location import PathOrUrl, join_location, read_bytes
from btlm_jax.tokenizers.boundaries import NEWLINE_BOUNDARY, NO_BOUNDARY
from btlm_jax.tokenizers.byte_level import KIND as BYTE_LEVEL
from btlm_jax.tokenizers.byte_level import MERGES_FILE, VOCAB_FILE, ByteLevelTokenizer, read_byte_level
from btlm_jax.tokenizers.byte_level import STORED_FILE as BYTE_LEVEL_FILE
from btlm_jax.tokenizers.sentencepiece_proto import USER_DEFINED, parse_model

SENTENCEPIECE = "sentencepiece"
TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_BYTES = 16_000_000  # of training text; more does not change the merges that matter
UNK_ID, EOS_ID = 0, 1
MIN_VOCAB_SIZE = 300  # 256 byte pieces, the control pieces, a newline and some letters
MAX_LINE_CHARACTERS = 4096


class Tokenizer(Protocol):
    """Text to ids and back; no text makes `eos_id`."""

    kind: str  # store.TokenizerInfo.kind
    stored_file: str  # the name of the one file that holds it
    contents: bytes  # of that file
    eos_id: int
    vocab_size: int
    boundary: re.Pattern  # before what matches it, a text can be cut: the pieces have the ids of the whole

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """Return the ids of each text; the same for any number of threads."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control ids give nothing."""


class SentencePieceTokenizer:
    """Text to ids and back; no text makes `eos_id`."""

    kind = SENTENCEPIECE
    stored_file = TOKENIZER_FILE

    def __init__(self, model: bytes):
        """Read the contents of a model file.

        Raises:
          ValueError: it is damaged, or has no end-of-text piece.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"this is no SentencePiece model: {error}") from error
        self.contents = model
        self.unk_id, self.bos_id = self._processor.unk_id(), self._processor.bos_id()  # -1 where there is none
        self.eos_id = self._processor.eos_id()
        self.vocab_size = self._processor.vocab_size()
        self.boundary = NEWLINE_BOUNDARY if _encodes_by_lines(model) else NO_BOUNDARY
        if self.eos_id < 0:
            raise ValueError("this SentencePiece model has no end-of-text piece; train it with an eos_id of 0 or more")

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


def load_tokenizer(directory: PathOrUrl, tokenizer: store.TokenizerInfo) -> Tokenizer:
    """Load a store's tokenizer.

    Raises:
      FileNotFoundError: its file is missing.
      OSError: it cannot be reached.
      ValueError: its contents are not what the manifest says, or it is of an unknown kind.
    """
    path = join_location(directory, tokenizer.file)
    if tokenizer.kind not in (SENTENCEPIECE, BYTE_LEVEL):
        raise ValueError(
            f"tokenizer kind {tokenizer.kind!r} of {directory} is not known; this version reads "
            f"{SENTENCEPIECE} and {BYTE_LEVEL}"
        )
    try:
        contents = read_bytes(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"token store {directory} lacks its tokenizer file {tokenizer.file}") from error
    if hashlib.sha256(contents).hexdigest() != tokenizer.sha256:
        raise ValueError(f"tokenizer {path} is not the one the manifest records; restore it or rebuild the store")
    if tokenizer.kind == BYTE_LEVEL:
        return ByteLevelTokenizer(contents, eos_id=tokenizer.eos_id)
    return SentencePieceTokenizer(contents)


def find_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face directory, whichever kind of file it lies in.

    A tokenizer.model comes first: the tokenizer.json beside it was made from it.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of a kind that cannot be used.
    """
    path = directory / TOKENIZER_FILE
    if path.is_file():
        try:
            return SentencePieceTokenizer(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
    if not any((directory / name).is_file() for name in (BYTE_LEVEL_FILE, VOCAB_FILE)):
        raise FileNotFoundError(
            f"{directory} holds no tokenizer: looked for {TOKENIZER_FILE}, {BYTE_LEVEL_FILE}, "
            f"and {VOCAB_FILE} with {MERGES_FILE}"
        )
    return read_byte_level(directory)


def stored_facts(tokenizer: Tokenizer) -> store.TokenizerInfo:
    """Return what a manifest records of a tokenizer whose `contents` lie in its `stored_file`."""
    return store.TokenizerInfo(
        kind=tokenizer.kind,
        file=tokenizer.stored_file,
        sha256=hashlib.sha256(tokenizer.contents).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def _encodes_by_lines(contents: bytes) -> bool:
    """Return whether no piece of a model reaches over a newline, nor any of its rules: as those trained here."""
    model = parse_model(contents)
    rules = (model.add_dummy_prefix, model.remove_extra_whitespaces, model.rewrites_characters)
    symbols = [model.pieces[number] for number in model.ids_of(USER_DEFINED)]
    return symbols == ["\n"] and not any(rules) and not model.whitespace_as_suffix


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield pieces of lines; SentencePiece trains on lines and knows the newline as a symbol of its own."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                yield line[start : start + MAX_LINE_CHARACTERS]
