"""GPT-2's tokenizer through tiktoken: the ids of byte_level.py, several times faster. The only importer of tiktoken."""

from __future__ import annotations

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

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        tiktoken's regular expressions give up on a million spaces in a row, so a long run of characters of one class is
        encoded in overlapping parts. A sequence of tokens is what BPE makes of its text if and only if every two
        neighbours are what it makes of theirs (https://github.com/github/rust-gems, crates/bpe), so two parts are
        joined at a boundary between tokens of both, if the tokens beside it are such neighbours.
        """
        ids: list[int] = []
        part, start = [], 0
        for begin, end in long_runs(text, MAX_RUN):
            for cut in range(begin + MAX_RUN, end - OVERLAP, MAX_RUN):
                part = self._join(ids, part, text[start : cut + OVERLAP], overlap=text[start : start + OVERLAP])
                start = cut
        return ids + self._join(ids, part, text[start:], overlap=text[start : start + OVERLAP])

    def _join(self, ids: list[int], part: list[int], text: str, *, overlap: str) -> list[int]:
        """Append to `ids` those of `part` up to a boundary in `overlap`; return those of `text` from there on.

        `part` has the ids of what ends with `overlap`, and `text` begins with that.
        """
        own = self._encoding.encode_ordinary(text)
        if not part:
            return own
        num_bytes = len(overlap.encode())
        own_ends = np.cumsum(self._num_bytes[own])
        part_ends = num_bytes - np.append(np.cumsum(self._num_bytes[part][:0:-1])[::-1], 0)
        for end in np.intersect1d(own_ends, part_ends)[::-1]:
            if not 0 < end <= num_bytes:
                continue
            num_before, num_own = (int(np.searchsorted(ends, end)) + 1 for ends in (part_ends, own_ends))
            neighbours = [part[num_before - 1], *own[num_own : num_own + 1]]
            if self._encoding.encode_ordinary(self._encoding.decode(neighbours)) == neighbours:
                ids += part[:num_before]
                return own[num_own:]
        raise ValueError(
            f"more than {MAX_RUN:,} characters without the end of a word cannot be encoded; they begin {overlap[:40]!r}"
        )

    def encode_exactly(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text in which the name of a special token stands for its id."""
        return self._tokenizer.encode_prompt(text)

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
