"""A tokenizer.json that was made from a SentencePiece model: what is left of one after transformers has saved it.

convert/sentencepiece_to_hf.py makes such files. They hold pieces in which SPACE_MARK stands for a space, byte pieces,
and, unlike a model file, tokens that were added later.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from btlm_jax.tokenizers.byte_level import STORED_FILE, JsonTokenizer, check_ids
from btlm_jax.tokenizers.sentencepiece_proto import SPACE_MARK
from btlm_jax.tokenizers.tokenizer import SENTENCEPIECE_JSON

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_NORMALIZERS, _DECODERS = ("Prepend", "Replace"), ("Replace", "ByteFallback", "Fuse", "Strip")


class SentencePieceJsonTokenizer(JsonTokenizer):
    """Text to ids and back; no text is encoded as `eos_id` or as another special token."""

    kind = SENTENCEPIECE_JSON

    def __init__(self, contents: bytes, *, eos_id: int):
        """Read the contents of a tokenizer.json.

        Raises:
          ValueError: it is damaged, of another kind, or `eos_id` is not in it.
        """
        super().__init__(contents, eos_id=eos_id, check=_check)
        self._model = json.loads(self.json)["model"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special ids give nothing, and a byte of no whole character U+FFFD, as SentencePiece.

        The library alone makes U+FFFD of each byte of a run of byte pieces in which one is of no whole character.
        """
        text = super().decode(ids)
        if _REPLACEMENT not in text:
            return text
        special, to_token = self._special_ids, self._tokenizer.id_to_token
        tokens = [token for number in ids if number not in special and (token := to_token(number)) is not None]
        parts: list[str] = []
        for are_bytes, run in itertools.groupby(tokens, key=lambda token: _BYTE_PIECE.fullmatch(token) is not None):
            pieces = list(run)
            parts += _without_broken_bytes(pieces) if are_bytes else pieces
        return self._tokenizer.decoder.decode(parts)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_ids)

    @property
    def is_bpe(self) -> bool:
        """Whether pieces are merged, not chosen by their probabilities (Unigram)."""
        return self._model["type"] == "BPE"

    @property
    def has_byte_fallback(self) -> bool:
        """Whether characters that are no piece become byte pieces."""
        return self._model["byte_fallback"]

    @property
    def spare_token(self) -> str:
        """The piece of characters that cannot be expressed."""
        return self.unk_token

    @property
    def unk_token(self) -> str:
        """The piece of characters that cannot be expressed."""
        return self._model["unk_token"] if self.is_bpe else self.token(self._model["unk_id"])

    @property
    def adds_space(self) -> bool:
        """Whether a space is put before a text."""
        return any(step["type"] == "Prepend" for step in _steps(json.loads(self.json)["normalizer"], "normalizers"))


def _without_broken_bytes(pieces: list[str]) -> list[str]:
    """Return byte pieces with U+FFFD for each of no whole character."""
    contents = bytes(int(piece[3:5], 16) for piece in pieces)
    parts: list[str] = []
    for character in contents.decode("utf-8", "surrogateescape"):
        if "\udc80" <= character <= "\udcff":  # how Python writes such a byte
            parts.append(_REPLACEMENT)
        else:
            parts += (f"<0x{byte:02X}>" for byte in character.encode())
    return parts


def is_of_sentencepiece(body: dict) -> bool:
    """Whether the parsed contents of a tokenizer.json are of this kind, as far as its decoder tells."""
    return [step.get("type") for step in _steps(body.get("decoder"), "decoders")[:2]] == ["Replace", "ByteFallback"]


def _steps(part: object, key: str) -> list[dict]:
    """Return the steps of a part of a tokenizer.json, of a sequence or the one; none of what is not such a part."""
    if not isinstance(part, dict):
        return []
    steps = part.get(key) if part.get("type") == "Sequence" else [part]
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _check(body: dict, tokenizer: Tokenizer) -> None:
    """Check that this gives texts back as the SentencePiece model that it was made from does."""
    model = body["model"]
    normalizers, decoders = _steps(body.get("normalizer"), "normalizers"), _steps(body.get("decoder"), "decoders")
    before = _steps(body.get("pre_tokenizer"), "pretokenizers")
    unknown = [f"model {model.get('type')}"] if model.get("type") not in ("BPE", "Unigram") else []
    unknown += [f"normalizer {step['type']}" for step in normalizers if step["type"] not in _NORMALIZERS]
    unknown += [f"decoder {step['type']}" for step in decoders if step["type"] not in _DECODERS]
    unknown += [
        f"pre-tokenizer {step['type']}"
        for step in before
        if step["type"] != "Split" or step.get("behavior") != "Isolated"
    ]
    if unknown or not normalizers or not is_of_sentencepiece(body):
        raise ValueError(
            f"{STORED_FILE} has {', '.join(unknown) or 'no normalizer'}; of tokenizers with SentencePiece's pieces "
            f"only those made by btlm convert can be read (BPE or Unigram, {SPACE_MARK!r} for spaces, byte fallback)"
        )
    check_ids(tokenizer)
    for number, token in tokenizer.get_added_tokens_decoder().items():
        texts = (token.content, f"a{token.content}", f"{token.content}a")
        if token.special and any(number in tokenizer.encode(text, add_special_tokens=False).ids for text in texts):
            raise ValueError(f"text can make the special token {token.content!r} (id {number}) of {STORED_FILE}")
