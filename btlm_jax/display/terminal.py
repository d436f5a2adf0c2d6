"""Text for a terminal."""

from __future__ import annotations

PARTIAL = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are not a complete character


def printable(text: str) -> str:
    """Return the text with control characters replaced, as generated ones would act on the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else PARTIAL for c in text)
