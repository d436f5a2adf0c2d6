"""GPT-2's tokenizer through tiktoken: the ids of byte_level.py, several times faster. The only importer of tiktoken."""

from __future__ import annotations

from collections.abc import Sequence

import tiktoken
from tokenizers import pre_tokenizers

from btlm_jax.tokenizers.boundaries import GPT2_BOUNDARY
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.tokenizer import Tokenizer

# https://github.com/openai/gpt-2/blob/master/src/encoder.py
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class FastGpt2Tokenizer:
    """A ByteLevelTokenizer of GPT-2's kind that encodes with tiktoken."""

    boundary = GPT2_BOUNDARY

    def __init__(self, tokenizer: ByteLevelTokenizer):
        """Take over the vocabulary of a tokenizer that `can_be_fast`."""
        self._tokenizer = tokenizer
        self.kind, self.stored_file, self.contents = tokenizer.kind, tokenizer.stored_file, tokenizer.contents
        self.eos_id, self.vocab_size = tokenizer.eos_id, tokenizer.vocab_size
        byte_of = _byte_of_character()
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
        """Return the ids of a text."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """Return the ids of each text; the same for any number of threads."""
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special ids give nothing."""
        return self._tokenizer.decode(ids)


def fastest(tokenizer: Tokenizer) -> Tokenizer:
    """Return the same tokenizer, through tiktoken where that gives the same ids."""
    is_fast = isinstance(tokenizer, ByteLevelTokenizer) and can_be_fast(tokenizer)
    return FastGpt2Tokenizer(tokenizer) if is_fast else tokenizer


def can_be_fast(tokenizer: ByteLevelTokenizer) -> bool:
    """Return whether tiktoken, which merges what has the smallest id, merges in the order of the merges.

    It is so when GPT-2's pattern cuts the text and the merges make their tokens in the order of the ids, each token by
    one merge only; a token that no merge makes, tiktoken would make all the same.
    """
    if not tokenizer.is_gpt2:
        return False
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = [token for token in tokenizer.tokens if token not in alphabet and token != tokenizer.eos_token]
    return ["".join(pair) for pair in tokenizer.merges] == others


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each visible character stands for; printable Latin-1 stands for itself."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
