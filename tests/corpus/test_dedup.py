"""Deduplication against exact Jaccard similarities of planted pairs."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from btlm_jax.corpus.installed.documents import Document, drop_near_duplicates, drop_repeated_paragraphs, signature
from btlm_jax.corpus.near_duplicates.minhash import GRAM


def words(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(count)]


def edited(text: list[str], *, share: float, seed: int) -> list[str]:
    """Replace a run at the end, so that about 1 - share of the grams stay."""
    keep = int(len(text) * (1 - share))
    return text[:keep] + words(seed, len(text) - keep)


def jaccard(a: str, b: str) -> float:
    first, second = (grams_of(re.sub(r"\s+", " ", text.lower())) for text in (a, b))
    return len(first & second) / len(first | second)


def grams_of(text: str) -> set[str]:
    return {text[i : i + GRAM] for i in range(len(text) - GRAM + 1)}


def doc(name: str, text: str) -> Document:
    return Document(id=name, source="docs", blocks=(text,))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("count", [120, 2000])
def test_agreeing_bins_estimate_the_jaccard_similarity(share, count):
    errors = []
    for seed in range(6):
        text = words(seed, count)
        a, b = " ".join(text), " ".join(edited(text, share=share, seed=seed + 100))
        errors.append(np.mean(signature(a) == signature(b)) - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.03
    assert np.abs(errors).max() < 0.12


def test_near_duplicates_go_and_the_longest_stays():
    documents, expected = [], []
    for seed in range(30):
        text = words(seed, 700)
        longer = [*text, "and", "more"]
        near = edited(text, share=0.04, seed=seed + 500)
        far = edited(text, share=0.5, seed=seed + 900)
        assert jaccard(" ".join(text), " ".join(near)) > 0.9 > 0.6 > jaccard(" ".join(text), " ".join(far))
        documents += [doc(f"{seed}a", " ".join(text)), doc(f"{seed}b", " ".join(near)), doc(f"{seed}c", " ".join(far))]
        documents.append(doc(f"{seed}d", " ".join(longer)))
        expected += [f"{seed}c", f"{seed}d"]
    skipped = Counter()
    kept = [document.id for document in drop_near_duplicates(documents, skipped)]
    lengths = {document.id: len(document.text) for document in documents}
    clusters = [max((f"{s}a", f"{s}b", f"{s}d"), key=lambda name: lengths[name]) for s in range(30)]
    assert sorted(kept) == sorted(clusters + [f"{s}c" for s in range(30)])
    assert skipped == {"near-duplicate documents": 60}


def test_equal_documents_keep_the_first_by_id_and_order_is_kept():
    text = " ".join(words(1, 300))
    documents = [doc("z", text), doc("other", " ".join(words(2, 300))), doc("b", text)]
    assert [document.id for document in drop_near_duplicates(documents, Counter())] == ["other", "b"]


def test_short_texts_do_not_collide():
    documents = [doc(str(i), word) for i, word in enumerate(sorted(set(words(3, 200))))]
    assert len(drop_near_duplicates(documents, Counter())) == len(documents)
    assert drop_near_duplicates([], Counter()) == []


def test_a_paragraph_stays_in_the_first_document_that_has_it():
    header = "Licensed under the terms that everybody repeats at the top of every file, word for word."
    first, second = (" ".join(words(seed, 60)) for seed in (1, 2))
    documents = [
        Document(id="a", source="docs", blocks=(header, first)),
        Document(id="b", source="docs", blocks=(re.sub(" ", "\n  ", header), "Short.", second, "Short.")),
        Document(id="c", source="docs", blocks=(header, "Only this besides.")),
    ]
    skipped = Counter()
    kept = drop_repeated_paragraphs(documents, skipped)
    assert [document.blocks for document in kept] == [(header, first), ("Short.", second, "Short.")]
    assert skipped == {"repeated paragraphs": 2, "short documents": 1}
