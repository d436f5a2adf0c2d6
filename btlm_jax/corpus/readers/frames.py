"""Decompress streams of frames and cut them into lines, insisting that every frame ends. Knows nothing of documents."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import zstandard

MAX_LINE_BYTES = 1 << 30  # a document of 100 MB is fine; a file without newlines is not lines
CHUNK = 1 << 18


class BadFile(ValueError):
    """A file that cannot be read to its end; the message says why."""


def zstd_decompressor() -> object:
    """Return what decompresses one zstd frame, with any window."""
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def gzip_decompressor() -> object:
    """Return what decompresses one gzip member."""
    return zlib.decompressobj(wbits=31)


def decompressed(file: BinaryIO, make: Callable) -> Iterator[bytes]:
    """Decompress frame after frame, and insist that the last one ends."""
    decompressor, is_open = make(), False
    while data := file.read(CHUNK):
        while data:
            if not is_open and not data.strip(b"\0"):
                break  # gzip files may be padded
            try:
                chunk = decompressor.decompress(data)
            except (zstandard.ZstdError, zlib.error) as error:
                raise BadFile(f"its compressed data is damaged: {error}") from error
            if chunk:
                yield chunk
            is_open, data = True, b""
            if decompressor.eof:
                data = decompressor.unused_data
                decompressor, is_open = make(), False
    if is_open:
        raise BadFile("it ends in the middle of its compressed data: it was cut short; fetch it again")


def lines_of(chunks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, offset, line); a long line is joined once, when it is whole, and not kept here."""
    parts: list[bytes] = []
    size, number, offset = 0, 1, 0
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            parts.append(end)
            size += len(end)
            yield number, offset, _taken(parts)
            number, offset, size = number + 1, offset + size + 1, 0
        if rest:
            parts.append(rest)
            size += len(rest)
            if size > MAX_LINE_BYTES:
                raise BadFile(f"line {number} is over {MAX_LINE_BYTES:,} bytes long: these are not lines of JSON")
    if parts:
        yield number, offset, _taken(parts)


def _taken(parts: list[bytes]) -> bytes:
    """Empty a list and return its parts as one."""
    line = b"".join(parts)
    parts.clear()
    return line
