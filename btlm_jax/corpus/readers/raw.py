"""Read raw text files: yield every document, and a Defect for everything that is none. Nothing is dropped silently.

The first bytes of a file tell its format: zstd, gzip, Parquet, a Git LFS pointer, a web page. A plain file with a text
suffix is one document, or if it is long several; so is one with a suffix that says nothing, which is read only if it is
named itself. Anything else is lines of JSON, `{"text": ..., "meta": {"redpajama_set_name": ...}}` or with `source` and
`id`. A line that is not a document becomes a Defect. A file that ends in the middle of a frame, which
zstandard, fsspec and datatrove read as if it were complete, raises BadFileError after its readable part.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

from btlm_jax.corpus.readers.frames import (
    CHUNK,
    HEAD_BYTES,
    BadFileError,
    LineTooLongError,
    decompress_frames,
    gzip_decompressor,
    split_lines,
    zstd_decompressor,
)
from btlm_jax.corpus.readers.records import SOURCE_KEY, Record, utf8_pieces
from btlm_jax.corpus.readers.tables import TFDS_SHARD, arrow_rows, parquet_rows, tfds_rows

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".zst", ".parquet", ".arrow", *TEXT_SUFFIXES)
TEXT_KEY_FLAG = "--text_key"
_JSON_SUFFIXES = (".json", ".ndjson")  # of lines of JSON too, where the file is named itself
MAX_LINE_BYTES = 1 << 27  # of a line of JSON, and of a text in a table: far above any document, and memory is limited
TEXT_BYTES = 16_000_000  # a text file is read in documents of at most so much, so that memory does not grow with it
_METADATA = ("state.json", "dataset_info.json", "dataset_dict.json", "features.json")
_TRIED_LINES = 100  # of a file, until one is JSON
_MAX_DEPTH = 200  # of nested JSON; orjson writes up to 254
_ZSTD, _GZIP, _PARQUET = b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"PAR1"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a first byte of 0x50 to 0x5f
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LFS = b"version https://git-lfs"
_HTML = (b"<!doctype html", b"<html")
_BINARY_BYTES = 8000  # a NUL among the first so many makes a file binary, as for git
_NumberedLine = tuple[int, int, bytes | LineTooLongError]  # number, offset, line
_LONG_NUMBER = re.compile(rb"[0-9]{19}")  # orjson reads integers of more than 64 bits as floats
# What a document's other values cannot keep, as counted in `repairs`.
LONE_SURROGATES, NOT_FINITE, LONG_INTEGERS = (
    "lone surrogates became U+FFFD",
    "NaN and infinities became null",
    "integers over 64 bits became text",
)
UNUSABLE_IDS = "ids that are neither text nor an integer were replaced by the file and line"
UNUSABLE_SOURCES = "sources that are not text were not used"
SAME_KEYS = "keys beside meta that are in meta too, with another value, were dropped"
LONG_TEXT = f"text files read as several documents, being longer than {TEXT_BYTES:,} bytes"
PLAIN_TEXT = "files of another kind read as plain text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """Which keys (of JSON) or columns (of tables) have a document's parts; a.b is the key b inside a."""

    text: str = "text"
    id: str = "id"
    source: str = ""  # "": `source`, or else meta.redpajama_set_name

    def __post_init__(self):
        if not self.text:
            raise ValueError("the key of the text is empty; give its name")

    @property
    def sources(self) -> tuple[str, ...]:
        """The keys of the source, the one that counts first."""
        return (self.source,) if self.source else ("source", f"meta.{SOURCE_KEY}")

    @property
    def all(self) -> tuple[str, ...]:
        return (self.text, self.id, *self.sources)


DEFAULT_KEYS = Keys()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defect:
    """An unusable line or file: where it is and why."""

    file: str
    line: int  # from 1; 0: the file as a whole
    offset: int  # of the line's first byte in the decompressed file
    reason: str
    head: str  # the first 200 bytes


