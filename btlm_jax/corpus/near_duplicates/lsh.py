"""Near-duplicates by locality-sensitive hashing: signatures, keys of their bands, pairs, clusters, survivors.

Works on arrays alone. A document is a number; numbers follow the names of the input files, not the order of arrival.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from btlm_jax.corpus.near_duplicates.minhash import many_permutations, one_permutation

MAX_ROUNDS = 32  # of comparing a bucket with one of its documents
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """How near-duplicates are found: each of `bands` keys is made of `rows` numbers of the signature."""

    name: str
    signature: Callable[[Iterable[np.ndarray]], np.ndarray]  # of pieces of an array of characters
    bands: int
    rows: int
    threshold: float  # share of equal numbers that makes a pair; 0: whatever shares a key


def _slimpajama_signature(pieces: Iterable[np.ndarray]) -> np.ndarray:
    return many_permutations(pieces, permutations=9 * 13)  # of the published 128, the 117 that its bands use


def _strict_signature(pieces: Iterable[np.ndarray]) -> np.ndarray:
    return one_permutation(pieces, bins=256)


# As published: https://github.com/Cerebras/modelzoo, data_preparation/nlp/slimpajama/dedup
SLIMPAJAMA = Preset(name="slimpajama", signature=_slimpajama_signature, bands=9, rows=13, threshold=0.0)
STRICT = Preset(name="strict", signature=_strict_signature, bands=32, rows=8, threshold=0.75)
PRESETS = {preset.name: preset for preset in (SLIMPAJAMA, STRICT)}


def band_keys(signatures: np.ndarray, preset: Preset) -> np.ndarray:
    """Return the key of every band of each signature, uint64 [bands, documents]."""
    rows = signatures.reshape(len(signatures), preset.bands, preset.rows)
    keys = np.zeros((preset.bands, len(signatures)), np.uint64)
    for row in range(preset.rows):
        keys ^= rows[:, :, row].T
        keys *= _ODD
        keys ^= keys >> np.uint64(32)
    return keys


def bucket_pairs(
    keys: np.ndarray, documents: np.ndarray, *, agree: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the pairs of documents that share a key and agree, int64 [pairs, 2].

    A bucket's first document is compared with all the others; those that differ from it form the next round's bucket.
    """
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order].astype(np.int64)
    found = [np.empty((0, 2), np.int64)]
    for _ in range(MAX_ROUNDS):
        if not len(keys):
            break
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        first = np.repeat(documents[starts], np.diff(np.append(starts, len(keys))))
        others = np.flatnonzero(first != documents)
        good = agree(first[others], documents[others])
        found.append(np.stack([first[others], documents[others]], axis=1)[good])
        rest = others[~good]
        keys, documents = keys[rest], documents[rest]
    return np.concatenate(found)


def all_agree(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Accept every pair: what shares a key is a duplicate."""
    return np.ones(len(first), bool)


class Clusters:
    """Connected components, pair by pair; each document's parent is a smaller number, or itself at the root."""

    def __init__(self, num_documents: int):
        self._parent = np.arange(num_documents)

    def join(self, pairs: np.ndarray) -> None:
        """Make each pair one cluster; the result does not depend on the order."""
        while len(pairs):
            roots = self.roots(pairs)
            low, high = roots.min(axis=1), roots.max(axis=1)
            apart = low != high
            np.minimum.at(self._parent, high[apart], low[apart])
            pairs = roots[apart]  # of two that hang the same root elsewhere, one is left for the next round

    def roots(self, documents: np.ndarray) -> np.ndarray:
        """Return the smallest number of each document's cluster."""
        roots = self._parent[documents]
        while ((above := self._parent[roots]) != roots).any():
            roots = above
        self._parent[documents] = roots
        return roots


def survivors(roots: np.ndarray, *, lengths: np.ndarray, ranks: Sequence | np.ndarray) -> np.ndarray:
    """Return which documents stay, bool: of each cluster the longest; among equals the smallest rank."""
    order = np.lexsort((ranks, -lengths.astype(np.int64), roots))
    is_first = np.append(True, np.diff(roots[order]) != 0)[: len(roots)]
    kept = np.zeros(len(roots), bool)
    kept[order[is_first]] = True
    return kept
