"""Deduplication: repeated paragraphs, then exact and near-duplicate documents.

Near-duplicates are found by MinHash LSH over character 13-grams, SlimPajama's unit, with one-permutation hashing
(Li, Owen, Zhang 2012) in place of many hash functions: one 32-bit hash a gram, its top 8 bits choose one of 256 bins,
the smallest hash of each bin is kept. 32 bands of 8 bins propose pairs; a pair counts when at least 0.8 of all bins
agree, which estimates the Jaccard similarity.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from btlm_jax.corpus.installed import Document

GRAM = 13
BINS = 256
BANDS = 32
THRESHOLD = 0.8
MIN_BLOCK_CHARACTERS = 60  # shorter paragraphs may repeat: "Returns:", "Example"
MIN_DOCUMENT_CHARACTERS = 200  # SlimPajama's rule

_MULTIPLIER = np.uint32(2654435761)
_SPACE = re.compile(r"\s+")


def without_repeated_blocks(documents: Iterable[Document], skipped: Counter) -> list[Document]:
    """Keep each paragraph in the first document that has it, which drops licence headers; drop what is then short."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        blocks = []
        for block in document.blocks:
            if len(block) >= MIN_BLOCK_CHARACTERS:
                digest = hashlib.blake2b(_SPACE.sub(" ", block).encode("utf-8", "replace"), digest_size=12).digest()
                if digest in seen:
                    skipped["repeated paragraphs"] += 1
                    continue
                seen.add(digest)
            blocks.append(block)
        rest = Document(id=document.id, source=document.source, blocks=tuple(blocks))
        if len(rest.text) < MIN_DOCUMENT_CHARACTERS:
            skipped["short documents"] += 1
        else:
            kept.append(rest)
    return kept


def without_duplicates(documents: list[Document], skipped: Counter) -> list[Document]:
    """Return one document of each cluster of near-duplicates: the longest, by id among equals; order is kept."""
    signatures = np.stack([signature(document.text) for document in documents]) if documents else np.empty((0, BINS))
    parent = list(range(len(documents)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for first, second in _candidates(signatures):
        if np.mean(signatures[first] == signatures[second]) >= THRESHOLD:
            parent[root(second)] = root(first)
    best: dict[int, int] = {}
    for index, document in enumerate(documents):
        cluster = root(index)
        other = best.setdefault(cluster, index)
        if (-len(document.text), document.id) < (-len(documents[other].text), documents[other].id):
            best[cluster] = index
    kept = sorted(best.values())
    skipped["near-duplicate documents"] += len(documents) - len(kept)
    return [documents[index] for index in kept]


def signature(text: str) -> np.ndarray:
    """Return the one-permutation MinHash of the text's character 13-grams, uint32 [256]."""
    data = np.frombuffer(_SPACE.sub(" ", text.lower()).encode("utf-8", "replace"), np.uint8)
    if len(data) < GRAM:
        data = np.pad(data, (0, GRAM - len(data)))
    hashes = np.sort(_gram_hashes(data))
    shift = np.uint32(32 - BINS.bit_length() + 1)
    first = np.searchsorted(hashes, np.arange(BINS, dtype=np.uint32) << shift)
    padded = np.append(hashes, np.uint32(0))
    bins = padded[first]
    empty = np.append(hashes >> shift, BINS)[first] != np.arange(BINS)
    return _densify(bins, empty)


def _gram_hashes(data: np.ndarray) -> np.ndarray:
    """Hash every run of 13 bytes: polynomial hashes of length 1, 2, 4, 8 by doubling, then 8 + 4 + 1, then mixed."""
    base = np.uint32(16777619)
    one = (data.astype(np.uint32) + np.uint32(1)) * np.uint32(0x9E3779B1)

    def join(left: np.ndarray, right: np.ndarray, *, left_length: int, right_length: int) -> np.ndarray:
        factor = np.uint32(pow(int(base), right_length, 1 << 32))
        length = len(right) - left_length
        return left[:length] * factor + right[left_length:]

    two = join(one, one, left_length=1, right_length=1)
    four = join(two, two, left_length=2, right_length=2)
    eight = join(four, four, left_length=4, right_length=4)
    twelve = join(eight, four, left_length=8, right_length=4)
    mixed = join(twelve, one, left_length=12, right_length=1)
    mixed ^= mixed >> np.uint32(15)
    mixed *= _MULTIPLIER
    return mixed ^ (mixed >> np.uint32(13))


def _densify(bins: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Fill each empty bin from the next full one to its right, marked by the distance (Shrivastava and Li 2014)."""
    if not empty.any():
        return bins
    full = np.flatnonzero(~empty)
    index = np.arange(len(bins))
    position = np.searchsorted(full, index)
    source = full[position % len(full)]
    distance = (source - index) % len(bins)
    return bins[source] + distance.astype(np.uint32) * _MULTIPLIER


def _candidates(signatures: np.ndarray) -> set[tuple[int, int]]:
    """Return pairs that agree on every bin of some band: each document with the first of its bucket."""
    pairs: set[tuple[int, int]] = set()
    rows = BINS // BANDS
    for band in range(BANDS):
        keys = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        view = keys.view(np.dtype((np.void, keys.dtype.itemsize * rows))).ravel()
        _, first, inverse = np.unique(view, return_index=True, return_inverse=True)
        firsts = first[inverse.ravel()]
        others = np.flatnonzero(firsts != np.arange(len(firsts)))
        pairs.update(zip(firsts[others].tolist(), others.tolist(), strict=True))
    return pairs
