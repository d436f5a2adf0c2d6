"""How fast raw text is cleaned, signed and tokenized on one core, beside the published scripts of SlimPajama.

Command:  python benchmarks/corpus_speed.py [--text=FILE.jsonl] [--tokenizer=DIR]     (needs pip install datasketch)

Prints MB of UTF-8 a second of one core's time (not wall clock), the median of three rounds in which ours and the
published way take turns on the same documents; the slow published ones get a part of them. --text adds documents of
your own, --tokenizer a folder with GPT-2's vocab.json and merges.txt for the last rows. The published way is that of
https://github.com/Cerebras/modelzoo, data_preparation/nlp/slimpajama and hdf5_preprocessing: ftfy on whole documents
and a filter in pure Python; datasketch updated gram by gram; Hugging Face's tokenizer, windows cut from Python lists.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import string
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np

from btlm_jax.corpus.near_duplicates import MIN_CHARACTERS
from btlm_jax.corpus.near_duplicates.lsh import SLIMPAJAMA, STRICT
from btlm_jax.corpus.near_duplicates.normalize import is_shorter, normalized_pieces
from btlm_jax.corpus.pack import pack
from btlm_jax.corpus.stages.clean import fix_unicode
from btlm_jax.tokenizers.byte_level import read_byte_level
from btlm_jax.tokenizers.gpt2 import fastest_tokenizer

ROUNDS = 3
DOCUMENT_CHARACTERS = 10_000
SAMPLE_CHARACTERS = 8_000_000
BLOCK_LEN = 8192
_REMOVED = str.maketrans("", "", string.punctuation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="documents as lines of JSON with a text")
    parser.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt")
    arguments = parser.parse_args()
    corpora = {"Python source": python_source(), "1 kB pieces of it": python_source(size=1_000)[::10]}
    if arguments.text:
        texts = [json.loads(line)["text"] for line in arguments.text.read_text().splitlines()]
        corpora[arguments.text.name] = pieces("".join(texts), DOCUMENT_CHARACTERS)
    print(f"MB/s of one core; documents of {DOCUMENT_CHARACTERS:,} characters; median of {ROUNDS}")
    print(f"{'':<26} {'corpus':<22} {'ours':>8} {'published':>10} {'times':>7}")
    for name, documents in corpora.items():
        compare("clean and filter", name, documents, clean, published_clean, part=8)
        compare("signature, strict", name, documents, strict, published_signature, part=100)
        compare("signature, slimpajama", name, documents, slimpajama, published_signature, part=100)
        if arguments.tokenizer:
            slow = read_byte_level(arguments.tokenizer)
            fast = fastest_tokenizer(slow)
            compare(
                "tokenize and pack",
                name,
                documents,
                lambda texts, fast=fast: packed(texts, fast),
                lambda texts, slow=slow: published_packed(texts, slow),
                part=8,
            )


def python_source(*, size: int = DOCUMENT_CHARACTERS) -> list[str]:
    """Return the start of this installation's packages as documents of one size."""
    text, length = [], 0
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        text.append(path.read_text(errors="replace"))
        length += len(text[-1])
        if length > SAMPLE_CHARACTERS:
            break
    return pieces("".join(text), size)


def pieces(text: str, size: int) -> list[str]:
    """Cut a text into documents, up to SAMPLE_CHARACTERS."""
    return [text[start : start + size] for start in range(0, min(len(text), SAMPLE_CHARACTERS), size)]


def compare(what: str, corpus: str, documents: Sequence[str], ours: Callable, theirs: Callable, *, part: int) -> None:
    """Print the rates of both on the same documents, theirs on every part-th."""
    rates = [(rate(ours, documents), rate(theirs, documents[::part])) for _ in range(ROUNDS)]
    mine, published = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"{what:<26} {corpus:<22} {mine:>8.1f} {published:>10.2f} {mine / published:>7.0f}", flush=True)


def rate(work: Callable[[Sequence[str]], object], documents: Sequence[str]) -> float:
    """Return MB a second of this process's time."""
    size = sum(len(text.encode()) for text in documents)
    began = time.process_time()
    work(documents)
    return size / 1e6 / (time.process_time() - began)


def clean(texts: Sequence[str]) -> list[str]:
    """Return what clean keeps."""
    return [text for text in map(fix_unicode, texts) if not is_shorter(text, than=MIN_CHARACTERS)]


def published_clean(texts: Sequence[str]) -> list[str]:
    """Return the same by normalize_text.py and filter.py."""
    whole = [ftfy.fix_text(text, normalization="NFC") for text in texts]
    return [text for text in whole if len(published_normalization(text)) >= MIN_CHARACTERS]


def published_normalization(text: str) -> str:
    """Return what to_hash.py and filter.py compare."""
    return re.sub(r"\s+", " ", text.lower().translate(_REMOVED).strip())


def strict(texts: Sequence[str]) -> list[np.ndarray]:
    """Return the signatures of the preset strict."""
    return [STRICT.signature(normalized_pieces(text)) for text in texts]


def slimpajama(texts: Sequence[str]) -> list[np.ndarray]:
    """Return the signatures of the preset slimpajama."""
    return [SLIMPAJAMA.signature(normalized_pieces(text)) for text in texts]


def published_signature(texts: Sequence[str]) -> list:
    """Return to_hash.py's signatures, datasketch's MinHash: one update a gram."""
    import datasketch

    signatures = []
    for text in texts:
        normal = published_normalization(text)
        signature = datasketch.MinHash(num_perm=128)
        for gram in map("".join, zip(*(normal[start:] for start in range(13)), strict=False)):
            signature.update(gram.encode())
        signatures.append(signature)
    return signatures


def packed(texts: Sequence[str], tokenizer: object) -> list:
    """Return the blocks that tokenize writes."""
    ids = tokenizer.encode_batch(texts, num_threads=1)
    return list(pack(ids, block_len=BLOCK_LEN, eos_id=tokenizer.eos_id, dtype="uint16"))


def published_packed(texts: Sequence[str], tokenizer: object) -> list:
    """Return LMDataPreprocessor's windows: token, mask and label lists of one length."""
    windows, pending = [], []
    for text in texts:
        pending = pending + tokenizer.encode(text) + [tokenizer.eos_id]
        while len(pending) > BLOCK_LEN:
            window = pending[: BLOCK_LEN + 1]
            windows.append(np.array([window[:-1], [1] * BLOCK_LEN, window[1:]], np.int32))
            pending = pending[BLOCK_LEN:]
    return windows


if __name__ == "__main__":
    main()
