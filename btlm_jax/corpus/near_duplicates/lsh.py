"""Near-duplicates by locality-sensitive hashing: signatures, keys of their bands, pairs, clusters, survivors.

Works on arrays. A document is a number; documents are numbered in the order of the input files' names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from btlm_jax.corpus.near_duplicates.minhash import many_permutations, one_permutation

MAX_ROUNDS = 32  # of bucket_pairs
MIX_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, for multiplicative hashing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Parameters of the search: each of `bands` keys is a hash of `rows` numbers of the signature."""

    name: str
    signature: Callable[[Iterable[np.ndarray]], np.ndarray]  # takes character codes in pieces
    bands: int
    rows: int
    threshold: float  # least share of equal numbers in a pair; 0: every pair that shares a key


def _slimpajama_signature(pieces: Iterable[np.ndarray]) -> np.ndarray:
    return many_permutations(pieces, permutations=9 * 13)  # the 117 of the published 128 that its bands use


def _strict_signature(pieces: Iterable[np.ndarray]) -> np.ndarray:
    return one_permutation(pieces, bins=256)


# As published: https://github.com/Cerebras/modelzoo, data_preparation/nlp/slimpajama/dedup
SLIMPAJAMA = Preset(name="slimpajama", signature=_slimpajama_signature, bands=9, rows=13, threshold=0.0)
STRICT = Preset(name="strict", signature=_strict_signature, bands=32, rows=8, threshold=0.75)
PRESETS = {preset.name: preset for preset in (SLIMPAJAMA, STRICT)}


def band_keys(signatures: np.ndarray, preset: Preset) -> np.ndarray:
    """Return the key of every band, uint64 [bands, documents], of signatures [documents, numbers]."""
    rows = signatures.reshape(len(signatures), preset.bands, preset.rows)
    keys = np.zeros((preset.bands, len(signatures)), np.uint64)
    for row in range(preset.rows):
        keys ^= rows[:, :, row].T
        keys *= MIX_FACTOR
        keys ^= keys >> np.uint64(32)
    return keys


def bucket_pairs(
    keys: np.ndarray, documents: np.ndarray, *, agree: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the pairs of documents that share a key and agree, int64 [pairs, 2].

    The first document of each bucket (the documents that share a key) is compared with the others; those that do not
    agree with it form the bucket of the next round. MAX_ROUNDS bounds the comparisons in a large bucket.
    """
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order].astype(np.int64)
    pairs = [np.empty((0, 2), np.int64)]
    for _ in range(MAX_ROUNDS):
        if not len(keys):
            break
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        first = np.repeat(documents[starts], np.diff(np.append(starts, len(keys))))
        others = np.flatnonzero(first != documents)
        agrees = agree(first[others], documents[others])
        pairs.append(np.stack([first[others], documents[others]], axis=1)[agrees])
        remaining = others[~agrees]
        keys, documents = keys[remaining], documents[remaining]
    return np.concatenate(pairs)


def all_agree(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Accept every pair that shares a key."""
    return np.ones(len(first), bool)


class Clusters:
    """Connected components, by union-find; each document's parent has a smaller number, or is itself at a root."""

    def __init__(self, num_documents: int):
        self._parent = np.arange(num_documents)

    def join(self, pairs: np.ndarray) -> None:
        """Merge the clusters of each pair of an array [pairs, 2]; the result does not depend on their order."""
        while len(pairs):
            roots = self.roots(pairs)
            low, high = roots.min(axis=1), roots.max(axis=1)
            is_apart = low != high
            np.minimum.at(self._parent, high[is_apart], low[is_apart])
            pairs = roots[is_apart]  # if two pairs give one root different parents, the next round merges these

    def roots(self, documents: np.ndarray) -> np.ndarray:
        """Return the smallest number of each document's cluster."""
        roots = self._parent[documents]
        while ((above := self._parent[roots]) != roots).any():
            roots = above
        self._parent[documents] = roots
        return roots


def survivors(roots: np.ndarray, *, lengths: np.ndarray, ranks: Sequence | np.ndarray) -> np.ndarray:
    """Return which documents are kept, bool [documents]: of each cluster the longest, of equals the smallest rank."""
    order = np.lexsort((ranks, -lengths.astype(np.int64), roots))
    is_first = np.append(True, np.diff(roots[order]) != 0)[: len(roots)]
    is_kept = np.zeros(len(roots), bool)
    is_kept[order[is_first]] = True
    return is_kept


def verified_survivors(
    roots: np.ndarray,
    *,
    lengths: np.ndarray,
    ranks: Sequence | np.ndarray,
    agree: Callable[[np.ndarray, np.ndarray], np.ndarray],
    pairs_among: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return which documents are kept, bool [documents]: each that is dropped agrees with one that is kept.

    A cluster is a chain of pairs, whose ends need not be alike. So its best document (as of `survivors`) is kept and
    compared with all others; those that agree are dropped, and the best of the others is the next to be kept. After
    MAX_ROUNDS what remains is divided anew into clusters, by the pairs that `pairs_among` finds among these documents.
    """
    lengths, ranks = -lengths.astype(np.int64), np.asarray(ranks)
    is_kept = np.ones(len(roots), bool)
    order, groups = np.arange(len(roots)), roots
    while len(order):
        best_first = np.lexsort((ranks[order], lengths[order], groups))
        order, groups = order[best_first], groups[best_first]
        for _ in range(MAX_ROUNDS):
            starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1])[: len(order)])
            first = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
            others = np.flatnonzero(first != order)
            agrees = agree(first[others], order[others])
            is_kept[order[others[agrees]]] = False
            order, groups = order[others[~agrees]], groups[others[~agrees]]
        if len(order):
            order = np.sort(order)
            clusters = Clusters(len(order))
            clusters.join(np.searchsorted(order, pairs_among(order)))
            groups = clusters.roots(np.arange(len(order)))
    return is_kept