def read_raw(
    path: Path,
    *,
    name: str,
    default_source: str,
    is_piece: bool = False,
    keys: Keys = DEFAULT_KEYS,
    key_flag: str = TEXT_KEY_FLAG,
    repairs: Counter | None = None,
) -> Iterator[Record | Defect]:
    """Yield the documents and the defects of one file, in order.

    `name` is the file's in ids and defects; `default_source` is the source of documents that do not name theirs.
    A piece of a file is plain lines of JSON, whatever its first bytes are.
    `key_flag` is the flag that names the text's key, for errors. `repairs` counts documents with values that had to be
    changed, by what was changed.

    Raises:
      BadFileError: it is cut short, damaged, or not a file of documents.
    """
    repairs = Counter() if repairs is None else repairs
    make = _RecordMaker(keys, name=name, default_source=default_source, key_flag=key_flag, repairs=repairs)
    with open(path, "rb") as file:
        head = b"" if is_piece else _head(file)
        if is_piece:
            yield from make.of_lines(_lines(file, head=head, name=name))
        elif head.startswith(_PARQUET):
            yield from make.of_table(parquet_rows, file)
        elif has_suffix(name, ".arrow"):
            yield from make.of_table(arrow_rows, file)
        elif TFDS_SHARD.fullmatch(name):
            yield from make.of_rows(tfds_rows(path, columns=keys.all, repairs=repairs))
        elif has_suffix(name, TEXT_SUFFIXES) or _is_plain_text(name, head):
            make.repairs.update([PLAIN_TEXT] if not has_suffix(name, TEXT_SUFFIXES) else [])
            yield from _from_text(file, name=name, default_source=default_source, repairs=make.repairs)
        else:
            yield from make.of_lines(_lines(file, head=head, name=name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line of JSON."""

    value: object
    file: str
    line: int  # from 1
    offset: int  # of its first byte in the decompressed file
    head: str  # the first 200 bytes

    def defect(self, reason: str) -> Defect:
        """Return the line as one that cannot be used."""
        return Defect(file=self.file, line=self.line, offset=self.offset, reason=reason, head=self.head)


def read_objects(path: Path, *, name: str, is_piece: bool, repairs: Counter) -> Iterator[Line | Defect]:
    """Yield each line of JSON of a file, compressed or not; in place of another line a Defect.

    `name`, `is_piece` and `repairs` are as for `read_raw`.

    Raises:
      BadFileError: it is cut short, damaged, or no file of lines.
    """
    with open(path, "rb") as file:
        head = b"" if is_piece else _head(file)
        if head.startswith(_PARQUET) or has_suffix(name, (".arrow", *TEXT_SUFFIXES)):
            raise BadFileError("it has no lines of JSON")
        for number, offset, line in _lines(file, head=head, name=name):
            if isinstance(line, LineTooLongError):
                yield Defect(file=name, line=number, offset=offset, reason=str(line), head=_shown(line.head))
                continue
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not line.strip():
                continue
            shown = _shown(line)
            try:
                value = _parse_json(line, repairs)
            except ValueError as error:
                yield Defect(file=name, line=number, offset=offset, reason=str(error), head=shown)
                continue
            yield Line(value=value, file=name, line=number, offset=offset, head=shown)


def first_object(file: BinaryIO, *, name: str) -> object:
    """Return the value of the first line that is JSON, [] if the file is one array over several lines.

    None: it is no file of such lines, or the first of them are not JSON.
    """
    try:
        head = _head(file)
        if head.startswith(_PARQUET) or has_suffix(name, (".arrow", *TEXT_SUFFIXES)) or TFDS_SHARD.fullmatch(name):
            return None
        if _is_plain_text(name, head):
            return None
        for number, _, line in itertools.islice(_lines(file, head=head, name=name), _TRIED_LINES):
            if isinstance(line, LineTooLongError):
                continue
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            with contextlib.suppress(ValueError):
                if line.strip():
                    return _parse_json(line, Counter())
            if number == 1 and line.lstrip().startswith(b"["):
                return []
    except ValueError:  # whoever reads the file says what is wrong with it
        return None
    return None


def _head(file: BinaryIO) -> bytes:
    """Return the first bytes of a file without a byte order mark; go back to its beginning.

    Raises:
      BadFileError: they are of something that is never data.
    """
    head = file.read(64).removeprefix(_BYTE_ORDER_MARK)
    file.seek(0)
    if head.startswith(_LFS):
        raise BadFileError("it is a Git LFS pointer, not the data; fetch it with git lfs pull")
    if head.lstrip().lower().startswith(_HTML):
        raise BadFileError("it is a web page, not data; the download gave an error page")
    return head


def has_suffix(name: str, suffixes: str | tuple[str, ...]) -> bool:
    """Return whether a file's name ends so, in capitals or in small letters."""
    return name.lower().endswith(suffixes)


def is_raw(name: str) -> bool:
    """Return whether a file of that name in a folder is read as raw text."""
    return has_suffix(name, SUFFIXES) or TFDS_SHARD.fullmatch(name) is not None


def is_metadata(name: str) -> bool:
    """Return whether a file of that name describes a dataset of Hugging Face or TFDS, beside its data."""
    return name.rsplit("/", 1)[-1] in _METADATA


def are_plain_lines(head: bytes) -> bool:
    """Return whether a file with this beginning is neither compressed, nor Parquet, nor a known kind of wrong file."""
    return not (
        head.startswith((_ZSTD, _GZIP, _PARQUET, _LFS))
        or _is_skippable(head)
        or head.lstrip().lower().startswith(_HTML)
    )


def _is_skippable(head: bytes) -> bool:
    return head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5


def _lines(file: BinaryIO, *, head: bytes, name: str) -> Iterator[_NumberedLine]:
    return split_lines(_chunks(file, head=head, name=name), max_bytes=MAX_LINE_BYTES)


def _chunks(file: BinaryIO, *, head: bytes, name: str) -> Iterator[bytes]:
    if head.startswith(_ZSTD) or _is_skippable(head):
        yield from decompress_frames(file, zstd_decompressor)
    elif head.startswith(_GZIP):
        yield from decompress_frames(file, gzip_decompressor)
    elif has_suffix(name, (".zst", ".gz", ".parquet")):
        problem = "its contents are not that" if head else "it is empty"
        raise BadFileError(f"its name ends in {Path(name).suffix}, but {problem}")
    else:
        while chunk := file.read(CHUNK):
            yield chunk


@dataclasses.dataclass(frozen=True)
class _RecordMaker:
    """Makes documents of JSON objects and of tables' rows."""

    keys: Keys
    name: str  # of the file
    default_source: str
    key_flag: str
    repairs: Counter

    def record(self, body: object, *, number: int) -> Record:
        """Return the document of line or row `number`.

        Raises:
          ValueError: it is none.
        """
        if not isinstance(body, dict):
            raise ValueError(f"not an object but {type(body).__name__}")
        text = _value(body, self.keys.text)
        if not isinstance(text, str):
            raise ValueError(_no_text(body, text, key=self.keys.text, flag=self.key_flag))
        if 4 * len(text) > MAX_LINE_BYTES and (size := sum(map(len, utf8_pieces(text)))) > MAX_LINE_BYTES:
            raise ValueError(f"its text is too long: {size:,} bytes, and {MAX_LINE_BYTES:,} are the most")
        body = _without(body, self.keys.text)
        meta = body.get("meta")
        meta = meta if isinstance(meta, dict) else {} if meta is None else {"meta": meta}
        parts = {"meta", self.keys.id, *self.keys.sources}
        others = {key: value for key, value in body.items() if key not in parts}
        if _is_deep(others) or _is_deep(meta):
            raise ValueError(f"its values are nested more than {_MAX_DEPTH} deep")
        if any(meta[key] != others[key] for key in others.keys() & meta.keys()):
            self.repairs[SAME_KEYS] += 1
        sources = [source for key in self.keys.sources if (source := _value(body, key)) is not None]
        source = next((source for source in sources if isinstance(source, str)), None)
        if sources and source is None:
            self.repairs[UNUSABLE_SOURCES] += 1
        document = _value(body, self.keys.id)
        has_id = isinstance(document, str | int)
        if not has_id and document is not None:
            self.repairs[UNUSABLE_IDS] += 1
        return Record(
            id=str(document) if has_id else f"{self.name}:{number}",
            source=source or self.default_source,
            text=text,
            meta=others | meta,
        )

    def of_lines(self, lines: Iterator[_NumberedLine]) -> Iterator[Record | Defect]:
        """Yield the documents and the defects of lines of JSON."""
        # Unlike a loop, this keeps no line, which may be long.
        yield from filter(None, map(functools.partial(_parse_line, make=self), lines))

    def of_table(self, read: Callable[..., Iterator[dict | ValueError]], file: BinaryIO) -> Iterator[Record | Defect]:
        """Yield the documents and the defects of a table, of which `read` reads the columns that are needed."""
        left_out: set[str] = set()
        rows = read(
            file, columns=self.keys.all, needed=self.keys.text, key_flag=self.key_flag, left_out=left_out
        )  # fmt: skip
        yield from self.of_rows(rows)
        self.repairs.update(f"tables without their column {column}" for column in left_out)

    def of_rows(self, rows: Iterator[dict | ValueError]) -> Iterator[Record | Defect]:
        """Yield the documents and the defects of rows."""
        for number, body in enumerate(rows, start=1):
            try:
                if isinstance(body, ValueError):
                    raise body
                yield self.record(body, number=number)
            except ValueError as error:
                yield self.defect(error, number=number, offset=0, head=str(body)[:HEAD_BYTES])

    def defect(self, error: ValueError, *, number: int, offset: int, head: str) -> Defect:
        return Defect(file=self.name, line=number, offset=offset, reason=str(error), head=head)


def _value(body: dict, key: str) -> object:
    """Return the value of a key, or of a.b the value of b inside a; None if there is none."""
    if key in body or "." not in key:
        return body.get(key)
    outer, inner = key.split(".", 1)
    value = body.get(outer)
    return _value(value, inner) if isinstance(value, dict) else None


def _without(body: dict, key: str) -> dict:
    """Return a copy of an object without the value that `_value` finds."""
    if key in body or "." not in key:
        return {other: value for other, value in body.items() if other != key}
    outer, inner = key.split(".", 1)
    return body | {outer: _without(body[outer], inner)}


def _no_text(body: dict, text: object, *, key: str, flag: str) -> str:
    if text is not None:
        return f"{key} is {type(text).__name__}"
    if key in body:
        return f"{key} is null"
    texts = [other for other, value in body.items() if isinstance(value, str)]
    return f"there is no {key}" + (f"; {flag} names another key, such as {texts[0]}" if texts else "")


def _parse_line(numbered_line: _NumberedLine, *, make: _RecordMaker) -> Record | Defect | None:
    """Return the document or the defect of a line; None if it is empty."""
    number, offset, line = numbered_line
    if isinstance(line, LineTooLongError):
        return make.defect(line, number=number, offset=offset, head=_shown(line.head))
    if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
    if not line.strip():
        return None
    try:
        return make.record(_parse_json(line, make.repairs), number=number)
    except ValueError as error:
        return make.defect(error, number=number, offset=offset, head=_shown(line))


def _shown(line: bytes) -> str:
    """Return the beginning of a line for its Defect."""
    return line[:HEAD_BYTES].decode("utf-8", "replace")


def _parse_json(line: bytes, repairs: Counter) -> object:
    try:
        body = orjson.loads(line)
        if not _LONG_NUMBER.search(line):
            return body
    except orjson.JSONDecodeError as strict_error:
        reason = str(strict_error)
    else:
        reason = ""
    try:
        found = set()
        body = _plain(json.loads(line.decode("utf-8")), found)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {reason or error}") from error
    repairs.update(found)
    return body


def _plain(value: object, found: set[str]) -> object:
    """Return a JSON value with what orjson or UTF-8 cannot express replaced; add what was replaced to `found`."""
    if isinstance(value, str):
        plain = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found |= {LONE_SURROGATES} if plain != value else set()
        return plain
    if isinstance(value, list):
        return [_plain(item, found) for item in value]
    if isinstance(value, dict):
        return {_plain(key, found): _plain(item, found) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        found.add(NOT_FINITE)
        return None
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        found.add(LONG_INTEGERS)
        return str(value)
    return value


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


def _is_plain_text(name: str, head: bytes) -> bool:
    """Return whether a file whose suffix says nothing is text, and no lines of JSON nor compressed."""
    is_known = is_raw(name) or has_suffix(name, _JSON_SUFFIXES)
    return not is_known and are_plain_lines(head) and not head.lstrip().startswith(b"{")


def _from_text(file: BinaryIO, *, name: str, default_source: str, repairs: Counter) -> Iterator[Record | Defect]:
    """Yield a text file as one document; as several, which end at a line's end if they can, if it is long."""
    data, offset = file.read(TEXT_BYTES + 1), 0
    is_whole = len(data) <= TEXT_BYTES
    repairs.update([LONG_TEXT] if not is_whole else [])
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        reason = "it is UTF-16, and UTF-8 is read; iconv -f UTF-16 -t UTF-8 makes it so"
        yield Defect(file=name, line=0, offset=0, reason=reason, head="")
        return
    if b"\0" in data[:_BINARY_BYTES]:
        yield Defect(file=name, line=0, offset=0, reason="it is binary, not text: it has NUL bytes", head="")
        return
    while data or is_whole:
        end = len(data) if len(data) <= TEXT_BYTES else _end_of_piece(data)
        piece, data = data[:end], data[end:]
        try:
            text = piece.decode("utf-8" if offset else "utf-8-sig")
            yield Record(id=name if is_whole else f"{name}@{offset}", source=default_source, text=text, meta={})
            del text  # here and below: to hold as few copies of a piece as possible
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: byte 0x{piece[error.start]:02x} at {offset + error.start}"
            yield Defect(file=name, line=1 if is_whole else 0, offset=offset, reason=reason, head=_shown(piece))
        del piece
        if is_whole:
            return
        offset += end
        data += file.read(TEXT_BYTES + 1 - len(data))


def _end_of_piece(data: bytes) -> int:
    """Return where the first piece of a long text ends: if possible after a newline or a space of its second half."""
    for separator in (b"\n", b" "):
        if (place := data.rfind(separator, TEXT_BYTES // 2, TEXT_BYTES)) >= 0:
            return place + 1
    end = TEXT_BYTES
    while end > TEXT_BYTES - 3 and data[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end
