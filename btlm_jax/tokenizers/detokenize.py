"""Streaming detokenizer: text from ids as they are generated, without incomplete characters or parts of a stop string.

Uses only the tokenizer's `decode`, and gives the text that `decode` of all ids at once gives. Each id is decoded a
bounded number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

from btlm_jax.tokenizers.tokenizer import Tokenizer

PARTIAL = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are not a complete character
MAX_PENDING = 3  # bytes of an incomplete character (of up to 4 bytes), each decoded to PARTIAL


class Detokenizer:
    """The text of ids that follow a prompt, in pieces that are final when they are returned.

    The pieces together are decode(prompt + ids) without decode(prompt). Some tokenizers drop a space at the beginning
    of a text, so ids after a prompt are decoded together with an anchor in front, whose text is then removed.
    """

    def __init__(self, tokenizer: Tokenizer, *, begins_text: bool):
        """Begin; `begins_text` tells whether only control ids come before the ids."""
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")
        self._anchor_text = tokenizer.decode(self._anchor)
        self._begins_text = begins_text
        self._tail: list[int] = []  # the ids whose text may not be final
        self._num_returned = 0  # characters of the tail's text that have been returned

    def push(self, token: int) -> str:
        """Take the next id; return the text that has become final."""
        self._tail.append(token)
        text = self._decode(self._tail)
        num_final = len(text) - min(MAX_PENDING, len(text) - len(text.rstrip(PARTIAL)))
        new, self._num_returned = text[self._num_returned : num_final], max(self._num_returned, num_final)
        if num_final == len(text):
            self._forget(len(self._tail), text)
        elif len(self._tail) > MAX_PENDING:
            self._forget_broken_characters(text)
        return new

    def finish(self) -> str:
        """Return the remaining text: incomplete characters that no id will complete."""
        return self._decode(self._tail)[self._num_returned :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids) if self._begins_text else self._decode_later(ids)

    def _decode_later(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._anchor, *ids])[len(self._anchor_text) :]

    def _forget(self, num_ids: int, text: str) -> None:
        """Drop the tail's first ids, whose text has been returned; keep them while the whole text is still empty."""
        if text or not self._begins_text:
            self._begins_text = False
            self._tail = self._tail[num_ids:]
            self._num_returned -= len(text)

    def _forget_broken_characters(self, text: str) -> None:
        """Shorten a long tail, at a point that no character straddles: only there do the parts' texts make up the text.

        A straddling character is complete or invalid after MAX_PENDING more bytes, and its parts would decode to more
        characters than it.
        """
        cut = len(self._tail) - MAX_PENDING
        first, last = self._decode(self._tail[:cut]), self._tail[cut:]
        if (
            0 < len(first) <= self._num_returned
            and first + self._decode_later(last) == text
            and all(self._decode_later([token]) for token in last)
        ):
            self._forget(cut, first)


class StopFinder:
    """Pass text on up to the first complete stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        """Look for any of `stops`, none of which is empty."""
        self._stops = stops
        self._held = ""
        self.found = ""  # the stop string, once one is complete

    def push(self, text: str) -> str:
        """Take more text; return what is not part of a stop string: nothing once one was found."""
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
        """Return the text that was held back and is not part of a stop string."""
        return "" if self.found else self._held


class StreamDecoder:
    """The text of generated tokens; `push` and `finish` return what can be shown now.

    A stop string that is the name of a special token is found at its id, which has no text.
    """

    def __init__(self, tokenizer: Tokenizer, *, begins_text: bool, stops: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer, begins_text=begins_text)
        self._finder = StopFinder(stops)
        self._stop_names = stop_names(tokenizer, stops)
        self.num_tokens = 0

    @property
    def stop(self) -> str:
        """The stop string that was found, or ""."""
        return self._finder.found

    def push(self, token: int) -> str:
        """Take the next id."""
        self.num_tokens += 1
        if not self.stop and token in self._stop_names:
            rest = self.finish()
            self._finder.found = self._finder.found or self._stop_names[token]
            return rest
        return self._finder.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """End the text; return what was held back."""
        return self._finder.push(self._detokenizer.finish()) + self._finder.finish()


def stop_names(tokenizer: Tokenizer, stops: Sequence[str]) -> dict[int, str]:
    """Return the stop strings that are names of special tokens, which decode to nothing, by their ids."""
    special = tokenizer.special_tokens if stops else {}
    return {special[stop]: stop for stop in stops if stop in special}


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
