"""The process in which a tokenizer is trained: `python -m btlm_jax.tokenizers.train_process KIND VOCAB_SIZE`.

Reads pickled texts from standard input to its end; writes the pickled contents of the tokenizer's file to standard
output, or a text that says why there is none.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from typing import BinaryIO

from btlm_jax.tokenizers import byte_level
from btlm_jax.tokenizers.sentencepiece_bpe import train_sentencepiece


def main() -> None:
    """Train on standard input."""
    kind, vocab_size = sys.argv[1], int(sys.argv[2])
    train = byte_level.train_byte_level if kind == byte_level.KIND else train_sentencepiece
    try:
        result = train(_texts(sys.stdin.buffer), vocab_size=vocab_size)
    except ValueError as error:
        result = str(error)
    pickle.dump(result, sys.stdout.buffer)


def _texts(stream: BinaryIO) -> Iterator[str]:
    while True:
        try:
            yield pickle.load(stream)
        except EOFError:
            return


if __name__ == "__main__":
    main()
