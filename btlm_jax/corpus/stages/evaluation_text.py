"""Find evaluation text in documents: runs of words or characters that it shares with them, and short texts whole.

Both sides are normalised alike: as `clean` does, then as for near-duplicates, then without punctuation of any script.
A text becomes a sequence of units. A unit is a word, or one character of a script that is written without spaces: a
Chinese or Japanese character counts as half a word, one of Thai, Lao, Khmer, Burmese or Tibetan as a quarter. A run
begins at any unit and ends with the unit at which it counts 13 words, so that in English the runs are the 13-grams of
GPT-3 (arXiv 2005.14165, appendix C), in Chinese 26 characters and in Thai 52. A text that is shorter than a run, but
not shorter than 6 words, is found where a document contains all of it; a shorter one where it is the whole document.

The rule PUBLISHED is the 13-grams of words between spaces alone, as published, whatever the script.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ftfy
import numpy as np

from btlm_jax.corpus.engine.tasks import Heartbeat, LocalTask
from btlm_jax.corpus.near_duplicates.lsh import MIX_FACTOR
from btlm_jax.corpus.near_duplicates.normalize import normalized_pieces
from btlm_jax.corpus.readers.frames import BadFileError
from btlm_jax.corpus.readers.raw import Keys, read_raw
from btlm_jax.corpus.readers.records import Record, load_array, save_array
from btlm_jax.corpus.stages.clean import FTFY, fix_unicode

BY_SCRIPT, PUBLISHED = "by-script", "13-words"
RULES = (BY_SCRIPT, PUBLISHED)
WORDS = 13  # of a run
MIN_WORDS = 6  # of a text that is looked for inside documents

# What a character is: nothing, a space, a part of a word, or a unit of its own that counts so many quarters of a word.
_DELETED, _SPACE, _IN_WORD = 0, 255, 4
_RUN, _MIN_TEXT = WORDS * _IN_WORD, MIN_WORDS * _IN_WORD  # in quarters of a word
_HALF_WORD = (
    *((0x3005, 0x3008), (0x3040, 0x3130), (0x31A0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000)),
    *((0xF900, 0xFB00), (0xFF66, 0xFFA0), (0x1B000, 0x1B170), (0x20000, 0x32400)),
)
_QUARTER_WORD = (
    *((0x0E00, 0x1000), (0x1000, 0x10A0), (0x1780, 0x1800), (0x1950, 0x1A00), (0x1A20, 0x1AB0)),
    *((0x1B00, 0x1B80), (0xA980, 0xAA00), (0xAA60, 0xAAE0)),
)
_ARRAYS = ("runs", "texts", "lengths", "whole")
_FACTOR = 0xF1357AEA2E62A9C5  # odd; of polynomial hashes modulo 2^64
_INVERSE = pow(_FACTOR, -1, 1 << 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationIndex:
    """Hashes of evaluation texts; its arrays may be memory-mapped."""

    rule: str
    runs: np.ndarray  # uint64, sorted
    texts: np.ndarray  # of texts of MIN_WORDS words and more that have no run, uint64, sorted
    lengths: np.ndarray  # the different numbers of units of these, int64, sorted
    whole: np.ndarray  # of shorter texts, uint64, sorted

    @staticmethod
    def load(folder: Path, *, rule: str) -> EvaluationIndex:
        """Open the arrays that `index_task` wrote."""
        return EvaluationIndex(rule=rule, **{name: load_array(folder, name) for name in _ARRAYS})

    def is_in(self, text: str) -> bool:
        """Return whether a document contains evaluation text."""
        num_units, batch = 0, None
        for batch in _batches(text, rule=self.rule):
            num_units = max(num_units, len(batch.hashes))
            if _any_in(self.runs, batch.runs()):
                return True
            if any(_any_in(self.texts, batch.stretches(length)) for length in self.lengths.tolist()):
                return True
        return batch is not None and num_units <= _RUN and _any_in(self.whole, batch.stretches(num_units))


@dataclasses.dataclass(frozen=True)
class _Units:
    """Consecutive units of a text."""

    hashes: np.ndarray  # uint64 [units]
    quarters: np.ndarray  # int64 [units]: what each counts, in quarters of a word

    def runs(self) -> np.ndarray:
        """Return the hash of the run that begins at each unit, of those that end here, uint64."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.quarters)])
        ends = np.searchsorted(total, total[:-1] + _RUN)
        begins = np.flatnonzero(ends < len(total))
        return self._stretch_hashes(begins, ends[begins])

    def stretches(self, length: int) -> np.ndarray:
        """Return the hash of every stretch of `length` units, uint64."""
        begins = np.arange(max(len(self.hashes) - length + 1, 0))
        return self._stretch_hashes(begins, begins + length)

    @functools.cached_property
    def _stretch_hashes(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        return _stretch_hashes(self.hashes)


def run_hashes(text: str, *, rule: str) -> np.ndarray:
    """Return the hashes of all runs of a text, uint64, without repetitions."""
    return np.unique(_concatenated([batch.runs() for batch in _batches(text, rule=rule)]))


def variants(text: str) -> list[str]:
    """Return the forms in which `clean` may leave an evaluation text inside a document.

    What ftfy does to a line depends on what else is in it and on whether a tag came before.
    """
    fixed = (ftfy.fix_text(text, FTFY._replace(unescape_html=unescape)) for unescape in (True, False))
    return list(dict.fromkeys([fix_unicode(text), *fixed, unicodedata.normalize("NFC", text)]))


def index_task(task: LocalTask, directory: Path, heartbeat: Heartbeat, *, rule: str, key: str) -> dict:
    """Index the texts of some raw files, of their key or column `key`: a task of a stage.

    Counts files of which nothing can be found.

    Raises:
      ValueError: a file or a line cannot be read, so its text would be missed.
    """
    runs, texts, lengths, whole = [], [], [], []
    read = functools.partial(read_raw, default_source="evaluation", keys=Keys(text=key), key_flag="--evaluation_key")
    totals = {"texts": 0, "found whole only": 0, "unusable": 0, "files": len(task.inputs), "files without runs": {}}
    for item in task.inputs:
        num_usable = 0
        try:
            for record in read(item.path, name=item.name, is_piece=item.is_piece):
                if not isinstance(record, Record):
                    raise BadFileError(f"line {record.line}: {record.reason}")
                heartbeat(1, record.num_bytes)
                totals["texts"] += 1
                is_usable = is_long = False
                for text in variants(record.text):
                    own = run_hashes(text, rule=rule)
                    if len(own):
                        runs.append(own)
                        is_usable = is_long = True
                        continue
                    *_, units = _batches(text, rule=rule)  # the last has all of so short a text
                    if not len(units.hashes) or rule == PUBLISHED:
                        continue
                    is_usable = True
                    if units.quarters.sum() < _MIN_TEXT:
                        whole.append(units.stretches(len(units.hashes)))
                    else:
                        texts.append(units.stretches(len(units.hashes)))
                        lengths.append(len(units.hashes))
                        is_long = True
                totals["unusable"] += not is_usable
                totals["found whole only"] += is_usable and not is_long
                num_usable += is_long
        except BadFileError as error:
            raise ValueError(f"evaluation text {item.name} cannot be used: {error}") from error
        if not num_usable:
            totals["files without runs"][item.name] = 1
    arrays = {
        "runs": np.unique(_concatenated(runs)),
        "texts": np.unique(_concatenated(texts)),
        "lengths": np.unique(np.array(lengths, np.int64)),
        "whole": np.unique(_concatenated(whole)),
    }
    return {"totals": totals, "outputs": [save_array(directory, name, array) for name, array in arrays.items()]}


def _batches(text: str, *, rule: str) -> Iterator[_Units]:
    """Yield the units of a text in overlapping batches: each run and each short text is whole in one of them."""
    kinds_of = _kinds_by_script() if rule == BY_SCRIPT else _kinds_by_spaces()
    last = _Units(np.empty(0, np.uint64), np.empty(0, np.int64))
    unfinished = np.empty(0, np.uint32)  # the beginning of a word that goes on in the next piece
    for codes in _with_end(normalized_pieces(text)):
        codes = np.concatenate([unfinished, codes.astype(np.uint32)])
        kinds = kinds_of[codes]
        codes, kinds = codes[kinds != _DELETED], kinds[kinds != _DELETED]
        in_word = kinds == _IN_WORD
        is_first = in_word & ~np.append(False, in_word[:-1])
        is_last = in_word & ~np.append(in_word[1:], False)
        is_single = ~in_word & (kinds != _SPACE)
        begins, ends = np.flatnonzero(is_first | is_single), np.flatnonzero(is_last | is_single) + 1
        unfinished = codes[:0]
        if len(codes) and in_word[-1]:
            unfinished = codes[begins[-1] :]
            begins, ends = begins[:-1], ends[:-1]
        hashes = _stretch_hashes(_mixed(codes.astype(np.uint64) + np.uint64(1)))(begins, ends)
        units = _Units(
            np.concatenate([last.hashes, hashes]), np.concatenate([last.quarters, kinds[begins].astype(np.int64)])
        )
        yield units
        last = _Units(units.hashes[-_RUN:], units.quarters[-_RUN:])


def _with_end(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the pieces and a space, which ends the last word."""
    yield from pieces
    yield np.full(1, 0x20, np.uint8)


@functools.cache
def _kinds_by_script() -> np.ndarray:
    """Return what each character is, uint8 [number of characters]."""
    kinds = np.full(sys.maxunicode + 1, _IN_WORD, np.uint8)
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category[0] == "P" or category in ("Cc", "Cf"):
            kinds[code] = _DELETED
    for ranges, quarters in ((_HALF_WORD, 2), (_QUARTER_WORD, 1)):
        for begin, end in ranges:
            part = kinds[begin:end]
            part[part == _IN_WORD] = quarters
    kinds[0x20] = _SPACE
    return kinds


@functools.cache
def _kinds_by_spaces() -> np.ndarray:
    kinds = np.full(sys.maxunicode + 1, _IN_WORD, np.uint8)
    kinds[0x20] = _SPACE
    return kinds


def _stretch_hashes(values: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function of begins and ends that gives a hash of each values[begin:end], uint64.

    It is a polynomial modulo 2^64, mixed. With sums of values[i] F^i from the beginning, that of a stretch is a
    difference, divided by F^begin.
    """
    inverses = _powers(_INVERSE, len(values))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * _powers(_FACTOR, len(values)))])
    return lambda begins, ends: _mixed((sums[ends] - sums[begins]) * inverses[begins])


def _powers(factor: int, count: int) -> np.ndarray:
    powers = np.full(count, factor, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers)


def _mixed(values: np.ndarray) -> np.ndarray:
    values = values ^ values >> np.uint64(32)
    values *= MIX_FACTOR
    values ^= values >> np.uint64(29)
    values *= MIX_FACTOR
    return values ^ values >> np.uint64(32)


def _any_in(hashes: np.ndarray, own: np.ndarray) -> bool:
    """Return whether one of `own` is among the sorted `hashes`."""
    if not len(hashes) or not len(own):
        return False
    position = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
    return bool((hashes[position] == own).any())


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint64), *parts])
