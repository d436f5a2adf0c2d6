"""Ids to text as they come: never half a character, nothing of a stop string, no id decoded more than a few times.

Works for any tokenizer through its `decode`, so what comes out is what `decode` of all ids at once gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from btlm_jax.display.terminal import PARTIAL
from btlm_jax.tokenizers.tokenizer import Tokenizer

MOST_MISSING = 3  # a character has up to 4 bytes, so up to 3 may wait for the rest, each decoded to PARTIAL


class Detokenizer:
    """The text of ids that follow a prompt, in pieces that are final when they are given out.

    Equal to decode(prompt + ids) without decode(prompt): some tokenizers drop a space where a text begins, so ids after
    a prompt are decoded after an anchor, whose text is then cut off.
    """

    def __init__(self, tokenizer: Tokenizer, *, begins_text: bool):
        """Take whether nothing but control ids stands before the ids."""
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")
        self._anchor_text = tokenizer.decode(self._anchor)
        self._begins_text = begins_text
        self._tail: list[int] = []  # the ids whose text may not be final
        self._given = 0  # characters of the tail's text that were given out

    def push(self, token: int) -> str:
        """Take the next id; return the text that is now certain."""
        self._tail.append(token)
        text = self._decode(self._tail)
        certain = len(text) - min(MOST_MISSING, len(text) - len(text.rstrip(PARTIAL)))
        new, self._given = text[self._given : certain], max(self._given, certain)
        if certain == len(text):
            self._forget(len(self._tail), text)
        elif len(self._tail) > MOST_MISSING:
            self._forget_broken_characters(text)
        return new

    def finish(self) -> str:
        """Return the rest: bytes that no id will complete any more."""
        return self._decode(self._tail)[self._given :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids) if self._begins_text else self._decode_later(ids)

    def _decode_later(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._anchor, *ids])[len(self._anchor_text) :]

    def _forget(self, num_ids: int, text: str) -> None:
        """Drop the tail's first ids, whose text was given out; keep them while the whole text is still empty."""
        if text or not self._begins_text:
            self._begins_text = False
            self._tail = self._tail[num_ids:]
            self._given -= len(text)

    def _forget_broken_characters(self, text: str) -> None:
        """Cut a long tail where no character straddles: only there its parts' texts are the text of the whole.

        A straddling one is whole or impossible MOST_MISSING bytes later, and its halves decode to more characters.
        """
        cut = len(self._tail) - MOST_MISSING
        first, last = self._decode(self._tail[:cut]), self._tail[cut:]
        if (
            0 < len(first) <= self._given
            and first + self._decode_later(last) == text
            and all(self._decode_later([token]) for token in last)
        ):
            self._forget(cut, first)


class StopFinder:
    """Let text through up to the stop string that is complete first, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        """Take strings that are not empty."""
        self._stops = stops
        self._held = ""
        self.found = ""  # the stop string, once there is one

    def push(self, text: str) -> str:
        """Take more text; return what may be shown, which after a stop string is nothing."""
        if self.found:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            return text[:start]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back and turned out to be no stop string."""
        return "" if self.found else self._held


class GrowingText:
    """The text of a row's new tokens: `push` and `finish` return what may now be shown."""

    def __init__(self, tokenizer: Tokenizer, *, begins_text: bool, stops: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer, begins_text=begins_text)
        self._finder = StopFinder(stops)
        self.num_tokens = 0

    @property
    def stop(self) -> str:
        """The stop string that was found, or ""."""
        return self._finder.found

    def push(self, token: int) -> str:
        """Take the next id."""
        self.num_tokens += 1
        return self._finder.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """Say that no more ids come."""
        return self._finder.push(self._detokenizer.finish()) + self._finder.finish()


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of the text is a beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
