"""Normalise text as SlimPajama does: lower case, no ASCII punctuation, white space collapsed, stripped at the ends.

The result is an array of character codes: the rule for short documents counts them, and the signatures hash them.
https://github.com/Cerebras/modelzoo, data_preparation/nlp/slimpajama/dedup/to_hash.py
"""

from __future__ import annotations

import string
from collections.abc import Iterator

import numpy as np

_PUNCTUATION = string.punctuation.encode()
_SPACE = 0x20
_DELETED = 0xFFFFFFFF  # not a character code
_ASCII_SPACES = b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f "
_WIDE_SPACES = (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)  # what \s matches
_TABLE = bytes.maketrans(
    _ASCII_SPACES + string.ascii_uppercase.encode(), b" " * len(_ASCII_SPACES) + string.ascii_lowercase.encode()
)
_FIRST_ABOVE = max(_WIDE_SPACES) + 1
_NOTHING, _ONE_SPACE = np.empty(0, np.uint8), np.full(1, _SPACE, np.uint8)
_SLICE = 1 << 20  # characters normalised at a time
_BEGINNING = 2_000  # characters that nearly always decide whether a document is short


def _wide_table() -> np.ndarray:
    """Return the table from a code below _FIRST_ABOVE to itself, to a space, or to _DELETED."""
    table = np.arange(_FIRST_ABOVE + 1, dtype=np.uint32)
    table[np.frombuffer(_PUNCTUATION, np.uint8)] = _DELETED
    table[list(_ASCII_SPACES) + list(_WIDE_SPACES)] = _SPACE
    return table


_WIDE_TABLE = _wide_table()


def normalized(text: str) -> np.ndarray:
    """Return the character codes of the normalised text, in the smallest unsigned type that holds them."""
    return np.concatenate([_NOTHING, *normalized_pieces(text)])


def normalized_pieces(text: str) -> Iterator[np.ndarray]:
    """Yield the character codes of the normalised text in pieces, so that memory does not grow with it."""
    has_begun = is_space_due = False  # a space is yielded only when another character follows
    for start, end in _slices(text):
        codes = _codes(text[start:end])
        if is_space_due:
            codes = np.concatenate([_ONE_SPACE, codes])
        is_space = codes == _SPACE
        keep = ~is_space
        keep[1:] |= ~is_space[:-1]
        keep[:1] |= has_begun
        codes = codes[keep]
        is_space_due = bool(len(codes) and codes[-1] == _SPACE)
        codes = codes[: len(codes) - is_space_due]
        if len(codes):
            has_begun = True
            yield codes


def _slices(text: str) -> Iterator[tuple[int, int]]:
    """Yield slices of a long text that end after a space: the lower case of a letter can depend on its neighbours."""
    start = 0
    while len(text) - start > _SLICE:
        end = text.rfind(" ", start, start + _SLICE) + 1 or start + _SLICE
        yield start, end
        start = end
    yield start, len(text)


def _codes(text: str) -> np.ndarray:
    """Return the character codes in lower case, white space as spaces, punctuation deleted."""
    if text.isascii():
        return np.frombuffer(text.encode().translate(_TABLE, _PUNCTUATION), np.uint8)
    raw = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), np.uint32)
    codes = np.where(raw < _FIRST_ABOVE, _WIDE_TABLE[np.minimum(raw, _FIRST_ABOVE)], raw)
    codes = codes[codes != _DELETED]
    return codes.astype(np.uint16) if len(codes) and codes.max() < 1 << 16 else codes


def is_shorter(text: str, *, than: int) -> bool:
    """Return whether the normalised text has fewer characters; most longer texts are decided by their beginning."""
    begin = len(normalized(text[:_BEGINNING]))
    return begin < than and (len(text) <= _BEGINNING or sum(map(len, normalized_pieces(text))) < than)
