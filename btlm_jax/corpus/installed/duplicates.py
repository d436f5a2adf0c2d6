"""Deduplicate some ten thousand documents in memory: first repeated paragraphs, then near-duplicates.

Near-duplicates are found with lsh.py, by one-permutation MinHash of the lower-case text with its punctuation.
stages/dedup.py is for corpora that do not fit into memory.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from btlm_jax.corpus.installed.documents import Document
from btlm_jax.corpus.near_duplicates import MIN_CHARACTERS
from btlm_jax.corpus.near_duplicates.lsh import STRICT, Clusters, band_keys, bucket_pairs, survivors
from btlm_jax.corpus.near_duplicates.minhash import one_permutation

BINS = STRICT.bands * STRICT.rows
THRESHOLD = 0.8
MIN_BLOCK_CHARACTERS = 60  # of a paragraph; shorter ones may repeat, such as "Returns:"

_SPACE = re.compile(r"\s+")


def drop_repeated_paragraphs(documents: Iterable[Document], skipped: Counter) -> list[Document]:
    """Keep each paragraph in the first document that has it, which drops licence headers; then drop short documents."""
    seen: set[bytes] = set()
    shortened_documents = []
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
        shortened = Document(id=document.id, source=document.source, blocks=tuple(blocks))
        if len(shortened.text) < MIN_CHARACTERS:
            skipped["short documents"] += 1
        else:
            shortened_documents.append(shortened)
    return shortened_documents


def drop_near_duplicates(documents: list[Document], skipped: Counter) -> list[Document]:
    """Return one document of each cluster of near-duplicates, in order: the longest, of equally long ones by id."""
    if not documents:
        return []
    signatures = np.stack([signature(document.text) for document in documents])

    def agree(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.mean(signatures[first] == signatures[second], axis=1) >= THRESHOLD

    numbers = np.arange(len(documents))
    clusters = Clusters(len(documents))
    for keys in band_keys(signatures, STRICT):
        clusters.join(bucket_pairs(keys, numbers, agree=agree))
    is_kept = survivors(
        clusters.roots(numbers),
        lengths=np.array([len(document.text) for document in documents]),
        ranks=np.unique([document.id for document in documents], return_inverse=True)[1],
    )
    skipped["near-duplicate documents"] += len(documents) - int(is_kept.sum())
    return [documents[index] for index in np.flatnonzero(is_kept)]


def signature(text: str) -> np.ndarray:
    """Return the one-permutation MinHash of the text's character 13-grams, uint32 [256]."""
    data = _SPACE.sub(" ", text.lower()).encode("utf-8", "replace")
    return one_permutation([np.frombuffer(data, np.uint8)], bins=BINS)
