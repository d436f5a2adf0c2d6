"""From raw text to a token store in one go: the stages of `btlm corpus`, with their settings chosen from the text.

    DIRECTORY/clean       bad lines and files are left out, if they are few
    DIRECTORY/pieces      documents divided into contiguous pieces, where they are too few or too long to be split whole
    DIRECTORY/dedup       strict
    DIRECTORY/split       what is held out has the size that `heldout_target` says
    DIRECTORY/tokenizer-N a SentencePiece tokenizer of N ids, unless one is given

Each stage resumes, so the whole does: what is chosen follows from what the stages before have written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import lzma
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from btlm_jax import notices
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.engine.tasks import Input
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.readers.raw import has_suffix
from btlm_jax.corpus.readers.records import Record, read_records
from btlm_jax.corpus.stages.clean import KEEP_PREFIX, CleanConfig, clean
from btlm_jax.corpus.stages.dedup import deduplicate
from btlm_jax.corpus.stages.pieces import divide
from btlm_jax.corpus.stages.split import TRAIN, VALIDATION, SplitConfig, hash_text, split
from btlm_jax.corpus.stages.tokenize import TokenizeConfig, tokenize
from btlm_jax.corpus.stages.train_tokenizer import train_tokenizer_stage
from btlm_jax.data.store import Manifest
from btlm_jax.display.progress import Log
from btlm_jax.storage.files import write_atomically
from btlm_jax.storage.location import PathOrUrl
from btlm_jax.tokenizers.sentencepiece_bpe import MIN_VOCAB_SIZE, SENTENCEPIECE

MIN_TEXT_BYTES = 64_000
HELDOUT_SHARE, MIN_HELDOUT_BYTES, MAX_HELDOUT_BYTES = 0.05, 16_000, 1_000_000
HELDOUT_FILE = "heldout.txt"
MAX_BAD_RATE = 0.1  # of lines and files that are no documents
FEW_DOCUMENTS = 50  # fewer are divided
LARGE_SHARE = 0.1  # of all text; a document that is larger is divided, and with it all others
LONGEST_DOCUMENT = 1_000_000  # characters; longer ones are divided in any case: a tokenizer takes a line at once
_HELDOUT_PIECES = 4  # the held-out text has about so many, or more
_PIECE_CHARACTERS = (4_000, 32_000)  # the shortest and the longest
_COUNTED_DOCUMENTS = 20_000  # of more, a share of hashes has the size wanted closely enough
_MAX_COMPARED_BYTES = 8_000_000  # held-out text beyond it is not compressed for a comparison
_UNCOMPRESSED = (".jsonl", ".txt", ".md", ".rst")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitText:
    """Text that is cleaned, deduplicated and split, and what is to be said of it."""

    folder: Path  # of the stage `split`
    train_bytes: int
    sources: tuple[str, ...]  # of what is trained on
    beginning: str  # of a held-out document: a few words
    lines: tuple[str, ...]  # what was read, left out and held out


def check_inputs(inputs: Sequence[Input]) -> None:
    """Check that raw files may be enough to train on, before they are read.

    Raises:
      ValueError: they are too small.
    """
    if all(has_suffix(item.name, _UNCOMPRESSED) for item in inputs):
        _check_size(sum(item.num_bytes for item in inputs), what=f"{len(inputs):,} files with")


def fingerprint_of_inputs(inputs: Sequence[Input]) -> str:
    """Return a hash of the names and sizes of raw files."""
    listing = [[item.name, item.begin, item.num_bytes] for item in inputs]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _check_size(num_bytes: int, *, what: str) -> None:
    if num_bytes < MIN_TEXT_BYTES:
        raise ValueError(
            f"--data is too small: {what} {num_bytes:,} bytes; training needs {MIN_TEXT_BYTES // 1000} kB of text "
            f"({MIN_TEXT_BYTES:,} bytes), cleaned and without repetitions"
        )


def heldout_target(num_bytes: int) -> int:
    """Return how many bytes to hold out: 5 %, at least 16 kB and at most 1 MB, but never more than half."""
    return min(max(round(HELDOUT_SHARE * num_bytes), MIN_HELDOUT_BYTES), MAX_HELDOUT_BYTES, num_bytes // 2)


def split_text(locations: Sequence[PathOrUrl], *, directory: Path, workers: Workers, log: Log) -> SplitText:
    """Clean, deduplicate and split raw text in `directory`.

    Raises:
      FileNotFoundError: there is no raw file.
      ValueError: too little text is there or remains, too much of it cannot be read, or it changed since it was read.
      OSError: something cannot be read or written.
    """
    run = {"workers": workers, "log": log}
    config = CleanConfig(
        inputs=tuple(locations),
        default_source="text",
        on_bad_file=KEEP_PREFIX,
        max_bad_rate=MAX_BAD_RATE,
        folders_are_sources=True,
    )
    cleaned = clean(config, output=directory / "clean", **run)["totals"]
    size = _size(cleaned["written"])
    _check_size(size.num_bytes, what=f"cleaned, {size.num_documents:,} documents with")
    pieces = _piece_characters(cleaned, size)
    if pieces:
        divide(directory / "clean", characters=pieces, output=directory / "pieces", **run)
    source = directory / ("pieces" if pieces else "clean")
    deduplicated = deduplicate(source, preset="strict", output=directory / "dedup", **run)["totals"]
    kept = _size(deduplicated["written"])
    _check_size(kept.num_bytes, what=f"of {size.num_bytes:,} bytes, what is left without near-duplicates has")
    share, seed = _share_to_hold_out(directory / "dedup", kept)
    splitting = SplitConfig(
        input=directory / "dedup",
        validation=share,
        test=0.0,
        seed=seed,
        weights={},
        evaluation=(),
        evaluation_rule="by-script",
    )
    manifest = split(splitting, output=directory / "split", **run)
    train, heldout = (_size(manifest["totals"]["splits"][name]) for name in (TRAIN, VALIDATION))
    near = manifest["totals"]["dropped"].get("near a held-out document", 0)
    texts = _heldout_texts(directory / "split", manifest)
    return SplitText(
        folder=directory / "split",
        train_bytes=train.num_bytes,
        sources=tuple(sorted(manifest["totals"]["splits"][TRAIN])),
        beginning=" ".join(next(texts).split()[:6])[:60],
        lines=(
            _read_line(cleaned, size, dropped=cleaned["dropped"] | deduplicated["dropped"], kept=kept),
            _heldout_line(train, heldout, near=near, pieces=pieces),
            _comparison(directory / HELDOUT_FILE, _heldout_texts(directory / "split", manifest), heldout),
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Size:
    num_documents: int
    num_bytes: int


def _size(by_source: dict[str, dict[str, int]]) -> _Size:
    """Return the size of what a stage wrote."""
    documents, num_bytes = (sum(part[key] for part in by_source.values()) for key in ("documents", "bytes"))
    return _Size(num_documents=documents, num_bytes=num_bytes)


def _piece_characters(cleaned: dict, size: _Size) -> int:
    """Return how long the pieces are into which documents are to be divided; 0 if they stay whole.

    Where the documents are many and none is a large part of the text, only those are divided that are very long.
    """
    longest = max(map(int, cleaned["lengths"]))  # characters, rounded up to a power of 2
    characters = LONGEST_DOCUMENT
    if size.num_documents < FEW_DOCUMENTS or longest / 2 > LARGE_SHARE * size.num_bytes:
        least, most = _PIECE_CHARACTERS
        characters = min(max(heldout_target(size.num_bytes) // _HELDOUT_PIECES, least), most)
    return characters if longest > characters else 0


def _share_to_hold_out(folder: Path, size: _Size) -> tuple[float, int]:
    """Return the share of hashes, and the seed of these, with which the held-out documents have the size wanted.

    Of few documents the hashes are looked at: those of the smallest hashes that together have the size. The seed is
    the first of 0, 1, ... of which they are less than half of all hashes, and less than half of the text.

    Raises:
      ValueError: no seed is so.
    """
    target = heldout_target(size.num_bytes)
    if size.num_documents > _COUNTED_DOCUMENTS:
        return target / size.num_bytes, 0
    manifest = read_stage(folder)
    for seed in range(100):
        hashed = sorted((hash_text(record.text, seed=seed), record.num_bytes) for record in _records(folder, manifest))
        taken = list(itertools.accumulate(num_bytes for _, num_bytes in hashed))
        last = next(number for number, num_bytes in enumerate(taken) if num_bytes >= target)
        position = hashed[last][0] / 2**64
        if position < 0.5 and 2 * taken[last] <= size.num_bytes:
            return math.nextafter(position, 1.0), seed
    raise ValueError(
        f"of {size.num_documents:,} documents none can be held out that have {target:,} bytes and leave half of the "
        "text: they are too unequal; give more text"
    )


def _records(folder: Path, manifest: dict) -> Iterator[Record]:
    for output in manifest["outputs"]:
        yield from read_records(folder / output["file"])


def _heldout_texts(folder: Path, manifest: dict) -> Iterator[str]:
    for output in manifest["outputs"]:
        if output["split"] == VALIDATION:
            yield from (record.text for record in read_records(folder / output["file"]))


def _read_line(cleaned: dict, size: _Size, *, dropped: dict[str, int], kept: _Size) -> str:
    sources = sorted(cleaned["written"])
    named = f"{', '.join(sources[:4])}{', ...' if len(sources) > 4 else ''}"
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count)
    return (
        f"Text: {_count(size.num_documents, 'document')}, {size.num_bytes:,} bytes"
        + (f", of {len(sources):,} sources ({named})" if len(sources) > 1 else "")
        + (f"; left out: {left_out}; {kept.num_bytes:,} bytes stay" if left_out else "; nothing is left out")
    )


def _heldout_line(train: _Size, heldout: _Size, *, near: int, pieces: int) -> str:
    share = heldout.num_bytes / (heldout.num_bytes + train.num_bytes)
    unit, why = ("piece", " (contiguous; the documents are few or unequal)") if pieces else ("document", "")
    if pieces == LONGEST_DOCUMENT:
        why = f" (contiguous; documents are divided where they have over {pieces:,} characters)"
    return (
        f"Held out by hash: {_count(heldout.num_documents, unit)}{why}, {heldout.num_bytes:,} bytes ({share:.1%}); "
        f"to train on: {train.num_bytes:,} bytes, without {near:,} near-duplicates of these"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _comparison(path: Path, texts: Iterator[str], heldout: _Size) -> str:
    """Write the held-out text to a file, if it is not long, and return what `xz -9` makes of it."""
    if heldout.num_bytes > _MAX_COMPARED_BYTES:
        return f"The held-out text is too long to be compared with xz: over {_MAX_COMPARED_BYTES:,} bytes"
    text = "\n".join(texts).encode()
    write_atomically(path, text)
    bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
    return f"For comparison: xz -9 takes {bits:.3f} bits a byte of the held-out text, {path}"


def make_tokenizer(text: SplitText, *, vocab_size: int, directory: Path, log: Log) -> Path:
    """Train a tokenizer of `vocab_size` ids, or of half as many until the text suffices; return its directory.

    Raises:
      ValueError: the text does not suffice for the smallest.
    """
    while True:
        folder = directory / f"tokenizer-{vocab_size}"
        try:
            train_tokenizer_stage(text.folder, kind=SENTENCEPIECE, vocab_size=vocab_size, output=folder, log=log)
            return folder
        except ValueError as error:
            smaller = max(vocab_size // 2, MIN_VOCAB_SIZE)
            if vocab_size == MIN_VOCAB_SIZE or "can be trained on this text" not in str(error):
                raise
            notices.report("smaller-vocabulary", f"{error}; {smaller} pieces are tried")
            vocab_size = smaller


def make_store(
    text: SplitText,
    *,
    tokenizer: Path,
    block_len: int,
    by_source: bool,
    output: Path,
    workers: Workers,
    log: Log,
) -> Manifest:
    """Encode and pack the text into the token store `output`."""
    config = TokenizeConfig(
        input=text.folder, tokenizer=tokenizer, block_len=block_len, by_source=by_source, allow_lossy=False
    )
    return tokenize(config, output=output, workers=workers, log=log)
