"""Text for a terminal."""

from __future__ import annotations

PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no whole character


def printable(text: str) -> str:
    """Return the text with control characters replaced: a young model makes them, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else PARTIAL for c in text)
