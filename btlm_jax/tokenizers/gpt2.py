"""GPT-2's tokenizer through tiktoken: the ids of byte_level.py, several times faster. The only importer of tiktoken."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import tiktoken
from tokenizers import pre_tokenizers

from btlm_jax.tokenizers.byte_level import GPT2_BOUNDARY, ByteLevelTokenizer, long_runs
from btlm_jax.tokenizers.tokenizer import Tokenizer

# https://github.com/openai/gpt-2/blob/master/src/encoder.py
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

MAX_RUN, OVERLAP = 100_000, 2_000  # characters of one class that are encoded at once, and twice


class FastGpt2Tokenizer:
    """A ByteLevelTokenizer of GPT-2's kind that encodes with tiktoken."""

    boundary = GPT2_BOUNDARY

    def __init__(self, tokenizer: ByteLevelTokenizer):
        """Use the vocabulary of a tokenizer for which `tiktoken_gives_same_ids`."""
        self._tokenizer = tokenizer
        self.kind, self.stored_file, self.contents = tokenizer.kind, tokenizer.stored_file, tokenizer.contents
        self.eos_id, self.vocab_size = tokenizer.eos_id, tokenizer.vocab_size
        byte_of = _byte_of_character()
        self._num_bytes = np.array([len(token) for token in tokenizer.tokens])
        eos = tokenizer.added_tokens[tokenizer.eos_id]
        # Where a text is divided by the name of the end of text, which takes nothing of what is around it.
        is_plain = not (eos.lstrip or eos.rstrip or eos.single_word or eos.normalized)
        self._eos_name = re.compile(f"({re.escape(tokenizer.eos_token)})") if is_plain else None
        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=_PATTERN,
            mergeable_ranks={
                bytes(byte_of[character] for character in token): number
                for number, token in enumerate(tokenizer.tokens)
                if number != tokenizer.eos_id
            },
            special_tokens={tokenizer.eos_token: tokenizer.eos_id},
        )

    @property
    def spare_token(self) -> str:
        """The end of text."""
        return self._tokenizer.spare_token

    def token_id(self, token: str) -> int | None:
        """Return the id of a token in the visible characters that stand for bytes, or None."""
        return self._tokenizer.token_id(token)

    def token(self, number: int) -> str:
        """Return the token of an id in the visible characters that stand for bytes."""
        return self._tokenizer.token(number)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        tiktoken's regular expressions give up on a million spaces in a row, so a long run of characters of one class is
        encoded in overlapping parts. A sequence of tokens is what BPE makes of its text if and only if every two
        neighbours are what it makes of theirs (https://github.com/github/rust-gems, crates/bpe). So a part begins at a
        boundary between tokens of the part before, and is joined to it where both have a boundary between such
        neighbours.
        """
        ids, part, start, stop = [], [], 0, 0  # `part` are the ids of what ends at `stop`, from the last joint on
        for begin, end in long_runs(text, MAX_RUN):
            for cut in range(begin + MAX_RUN, end - OVERLAP, MAX_RUN):
                part = self._join(ids, part, text[start : cut + OVERLAP], num_bytes=len(text[start:stop].encode()))
                start, stop = cut + self._first_boundary(part, text[cut : cut + OVERLAP]), cut + OVERLAP
        return ids + self._join(ids, part, text[start:], num_bytes=len(text[start:stop].encode()))

    def _first_boundary(self, part: list[int], end: str) -> int:
        """Return the first place in `end`, with which the text of `part` ends, at which a token of `part` begins."""
        data = end.encode()
        places = len(data) - np.cumsum(self._num_bytes[part[: -len(data) - 1 : -1]])
        is_character = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
        return len(data[: min(place for place in places if place >= 0 and is_character[place])].decode())

    def _join(self, ids: list[int], part: list[int], text: str, *, num_bytes: int) -> list[int]:
        """Append to `ids` those of `part` up to a joint in its last `num_bytes`, with which `text` begins.

        Returns the ids of `text` from there on.
        """
        own = self._encoding.encode_ordinary(text)
        if not part:
            return own
        own_ends = np.append(0, np.cumsum(self._num_bytes[own[:num_bytes]]))
        last = part[-num_bytes - 1 :]  # every token has a byte
        part_ends = num_bytes - np.append(np.cumsum(self._num_bytes[last][:0:-1])[::-1], 0)
        for end in np.intersect1d(own_ends, part_ends):
            num_before = len(part) - len(last) + int(np.searchsorted(part_ends, end)) + 1
            num_own = int(np.searchsorted(own_ends, end))
            neighbours = [part[num_before - 1], *own[num_own : num_own + 1]]
            # The public methods take text, and one token need not be whole characters.
            if self._encoding._encode_single_piece(self._encoding.decode_bytes(neighbours)) == neighbours:
                ids += part[:num_before]
                return own[num_own:]
        raise ValueError(f"more than {MAX_RUN:,} characters in a row cannot be encoded; they begin {text[:40]!r}")

    def encode_exactly(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text in which the name of a special token stands for its id."""
        if self._eos_name is None:
            return self._tokenizer.encode_prompt(text)
        parts = enumerate(self._eos_name.split(text))
        return [token for number, part in parts for token in ([self.eos_id] if number % 2 else self.encode(part))]

    @property
    def special_tokens(self) -> dict[str, int]:
        """The end of text, by its name."""
        return self._tokenizer.special_tokens

    def encode_prompt_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `encode_prompt`, and of each the (begin, end) of its characters in the text."""
        if self._eos_name is None:
            return self._tokenizer.encode_prompt_with_offsets(text)
        ids, offsets, begin = [], [], 0
        for number, part in enumerate(self._eos_name.split(text)):
            if number % 2:
                ids.append(self.eos_id)
                offsets.append((begin, begin + len(part)))
            elif part:
                own = self.encode(part)
                ends = np.cumsum(self._num_bytes[own])
                data = np.frombuffer(part.encode(), np.uint8)
                character_of = begin + np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte
                firsts, lasts = character_of[ends - self._num_bytes[own]], character_of[ends - 1] + 1
                ids += own
                offsets += zip(firsts.tolist(), lasts.tolist(), strict=True)
            begin += len(part)
        return ids, offsets

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """Return the ids of each text; the same for any number of threads."""
        if num_threads == 1 or any(len(text) > MAX_RUN for text in texts):
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special ids give nothing."""
        return self._tokenizer.decode(ids)


def fastest_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer through tiktoken if that gives the same ids, else as it is."""
    if isinstance(tokenizer, ByteLevelTokenizer) and tiktoken_gives_same_ids(tokenizer):
        return FastGpt2Tokenizer(tokenizer)
    return tokenizer


def tiktoken_gives_same_ids(tokenizer: ByteLevelTokenizer) -> bool:
    """Return whether tiktoken, which merges the pair whose token has the smallest id, gives the same ids.

    It does if GPT-2's pattern splits the text, and the merges produce the tokens in the order of their ids, each by one
    merge. (tiktoken would also produce a token that no merge does.)
    """
    if not tokenizer.has_gpt2_rules:
        return False
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = [token for token in tokenizer.tokens if token not in alphabet and token != tokenizer.eos_token]
    return ["".join(pair) for pair in tokenizer.merges] == others


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each visible character stands for: printable Latin-1 for itself, others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}
