"""Find text that must not be trained on: near-duplicates of held-out documents, and 13-grams of evaluation text."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from btlm_jax.corpus.engine.inputs import raw_inputs
from btlm_jax.corpus.engine.tasks import local_copies
from btlm_jax.corpus.near_duplicates.lsh import MIX_FACTOR, STRICT, band_keys
from btlm_jax.corpus.near_duplicates.normalize import normalized_pieces
from btlm_jax.corpus.readers.frames import BadFileError
from btlm_jax.corpus.readers.raw import read_raw
from btlm_jax.corpus.readers.records import Record
from btlm_jax.display.progress import Log
from btlm_jax.storage.location import PathOrUrl

WORDS = 13  # of an n-gram that counts as contamination, as for GPT-3 (arXiv 2005.14165, appendix C)


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


def word_ngrams(text: str) -> Iterator[np.ndarray]:
    """Yield the hashes of all 13-grams of words of the normalised text, uint64 [n-grams], in pieces."""
    last = np.empty(0, np.uint64)
    for words in _words(text):
        hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words)) * MIX_FACTOR
        hashes = np.concatenate([last, hashes ^ hashes >> np.uint64(29)])
        count = len(hashes) - WORDS + 1
        if count > 0:
            ngrams = np.zeros(count, np.uint64)
            for offset in range(WORDS):
                ngrams = (ngrams ^ hashes[offset : offset + count]) * MIX_FACTOR
                ngrams ^= ngrams >> np.uint64(32)
            yield ngrams
        last = hashes[1 - WORDS :]  # starts the n-grams that end in the next piece


def evaluation_ngrams(locations: Iterable[PathOrUrl], *, log: Log) -> np.ndarray:
    """Return the sorted hashes of all 13-grams in some raw files or folders, uint64 [n-grams].

    Raises:
      ValueError: a file or a line cannot be read, so its text would be missed.
    """
    ngrams = [np.empty(0, np.uint64)]
    for item in itertools.chain.from_iterable(raw_inputs(location, log=log) for location in locations):
        with local_copies([item], Path(tempfile.gettempdir())) as (local,):
            try:
                for record in read_raw(local.path, name=item.name, default_source="evaluation"):
                    if not isinstance(record, Record):
                        raise BadFileError(f"line {record.line}: {record.reason}")
                    ngrams.extend(word_ngrams(record.text))
            except BadFileError as error:
                raise ValueError(f"evaluation text {item.location} cannot be used: {error}") from error
    return np.unique(np.concatenate(ngrams))


def shares_ngram(text: str, ngrams: np.ndarray) -> bool:
    """Return whether one of the text's 13-grams is among the sorted `ngrams`."""
    if not len(ngrams):
        return False
    for own in word_ngrams(text):
        position = np.minimum(np.searchsorted(ngrams, own), len(ngrams) - 1)
        if (ngrams[position] == own).any():
            return True
    return False


def _words(text: str) -> Iterator[list[bytes]]:
    """Yield the words of the normalised text, in pieces."""
    unfinished = b""
    for codes in normalized_pieces(text):
        *words, unfinished = (unfinished + _utf8(codes)).split(b" ")
        yield words
    if unfinished:
        yield [unfinished]


def _utf8(codes: np.ndarray) -> bytes:
    if codes.dtype == np.uint8:  # ASCII
        return codes.tobytes()
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass").encode("utf-8", "surrogatepass")
