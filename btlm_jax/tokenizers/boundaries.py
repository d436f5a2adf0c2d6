"""Where a long text can be cut so that its pieces, encoded one by one, give the ids of the whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

# GPT-2's pattern begins a word at a space or newline that stands alone: no word reaches over it from before, and what
# comes before it ends as it would at the end of a text. What Python takes for white space, that pattern does, or more.
GPT2_BOUNDARY = re.compile(r"(?<=\S)[ \n](?=\S)")
NEWLINE_BOUNDARY = re.compile(r"\n")  # of SentencePiece models that have the newline as a symbol of its own
NO_BOUNDARY = re.compile(r"(?!)")
PIECE_CHARACTERS = 1 << 20


def pieces_of(text: str, boundary: re.Pattern) -> Iterator[str]:
    """Yield pieces of a text, each cut at the first boundary after PIECE_CHARACTERS; whole if there is none."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS and (found := boundary.search(text, start + PIECE_CHARACTERS)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]
