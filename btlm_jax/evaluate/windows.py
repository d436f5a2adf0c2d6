"""Windows over texts that are longer than a model's context: every token is scored once."""

from __future__ import annotations

from collections.abc import Iterator

from btlm_jax.evaluate.documents import Document
from btlm_jax.evaluate.scorer import Row


def rolling_windows(num_targets: int, *, length: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first, end) of windows over tokens 0..num_targets, of which token 0 is only context.

    A window's row is tokens[begin : end], at most length + 1 of them, of which those from `first` on are scored. Every
    window but the first sees at least `overlap` tokens that an earlier one has scored, and as many more as fit. With
    overlap 1 these are the windows of lm-evaluation-harness (get_rolling_token_windows with context_len=1, then
    make_disjoint_window), where token 0 is its prefix token.

    Raises:
      ValueError: the overlap is not 1..length.
    """
    if not 1 <= overlap <= length:
        raise ValueError(f"overlap={overlap:,} is not possible in windows of {length:,} tokens; it must be 1 to that")
    end = min(length, num_targets)
    if end:
        yield 0, 1, end + 1
    while end < num_targets:
        first, end = end + 1, min(end + length - overlap + 1, num_targets)
        yield end - length, first, end + 1


def rows_of(document: Document, *, length: int, overlap: int) -> list[Row]:
    """Return the windows of a document as rows to score; together they score tokens[1:] in order."""
    return [
        Row(tokens=document.tokens[begin:end], first=first - begin)
        for begin, first, end in rolling_windows(len(document.tokens) - 1, length=length, overlap=overlap)
    ]
