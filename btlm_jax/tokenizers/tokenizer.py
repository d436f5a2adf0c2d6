"""The interface of every tokenizer, and finding one: in a token store, or in a Hugging Face directory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from btlm_jax import notices
from btlm_jax.data import store
from btlm_jax.storage.files import check_no_lfs_pointer, read_json_object
from btlm_jax.storage.location import PathOrUrl, join_location, read_bytes
from btlm_jax.tokenizers.byte_level import (
    ADDED_TOKENS_FILE,
    MERGES_FILE,
    VOCAB_FILE,
    ByteLevelTokenizer,
    find_eos_id,
    naming_library_errors,
    read_byte_level,
)
from btlm_jax.tokenizers.byte_level import KIND as BYTE_LEVEL
from btlm_jax.tokenizers.byte_level import STORED_FILE as BYTE_LEVEL_FILE
from btlm_jax.tokenizers.sentencepiece_bpe import SENTENCEPIECE, TOKENIZER_FILE, SentencePieceTokenizer

PIECE_CHARACTERS = 1 << 20  # of a long text that is encoded in pieces
SENTENCEPIECE_JSON = "sentencepiece_json"  # of sentencepiece_json.py, which is imported where it is needed
# Texts by which tokenizers are compared, such as a tokenizer.json and the model file beside it
PROBES = (
    "Hello world, it's 10:45", "  two spaces,\ta tab\n\n and lines\n", "def f(x):\n    return x ** 2",
    "\u00c9t\u00e9 \u2014 \u6570\u5b66 \U0001f600", "a" * 9 + " " * 7 + "=" * 8,
)  # fmt: skip


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

    @property
    def spare_token(self) -> str:
        """A token that no text has, to fill up batches with: the unknown one, or else the end of text."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids that no text is encoded as, by the tokens' names."""
        ...

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as it stands in the vocabulary, or None."""
        ...

    def token(self, number: int) -> str:
        """Return the token of an id, as it stands in the vocabulary."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text in which the name of a special token stands for its id, as clients read prompts."""
        ...

    def encode_prompt_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `encode_prompt`, and of each the (begin, end) of its characters in the text."""
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


def load_tokenizer(directory: PathOrUrl, tokenizer: store.TokenizerInfo, *, allow_lossy: bool = True) -> Tokenizer:
    """Load a store's tokenizer; whoever made the store was asked whether it may change texts.

    Raises:
      FileNotFoundError: its file is missing.
      OSError: it cannot be reached.
      ValueError: its contents do not have the manifest's hash, or it is of an unknown kind.
    """
    path = join_location(directory, tokenizer.file)
    kinds = (SENTENCEPIECE, BYTE_LEVEL, SENTENCEPIECE_JSON)
    if tokenizer.kind not in kinds:
        raise ValueError(
            f"tokenizer kind {tokenizer.kind!r} of {directory} is not known; this version reads {', '.join(kinds)}"
        )
    try:
        contents = read_bytes(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"token store {directory} lacks its tokenizer file {tokenizer.file}") from error
    if hashlib.sha256(contents).hexdigest() != tokenizer.sha256:
        raise ValueError(f"tokenizer {path} is not the one the manifest records; restore it or rebuild the store")
    if tokenizer.kind == BYTE_LEVEL:
        return ByteLevelTokenizer(contents, eos_id=tokenizer.eos_id, allow_lossy=allow_lossy)
    if tokenizer.kind == SENTENCEPIECE_JSON:
        from btlm_jax.tokenizers.sentencepiece_json import SentencePieceJsonTokenizer

        return SentencePieceJsonTokenizer(contents, eos_id=tokenizer.eos_id)
    return SentencePieceTokenizer(contents)


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has a file in which `find_tokenizer` looks."""
    return any((directory / name).is_file() for name in (TOKENIZER_FILE, BYTE_LEVEL_FILE, VOCAB_FILE))


