"""Find near-duplicates of held-out documents, which must not be trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from btlm_jax.corpus.near_duplicates.lsh import STRICT, band_keys
from btlm_jax.corpus.near_duplicates.normalize import normalized_pieces


def strict_signature(text: str) -> np.ndarray:
    """Return the MinHash signature by which near-duplicates of held-out documents are found, uint32 [bins]."""
    return STRICT.signature(normalized_pieces(text))


def no_signatures() -> np.ndarray:
    """Return the signatures of an empty set of documents."""
    return np.empty((0, STRICT.bands * STRICT.rows), np.uint32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """An index of the held-out documents' signatures; its arrays may be memory-mapped."""

    signatures: np.ndarray  # uint32 [documents, bins]
    order: np.ndarray  # uint32 [bands, documents]: documents sorted by the key of their band
    keys: np.ndarray  # uint64 [bands, documents], sorted

    @staticmethod
    def index(signatures: np.ndarray) -> HeldOut:
        """Index the signatures of held-out documents."""
        keys = band_keys(signatures, STRICT)
        order = np.argsort(keys, axis=1, kind="stable")
        keys = np.take_along_axis(keys, order, axis=1)
        return HeldOut(signatures=signatures, order=order.astype(np.uint32), keys=keys)

    def has_near_duplicate(self, texts: Sequence[str]) -> np.ndarray:
        """Return for each text whether a held-out document is a near-duplicate of it, bool [texts]."""
        has_near = np.zeros(len(texts), bool)
        if not len(self.signatures) or not len(texts):
            return has_near
        signatures = np.stack([strict_signature(text) for text in texts])
        for band, keys in enumerate(band_keys(signatures, STRICT)):
            begin, end = (np.searchsorted(self.keys[band], keys, side=side) for side in ("left", "right"))
            for number in np.flatnonzero((end > begin) & ~has_near):
                others = self.signatures[self.order[band, begin[number] : end[number]]]
                has_near[number] = ((others == signatures[number]).mean(axis=1) >= STRICT.threshold).any()
        return has_near
