"""Signatures against exact Jaccard similarities, and pairs, clusters and survivors against slow oracles."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btlm_jax.corpus.near_duplicates import lsh, minhash
from btlm_jax.corpus.near_duplicates.lsh import (
    PRESETS,
    SLIMPAJAMA,
    STRICT,
    Clusters,
    all_agree,
    band_keys,
    bucket_pairs,
    survivors,
)
from btlm_jax.corpus.near_duplicates.minhash import GRAM, many_permutations, one_permutation

KERNELS = {
    "one": lambda codes: one_permutation([codes], bins=256),
    "many": lambda codes: many_permutations([codes], permutations=117),
}


def letters(seed: int, count: int, alphabet: int = 26) -> np.ndarray:
    return np.random.default_rng(seed).integers(97, 97 + alphabet, count).astype(np.uint32)


def edited(codes: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Replace the end, so that about 1 - share of the grams stay."""
    keep = int(len(codes) * (1 - share))
    return np.concatenate([codes[:keep], letters(seed, len(codes) - keep)])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    first, second = ({bytes(codes[i : i + GRAM]) for i in range(len(codes) - GRAM + 1)} for codes in (a, b))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.3])
def test_equal_numbers_estimate_the_jaccard_similarity(kernel, share):
    errors = []
    for seed in range(12):
        a = letters(seed, 2_500)
        b = edited(a, share=share, seed=seed + 100)
        errors.append(np.mean(kernel(a) == kernel(b)) - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.03 and np.abs(errors).max() < 0.13


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_signature_is_of_the_set_of_grams(kernel, monkeypatch):
    codes = letters(1, 5_000)
    expected = kernel(codes)
    assert (kernel(codes.astype(np.uint8)) == expected).all()  # ASCII text has another type
    assert (kernel(np.concatenate([codes, codes[:2_000]])) == expected).mean() > 0.97  # repetitions count once
    monkeypatch.setattr(minhash, "_CHUNK", 100)  # however it is cut up
    monkeypatch.setattr(minhash, "_PERMUTED", 7)
    assert (kernel(codes) == expected).all()
    short = [kernel(letters(seed, 5)) for seed in range(50)]
    assert len({signature.tobytes() for signature in short}) == 50
    assert len(kernel(codes[:0])) == len(expected)


def test_the_published_preset_finds_what_theory_says():
    """A pair shares one of 9 keys of 13 with probability 1 - (1 - J^13)^9; ours is verified at 0.75."""
    found = {name: np.zeros(2) for name in PRESETS}
    expected = np.zeros(2)
    for index, share in enumerate((0.06, 0.115)):  # Jaccard similarities of about 0.89 and 0.79
        similarities = []
        for seed in range(150):
            a = letters(seed, 700)
            b = edited(a, share=share, seed=seed + 1_000)
            similarities.append(jaccard(a, b))
            for name, preset in PRESETS.items():
                signatures = np.stack([preset.signature([codes]) for codes in (a, b)])
                shares_key = (band_keys(signatures, preset)[:, 0] == band_keys(signatures, preset)[:, 1]).any()
                agrees = (signatures[0] == signatures[1]).mean() >= preset.threshold
                found[name][index] += (shares_key and agrees) / 150
        expected[index] = np.mean(1 - (1 - np.array(similarities) ** 13) ** 9)
    np.testing.assert_allclose(found["slimpajama"], expected, atol=0.1)
    assert 0.25 < expected[1] < 0.55 < expected[0] < 0.95
    assert found["strict"][0] > 0.98 and found["strict"][1] > 0.75
    assert (SLIMPAJAMA.bands, SLIMPAJAMA.rows, STRICT.bands, STRICT.rows) == (9, 13, 32, 8)


KEYED = st.lists(st.integers(0, 5), min_size=1, max_size=25)


@given(KEYED, st.integers(1, 4), st.randoms(use_true_random=False))
def test_pairs_of_a_bucket_connect_all_that_agree_and_nothing_else(keys, modulus, rng):
    """Documents agree when their numbers are equal modulo `modulus`, so the components are known."""
    documents = np.arange(100, 100 + len(keys))
    shuffled = list(range(len(keys)))
    rng.shuffle(shuffled)

    def agree(first, second):
        assert len(first) == len(second)
        return first % modulus == second % modulus

    pairs = bucket_pairs(np.array(keys, np.uint64)[shuffled], documents[shuffled], agree=agree)
    assert all(keys[a - 100] == keys[b - 100] and a % modulus == b % modulus and a < b for a, b in pairs.tolist())
    clusters = Clusters(200)
    clusters.join(pairs)
    roots = clusters.roots(documents)
    for a in range(len(keys)):
        for b in range(len(keys)):
            together = keys[a] == keys[b] and a % modulus == b % modulus
            assert (roots[a] == roots[b]) == together
    assert len(bucket_pairs(np.array(keys, np.uint64), documents, agree=all_agree)) == len(keys) - len(set(keys))


PAIRS = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40)


@settings(max_examples=200)
@given(PAIRS, st.integers(1, 7))
def test_clusters_are_connected_components_in_any_order(pairs, parts):
    members = [{number} for number in range(30)]
    for a, b in pairs:
        union = members[a] | members[b]
        for number in union:
            members[number] = union
    array = np.array(pairs, np.int64).reshape(-1, 2)
    random.Random(len(pairs)).shuffle(pairs)
    for order in (array, array[::-1], array[:, ::-1]):
        clusters = Clusters(30)
        for part in range(parts):
            clusters.join(order[part::parts])
        assert clusters.roots(np.arange(30)).tolist() == [min(union) for union in members]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 3)), max_size=20))
def test_survivors_are_the_longest_and_among_equals_of_the_smallest_rank(rows):
    roots, lengths, ranks = (
        np.array(column, np.int64) for column in (zip(*rows, strict=True) if rows else ([], [], []))
    )
    kept = survivors(roots, lengths=lengths, ranks=ranks)
    for root in set(roots.tolist()):
        own = np.flatnonzero(roots == root)
        best = min(own, key=lambda number: (-lengths[number], ranks[number]))
        assert kept[own].sum() == 1 and kept[best]


def test_a_bucket_of_strangers_ends(monkeypatch):
    monkeypatch.setattr(lsh, "MAX_ROUNDS", 3)
    calls = []

    def never(first, second):
        calls.append(len(first))
        return np.zeros(len(first), bool)

    assert len(bucket_pairs(np.zeros(10, np.uint64), np.arange(10), agree=never)) == 0
    assert calls == [9, 8, 7]