def find_tokenizer(directory: Path, *, allow_lossy: bool = False) -> Tokenizer:
    """Read the tokenizer of a Hugging Face directory, from whichever kind of file it has, or the one that a run keeps.

    A tokenizer.json that would change texts is read only if `allow_lossy`. As in transformers it has priority. A
    tokenizer.model beside it is read if both make the same ids.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of a kind that cannot be used.
    """
    if (directory / store.TOKENIZER_INFO_FILE).is_file():
        return load_tokenizer(directory, store.read_tokenizer_info(directory), allow_lossy=allow_lossy)
    model, stored = directory / TOKENIZER_FILE, directory / BYTE_LEVEL_FILE
    if not has_tokenizer(directory):
        raise FileNotFoundError(
            f"{directory} holds no tokenizer: looked for {TOKENIZER_FILE}, {BYTE_LEVEL_FILE}, "
            f"and {VOCAB_FILE} with {MERGES_FILE}"
        )
    if not model.is_file():
        return _read_json(directory, allow_lossy=allow_lossy)
    tokenizer = _read_model(model)
    if not stored.is_file():
        _check_no_added_tokens(directory, tokenizer)
        return tokenizer
    difference = _difference(stored, tokenizer)
    if not difference:
        return tokenizer
    try:
        preferred = _read_json(directory, allow_lossy=allow_lossy)
    except ValueError as error:
        raise ValueError(
            f"{stored}, which transformers reads, is not the tokenizer of {model.name} beside it: {difference}; and it "
            f"cannot be read here: {error}"
        ) from error
    notices.report(
        "tokenizer-preferred",
        f"{stored} is read, as transformers does, and not {model.name} beside it: {difference}",
    )
    return preferred


def _read_model(path: Path) -> SentencePieceTokenizer:
    check_no_lfs_pointer(path)
    try:
        return SentencePieceTokenizer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _read_json(directory: Path, *, allow_lossy: bool) -> Tokenizer:
    """Read a tokenizer.json of any kind, or vocab.json and merges.txt."""
    path = directory / BYTE_LEVEL_FILE
    if path.is_file():
        from btlm_jax.tokenizers.sentencepiece_json import SentencePieceJsonTokenizer, is_of_sentencepiece

        if is_of_sentencepiece(read_json_object(path)):
            contents = path.read_bytes()
            try:
                return SentencePieceJsonTokenizer(contents, eos_id=find_eos_id(contents, directory))
            except ValueError as error:
                raise ValueError(f"{path} cannot be used: {error}") from error
    return read_byte_level(directory, allow_lossy=allow_lossy)


def _difference(stored: Path, tokenizer: SentencePieceTokenizer) -> str:
    """Describe how a tokenizer.json differs from a SentencePiece model, or return ""."""
    from tokenizers import Tokenizer as LibraryTokenizer

    read_json_object(stored)
    with naming_library_errors(stored):
        library = LibraryTokenizer.from_file(str(stored))
    library.encode_special_tokens = True
    pieces, vocabulary = tokenizer.pieces, library.get_vocab(with_added_tokens=True)
    own = {piece: number for number, piece in enumerate(pieces)}
    if vocabulary != own:
        more = sorted(vocabulary.keys() - own.keys(), key=vocabulary.__getitem__)
        more += sorted(own.keys() - vocabulary.keys(), key=own.__getitem__)
        count = len(vocabulary.items() ^ own.items())
        return f"{count:,} tokens differ" + (f", among them {', '.join(map(repr, more[:3]))}" if more else "")
    for text in PROBES:
        if library.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            return f"{text!r} gets other ids"
    return ""


def _check_no_added_tokens(directory: Path, tokenizer: SentencePieceTokenizer) -> None:
    """Check that a directory without a tokenizer.json adds no tokens to its model file."""
    added: dict[str, object] = {}
    if (directory / ADDED_TOKENS_FILE).is_file():
        added |= read_json_object(directory / ADDED_TOKENS_FILE)
    if (directory / store.TOKENIZER_CONFIG_FILE).is_file():
        decoder = read_json_object(directory / store.TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")
        for number, token in decoder.items() if isinstance(decoder, dict) else ():
            added |= {str(token.get("content") if isinstance(token, dict) else token): number}
    missing = added.keys() - set(tokenizer.pieces)
    if missing:
        raise ValueError(
            f"{directory} adds {len(missing)} tokens to {TOKENIZER_FILE}, such as {min(missing)!r}; save the tokenizer "
            f"with transformers, which writes a {BYTE_LEVEL_FILE} that has them"
        )


def tokenizer_info(tokenizer: Tokenizer) -> store.TokenizerInfo:
    """Return the manifest entry of a tokenizer."""
    return store.TokenizerInfo(
        kind=tokenizer.kind,
        file=tokenizer.stored_file,
        sha256=hashlib.sha256(tokenizer.contents).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
