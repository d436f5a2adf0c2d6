"""The files that stages exchange: documents in `.jsonl.zst`, arrays in `.npy`. Raw input files are raw.py's subject.

A document is a line of JSON as in SlimPajama, with `id` and `source` added. A `.jsonl.zst` file consists of zstd frames
of about 16 MB of text, each with a checksum. Files get their name only when they are complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import orjson
import zstandard

from btlm_jax.corpus.readers.frames import (
    BadFileError,
    LineTooLongError,
    decompress_frames,
    split_lines,
    zstd_decompressor,
)
from btlm_jax.storage.files import AtomicFile

SUFFIX = ".jsonl.zst"
SOURCE_KEY = "redpajama_set_name"  # of a document's source inside "meta", from SlimPajama
FRAME_BYTES = 16_000_000
SHARD_BYTES = 128_000_000  # of lines in a file: bounds the memory of later stages, however large the raw files are
_LEVEL = 3  # SlimPajama's
_PIECE_CHARACTERS = 1 << 20  # encoded at a time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One document."""

    id: str
    source: str
    text: str
    meta: dict

    @property
    def num_bytes(self) -> int:
        return sum(map(len, utf8_pieces(self.text)))


def utf8_pieces(text: str) -> Iterator[bytes]:
    """Yield a text in UTF-8, in pieces, so that memory does not grow with it."""
    for start in range(0, len(text), _PIECE_CHARACTERS):
        yield text[start : start + _PIECE_CHARACTERS].encode()


def record_to_line(record: Record) -> bytes:
    """Return the document as a line of JSON with its newline."""
    body = {
        "text": record.text,
        "meta": {**record.meta, SOURCE_KEY: record.source},
        "id": record.id,
        "source": record.source,
    }
    try:
        return orjson.dumps(body, default=str, option=orjson.OPT_APPEND_NEWLINE)  # str: Parquet has dates and times
    except TypeError:  # an integer of more than 64 bits in meta
        return json.dumps(body, ensure_ascii=False, default=str).encode() + b"\n"


def batch_records(records: Iterable[Record], *, num_characters: int) -> Iterator[list[Record]]:
    """Yield lists of documents, each ended by the document with which its texts reach `num_characters`."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.text)
        if size >= num_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_records(path: Path) -> Iterator[Record]:
    """Yield the documents of a file that a stage wrote.

    Raises:
      ValueError: it is damaged or cut short.
    """
    try:
        with open(path, "rb") as file:
            lines = split_lines(decompress_frames(file, zstd_decompressor), max_bytes=math.inf)
            yield from map(_parse_record, lines)  # unlike a loop, keeps no record
    except (BadFileError, orjson.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it and its record under done/, and run again") from error


def _parse_record(numbered_line: tuple[int, int, bytes | LineTooLongError]) -> Record:
    line = numbered_line[2]
    assert isinstance(line, bytes), "there is no limit"
    body = orjson.loads(line)
    return Record(id=body["id"], source=body["source"], text=body["text"], meta=body["meta"])


class ShardWriter:
    """Writes files `stem-000.jsonl.zst`, `stem-001.jsonl.zst`, ...; `outputs` are their manifest entries."""

    def __init__(self, directory: Path, *, stem: str):
        self._directory, self._stem = directory, stem
        self._writer: RecordWriter | None = None
        self.outputs: list[dict] = []

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, record: Record) -> None:
        """Append a document."""
        if self._writer is None:
            path = self._directory / f"{self._stem}-{len(self.outputs):03d}{SUFFIX}"
            self._writer = RecordWriter(path, frame_bytes=FRAME_BYTES)
            self._writer.__enter__()
        self._writer.add(record)
        if self._writer.num_line_bytes >= SHARD_BYTES:
            self.__exit__(None, None, None)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, traceback)
            if kind is None:
                self.outputs.append(output_entry(self._writer, num_documents=self._writer.num_documents))
            self._writer = None


def output_entry(file: AtomicFile, *, num_documents: int) -> dict:
    """Return the manifest entry of a written file."""
    return {
        "file": file.path.name,
        "num_documents": num_documents,
        "num_bytes": file.path.stat().st_size,
        "sha256": file.sha256,
    }


class RecordWriter(AtomicFile):
    """A `.jsonl.zst` file being written."""

    def __init__(self, path: Path, *, frame_bytes: int):
        super().__init__(path)
        self._frame_bytes = frame_bytes
        self._lines: list[bytes] = []
        self._size = 0
        self.num_documents = self.num_line_bytes = 0

    def add(self, record: Record) -> None:
        """Append a document."""
        line = record_to_line(record)
        self._lines.append(line)
        self._size += len(line)
        self.num_line_bytes += len(line)
        self.num_documents += 1
        if self._size >= self._frame_bytes:
            self._end_frame()

    def _end_frame(self) -> None:
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        self.write(compressor.compress(b"".join(self._lines)))
        self._lines, self._size = [], 0

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None and self._lines:
                self._end_frame()
        except BaseException as write_error:
            super().__exit__(type(write_error), write_error, write_error.__traceback__)
            raise
        super().__exit__(kind, error, traceback)


def save_array(directory: Path, stem: str, array: np.ndarray) -> dict:
    """Write `stem.npy` and return its manifest entry."""
    with AtomicFile(directory / f"{stem}.npy") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
    return output_entry(file, num_documents=0)


def load_array(directory: Path, stem: str) -> np.ndarray:
    """Return an array of a stage, memory-mapped: only what is used is read, and its file is open as long as it lives.

    Of a corpus's arrays, which may be more than a process may have open, only one is kept at a time: copy what is used.
    """
    return np.load(directory / f"{stem}.npy", mmap_mode="r")


def join_arrays(directory: Path, stems: Sequence[str]) -> np.ndarray:
    """Return arrays of a stage, one after another along their first axis, in memory."""
    first = load_array(directory, stems[0])
    sizes = [len(load_array(directory, stem)) for stem in stems]
    joined, end = np.empty((sum(sizes), *first.shape[1:]), first.dtype), 0
    for stem, size in zip(stems, sizes, strict=True):
        joined[end : end + size] = load_array(directory, stem)
        end += size
    return joined
