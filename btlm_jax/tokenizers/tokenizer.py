"""The interface of every tokenizer, and finding one: in a token store, or in a Hugging Face directory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from btlm_jax.data import store
from btlm_jax.storage.location import PathOrUrl, join_location, read_bytes
from btlm_jax.tokenizers.byte_level import KIND as BYTE_LEVEL
from btlm_jax.tokenizers.byte_level import MERGES_FILE, VOCAB_FILE, ByteLevelTokenizer, read_byte_level
from btlm_jax.tokenizers.byte_level import STORED_FILE as BYTE_LEVEL_FILE
from btlm_jax.tokenizers.sentencepiece_bpe import SENTENCEPIECE, TOKENIZER_FILE, SentencePieceTokenizer

PIECE_CHARACTERS = 1 << 20  # of a long text that is encoded in pieces


class Tokenizer(Protocol):
    """Text to ids and back; no text is encoded as `eos_id`."""

    @property
    def kind(self) -> str:
        """The kind in a manifest: store.TokenizerInfo.kind."""
        ...

    @property
    def stored_file(self) -> str:
        """The name of the one file that holds the tokenizer."""
        ...

    @property
    def contents(self) -> bytes:
        """The contents of that file."""
        ...

    @property
    def eos_id(self) -> int:
        """The id of the end of a text."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        ...

    @property
    def boundary(self) -> re.Pattern | None:
        """What a text can be divided before: the pieces have the ids of the whole. None if it must stay whole."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text in which the name of a special token stands for its id, as clients read prompts."""
        ...

    def encode_exactly(self, text: str) -> list[int]:
        """Return ids that give the text back, where those of `encode` would not."""
        ...

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """Return the ids of each text; the same for any number of threads."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control ids give nothing."""
        ...


def split_for_encoding(text: str, boundary: re.Pattern | None) -> Iterator[str]:
    """Yield pieces of a text that, encoded one by one, give the ids of the whole.

    Each piece ends before the first boundary after PIECE_CHARACTERS; without a boundary the text stays whole.
    """
    start = 0
    while boundary is not None and len(text) - start > PIECE_CHARACTERS:
        match = boundary.search(text, start + PIECE_CHARACTERS)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def encode_document(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Yield the ids of a text's pieces, which are those of the whole, such that they give the text back."""
    for piece in split_for_encoding(text, tokenizer.boundary):
        yield tokenizer.encode_exactly(piece)


def load_tokenizer(directory: PathOrUrl, tokenizer: store.TokenizerInfo) -> Tokenizer:
    """Load a store's tokenizer.

    Raises:
      FileNotFoundError: its file is missing.
      OSError: it cannot be reached.
      ValueError: its contents do not have the manifest's hash, or it is of an unknown kind.
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
        # Whoever made the store was asked before its texts were encoded by a tokenizer that changes them.
        return ByteLevelTokenizer(contents, eos_id=tokenizer.eos_id, allow_lossy=True)
    return SentencePieceTokenizer(contents)


def find_tokenizer(directory: Path, *, allow_lossy: bool = False) -> Tokenizer:
    """Read the tokenizer of a Hugging Face directory, from whichever kind of file it has.

    A tokenizer.json that would change texts is read only if `allow_lossy`. A tokenizer.model has priority: a
    tokenizer.json beside it was made from it.

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
    return read_byte_level(directory, allow_lossy=allow_lossy)


def tokenizer_info(tokenizer: Tokenizer) -> store.TokenizerInfo:
    """Return the manifest entry of a tokenizer."""
    return store.TokenizerInfo(
        kind=tokenizer.kind,
        file=tokenizer.stored_file,
        sha256=hashlib.sha256(tokenizer.contents).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
