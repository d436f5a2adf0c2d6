"""Read raw text files: yield every document, and a Defect for everything that is none. Nothing is dropped silently.

The first bytes of a file tell its format: zstd, gzip, Parquet, a Git LFS pointer, a web page. A plain file with a text
suffix is one document; anything else is lines of JSON, `{"text": ..., "meta": {"redpajama_set_name": ...}}` or with
`source` and `id`. A line that is not a document becomes a Defect. A file that ends in the middle of a frame, which
zstandard, fsspec and datatrove read as if it were complete, raises BadFileError after its readable part.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

from btlm_jax.corpus.readers.frames import (
    CHUNK,
    BadFileError,
    decompress_frames,
    gzip_decompressor,
    split_lines,
    zstd_decompressor,
)
from btlm_jax.corpus.readers.records import SOURCE_KEY, Record
from btlm_jax.corpus.readers.tables import TFDS_SHARD, arrow_rows, parquet_rows, tfds_rows

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".zst", ".parquet", ".arrow", *TEXT_SUFFIXES)
_HEAD_BYTES = 200  # of a Defect
_MAX_DEPTH = 200  # of nested JSON; orjson writes up to 254
_ZSTD, _GZIP, _PARQUET = b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"PAR1"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a first byte of 0x50 to 0x5f
_LFS = b"version https://git-lfs"
_HTML = (b"<!doctype html", b"<html")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defect:
    """An unusable line or file: where it is and why."""

    file: str
    line: int  # from 1; 0: the file as a whole
    offset: int  # of the line's first byte in the decompressed file
    reason: str
    head: str  # the first 200 bytes


def read_raw(path: Path, *, name: str, default_source: str) -> Iterator[Record | Defect]:
    """Yield the documents and the defects of one file, in order.

    `name` is the file's in ids and defects; `default_source` is the source of documents that do not name theirs.

    Raises:
      BadFileError: it is cut short, damaged, or not a file of documents.
    """
    with open(path, "rb") as file:
        head = file.read(64)
        file.seek(0)
        if head.startswith(_LFS):
            raise BadFileError("it is a Git LFS pointer, not the data; fetch it with git lfs pull")
        if head.lstrip().lower().startswith(_HTML):
            raise BadFileError("it is a web page, not data; the download gave an error page")
        if head.startswith(_PARQUET):
            yield from _from_rows(parquet_rows(file), name=name, default_source=default_source)
        elif name.endswith(".arrow"):
            yield from _from_rows(arrow_rows(file), name=name, default_source=default_source)
        elif TFDS_SHARD.fullmatch(name):
            yield from _from_rows(tfds_rows(path), name=name, default_source=default_source)
        elif name.endswith(TEXT_SUFFIXES):
            yield from _from_text(file.read(), name=name, default_source=default_source)
        else:
            yield from _from_lines(_chunks(file, head=head, name=name), name=name, default_source=default_source)


def is_raw(name: str) -> bool:
    """Return whether a file of that name in a folder is read as raw text."""
    return name.endswith(SUFFIXES) or TFDS_SHARD.fullmatch(name) is not None


def are_plain_lines(head: bytes) -> bool:
    """Return whether a file with this beginning is neither compressed, nor Parquet, nor a known kind of wrong file."""
    return not (
        head.startswith((_ZSTD, _GZIP, _PARQUET, _LFS))
        or _is_skippable(head)
        or head.lstrip().lower().startswith(_HTML)
    )


def _is_skippable(head: bytes) -> bool:
    return head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5


def _chunks(file: BinaryIO, *, head: bytes, name: str) -> Iterator[bytes]:
    if head.startswith(_ZSTD) or _is_skippable(head):
        yield from decompress_frames(file, zstd_decompressor)
    elif head.startswith(_GZIP):
        yield from decompress_frames(file, gzip_decompressor)
    elif name.endswith((".zst", ".gz", ".parquet")):
        problem = "its contents are not that" if head else "it is empty"
        raise BadFileError(f"its name ends in {Path(name).suffix}, but {problem}")
    else:
        while chunk := file.read(CHUNK):
            yield chunk


def _from_lines(chunks: Iterator[bytes], *, name: str, default_source: str) -> Iterator[Record | Defect]:
    parse = functools.partial(_parse_line, name=name, default_source=default_source)
    return filter(None, map(parse, split_lines(chunks)))  # unlike a loop, this keeps no line, which may be long


def _parse_line(numbered_line: tuple[int, int, bytes], *, name: str, default_source: str) -> Record | Defect | None:
    """Return the document or the defect of a line; None if it is empty."""
    number, offset, line = numbered_line
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return None
    try:
        return _record(_parse_json(line), default_id=f"{name}:{number}", default_source=default_source)
    except ValueError as error:
        head = line[:_HEAD_BYTES].decode("utf-8", "replace")
        return Defect(file=name, line=number, offset=offset, reason=str(error), head=head)


def _parse_json(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as strict_error:
        try:
            return _without_lone_surrogates(json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {strict_error}") from error


def _without_lone_surrogates(value: object) -> object:
    """Replace lone surrogates, which JSON can express and UTF-8 cannot, by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_lone_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_lone_surrogates(key): _without_lone_surrogates(item) for key, item in value.items()}
    return value


def _record(body: object, *, default_id: str, default_source: str) -> Record:
    if not isinstance(body, dict):
        raise ValueError(f"not an object but {type(body).__name__}")
    text = body.get("text")
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise ValueError(f"text is {kind}" if "text" in body else "there is no text")
    meta = body.get("meta")
    meta = meta if isinstance(meta, dict) else {} if meta is None else {"meta": meta}
    others = {key: value for key, value in body.items() if key not in ("text", "meta", "id", "source")}
    if _is_deep(others) or _is_deep(meta):
        raise ValueError(f"its values are nested more than {_MAX_DEPTH} deep")
    source = body.get("source")
    source = source if isinstance(source, str) else meta.get(SOURCE_KEY)
    document = body.get("id")
    return Record(
        id=str(document) if isinstance(document, str | int) else default_id,
        source=source if isinstance(source, str) and source else default_source,
        text=text,
        meta=others | meta,
    )


def _is_deep(value: object) -> bool:
    """Return whether lists and dicts are nested more than _MAX_DEPTH deep, where readers and writers of JSON fail."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _from_text(data: bytes, *, name: str, default_source: str) -> Iterator[Record | Defect]:
    try:
        yield Record(id=name, source=default_source, text=data.decode("utf-8-sig"), meta={})
    except UnicodeDecodeError as error:
        head = data[:_HEAD_BYTES].decode("utf-8", "replace")
        reason = f"not UTF-8: byte 0x{data[error.start]:02x} at {error.start}"
        yield Defect(file=name, line=1, offset=0, reason=reason, head=head)


def _from_rows(rows: Iterator[dict], *, name: str, default_source: str) -> Iterator[Record | Defect]:
    for number, body in enumerate(rows, start=1):
        try:
            yield _record(body, default_id=f"{name}:{number}", default_source=default_source)
        except ValueError as error:
            yield Defect(file=name, line=number, offset=0, reason=str(error), head=str(body)[:_HEAD_BYTES])
