"""MinHash signatures of the character 13-grams of a text, in NumPy, by many permutations or by one.

Each number of two signatures is equal with a probability of J, the Jaccard similarity of the two sets of 13-grams.
One-permutation MinHash (Li, Owen, Zhang 2012) hashes each gram once: the top bits choose a bin, and the smallest hash
of each bin is the number. The other kind permutes all hashes once for each number, as datasketch does.
Memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

GRAM = 13
_CHUNK = 1 << 17  # grams hashed at a time
_PERMUTED = 1 << 10  # grams permuted at a time, so that the products stay in the cache
_EMPTY = np.uint32(0xFFFFFFFF)
_MULTIPLIER = np.uint32(2654435761)
_BASE = 16777619


def one_permutation(pieces: Iterable[np.ndarray], *, bins: int) -> np.ndarray:
    """Return the one-permutation MinHash of character codes in pieces, uint32 [bins]; `bins` is a power of two."""
    shift = np.uint32(32 - bins.bit_length() + 1)
    edges = np.arange(bins, dtype=np.uint32) << shift
    smallest = np.full(bins, _EMPTY)
    for hashes in _gram_hashes(pieces):
        hashes.sort()
        first = np.append(hashes, _EMPTY)[np.searchsorted(hashes, edges)]
        first[first >> shift != np.arange(bins)] = _EMPTY  # it belongs to a later bin
        np.minimum(smallest, first, out=smallest)
    return _densify(smallest, smallest == _EMPTY)


def many_permutations(pieces: Iterable[np.ndarray], *, permutations: int) -> np.ndarray:
    """Return the MinHash of character codes given in pieces, uint32 [permutations]."""
    factors, offsets = _permutations(permutations)
    smallest = np.full((permutations, 1), _EMPTY)
    buffer = np.empty((permutations, _PERMUTED), np.uint32)
    for hashes in _gram_hashes(pieces):
        for start in range(0, len(hashes), _PERMUTED):
            chunk = hashes[start : start + _PERMUTED]
            permuted = buffer[:, : len(chunk)]
            np.multiply(factors, chunk, out=permuted)
            permuted += offsets
            np.minimum(smallest, permuted.min(axis=1, keepdims=True), out=smallest)
    return smallest[:, 0]


def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return odd factors and offsets, uint32 [count, 1], that do not depend on the machine or on NumPy's version."""
    stream = hashlib.shake_128(b"btlm_jax minhash permutations").digest(8 * count)
    factors, offsets = np.frombuffer(stream, "<u4").reshape(2, count, 1).astype(np.uint32)
    return factors | np.uint32(1), offsets


def _gram_hashes(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the hashes of all 13-grams, uint32, in chunks; a shorter text is padded to one gram."""
    last, is_short = np.empty(0, np.uint8), True
    for codes in pieces:
        codes = np.concatenate([last, codes]) if len(last) else codes
        for start in range(0, len(codes) - GRAM + 1, _CHUNK):
            is_short = False
            yield _hash_grams(codes[start : start + _CHUNK + GRAM - 1])
        last = codes[1 - GRAM :]  # starts the grams that end in the next piece
    if is_short:
        yield _hash_grams(np.pad(last, (0, GRAM - len(last))))


def _hash_grams(codes: np.ndarray) -> np.ndarray:
    """Return a hash of every 13-gram: polynomial hashes of length 1, 2, 4, 8 by doubling, then 8 + 4 + 1, mixed."""
    one = (codes.astype(np.uint32) + np.uint32(1)) * np.uint32(0x9E3779B1)
    two = _join(one, one, left_length=1, right_length=1)
    four = _join(two, two, left_length=2, right_length=2)
    eight = _join(four, four, left_length=4, right_length=4)
    twelve = _join(eight, four, left_length=8, right_length=4)
    mixed = _join(twelve, one, left_length=12, right_length=1)
    mixed ^= mixed >> np.uint32(15)
    mixed *= _MULTIPLIER
    mixed ^= mixed >> np.uint32(13)
    return mixed


def _join(left: np.ndarray, right: np.ndarray, *, left_length: int, right_length: int) -> np.ndarray:
    length = len(right) - left_length
    joined = left[:length] * np.uint32(pow(_BASE, right_length, 1 << 32))
    joined += right[left_length:]
    return joined


def _densify(bins: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Fill each empty bin by the next full one to its right plus a multiple of the distance (Shrivastava, Li 2014)."""
    if not empty.any():
        return bins
    full = np.flatnonzero(~empty)
    index = np.arange(len(bins))
    position = np.searchsorted(full, index)
    source = full[position % len(full)]
    distance = (source - index) % len(bins)
    return bins[source] + distance.astype(np.uint32) * _MULTIPLIER
