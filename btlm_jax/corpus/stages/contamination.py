"""Find text that must not be trained on: near-duplicates of held-out documents, runs of 13 words of evaluation text."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from btlm_jax.corpus.engine.inputs import raw_inputs
from btlm_jax.corpus.engine.stage import Log
from btlm_jax.corpus.engine.tasks import at_hand
from btlm_jax.corpus.near_duplicates.lsh import STRICT, band_keys
from btlm_jax.corpus.near_duplicates.normalize import normalized_pieces
from btlm_jax.corpus.readers.frames import BadFile
from btlm_jax.corpus.readers.raw import read_raw
from btlm_jax.corpus.readers.records import Record
from btlm_jax.storage.location import PathOrUrl

WORDS = 13  # of a run that counts as seen, GPT-3's (arXiv 2005.14165, appendix C)
_ODD = np.uint64(0x9E3779B97F4A7C15)


def strict_signature(text: str) -> np.ndarray:
    """Return the signature that near-duplicates of held-out documents are found by."""
    return STRICT.signature(normalized_pieces(text))


def no_signatures() -> np.ndarray:
    """Return the signatures of no document."""
    return np.empty((0, STRICT.bands * STRICT.rows), np.uint32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out documents' signatures, to compare others with; arrays that may lie on disk."""

    signatures: np.ndarray
    order: np.ndarray  # [bands, documents], by key
    keys: np.ndarray  # in that order

    @staticmethod
    def of(signatures: np.ndarray) -> HeldOut:
        """Sort the keys of signatures."""
        keys = band_keys(signatures, STRICT)
        order = np.argsort(keys, axis=1, kind="stable")
        keys = np.take_along_axis(keys, order, axis=1)
        return HeldOut(signatures=signatures, order=order.astype(np.uint32), keys=keys)

    def has_near(self, texts: Sequence[str]) -> np.ndarray:
        """Return for each text whether a held-out document is a near-duplicate of it."""
        found = np.zeros(len(texts), bool)
        if not len(self.signatures) or not len(texts):
            return found
        signatures = np.stack([strict_signature(text) for text in texts])
        for band, keys in enumerate(band_keys(signatures, STRICT)):
            begin, end = (np.searchsorted(self.keys[band], keys, side=side) for side in ("left", "right"))
            for number in np.flatnonzero((end > begin) & ~found):
                others = self.signatures[self.order[band, begin[number] : end[number]]]
                found[number] = ((others == signatures[number]).mean(axis=1) >= STRICT.threshold).any()
        return found


def word_runs(text: str) -> Iterator[np.ndarray]:
    """Yield a hash of each run of 13 words of the normalised text, uint64, piece by piece; none of a shorter text."""
    last = np.empty(0, np.uint64)
    for words in _words(text):
        hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words)) * _ODD
        hashes = np.concatenate([last, hashes ^ hashes >> np.uint64(29)])
        count = len(hashes) - WORDS + 1
        if count > 0:
            runs = np.zeros(count, np.uint64)
            for place in range(WORDS):
                runs = (runs ^ hashes[place : place + count]) * _ODD
                runs ^= runs >> np.uint64(32)
            yield runs
        last = hashes[1 - WORDS :]  # begins the runs that the next piece ends


def evaluation_runs(places: Iterable[PathOrUrl], *, log: Log) -> np.ndarray:
    """Return the sorted hashes of the runs of all texts of some raw files or folders.

    Raises:
      ValueError: a file or a line cannot be read, so that its text would not be found.
    """
    found = [np.empty(0, np.uint64)]
    for item in itertools.chain.from_iterable(raw_inputs(place, log=log) for place in places):
        with at_hand([item], Path(tempfile.gettempdir())) as (local,):
            try:
                for record in read_raw(local.path, name=item.name, default_source="evaluation"):
                    if not isinstance(record, Record):
                        raise BadFile(f"line {record.line}: {record.reason}")
                    found.extend(word_runs(record.text))
            except BadFile as error:
                raise ValueError(f"evaluation text {item.path} cannot be used: {error}") from error
    return np.unique(np.concatenate(found))


def shares_run(text: str, runs: np.ndarray) -> bool:
    """Return whether a run of 13 words of the text is one of the sorted `runs`."""
    if not len(runs):
        return False
    for own in word_runs(text):
        place = np.minimum(np.searchsorted(runs, own), len(runs) - 1)
        if (runs[place] == own).any():
            return True
    return False


def _words(text: str) -> Iterator[list[bytes]]:
    """Yield the words of the normalised text, piece by piece."""
    rest = b""
    for codes in normalized_pieces(text):
        *words, rest = (rest + _utf8(codes)).split(b" ")
        yield words
    if rest:
        yield [rest]


def _utf8(codes: np.ndarray) -> bytes:
    if codes.dtype == np.uint8:  # ASCII
        return codes.tobytes()
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass").encode("utf-8", "surrogatepass")
