"""Decompress streams of zstd frames or gzip members, check that the last one is complete, and split them into lines."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import zstandard

MAX_LINE_BYTES = 1 << 27  # far above any document; a file without newlines is not JSON lines, and memory is limited
CHUNK = 1 << 18


class BadFileError(ValueError):
    """A file cannot be read to its end; the message says why."""


class Decompressor(Protocol):
    """A decompressor of one frame, as zlib and zstandard have it."""

    def decompress(self, data: bytes, /) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


def zstd_decompressor() -> Decompressor:
    """Return a decompressor of one zstd frame with any window size."""
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def gzip_decompressor() -> Decompressor:
    """Return a decompressor of one gzip member."""
    return zlib.decompressobj(wbits=31)  # gzip format, largest window


def decompress_frames(file: BinaryIO, make_decompressor: Callable[[], Decompressor]) -> Iterator[bytes]:
    """Yield the decompressed bytes of all frames of a file.

    Raises:
      BadFileError: the data is damaged, or the last frame is incomplete.
    """
    decompressor, is_open = make_decompressor(), False
    while data := file.read(CHUNK):
        while data:
            if not is_open and not data.strip(b"\0"):
                break  # gzip files may be padded
            try:
                chunk = decompressor.decompress(data)
            except (zstandard.ZstdError, zlib.error) as error:
                raise BadFileError(f"its compressed data is damaged: {error}") from error
            if chunk:
                yield chunk
            is_open, data = True, b""
            if decompressor.eof:
                data = decompressor.unused_data
                decompressor, is_open = make_decompressor(), False
    if is_open:
        raise BadFileError("it ends in the middle of its compressed data: it was cut short; fetch it again")


def split_lines(chunks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, offset, line without its newline) of each line.

    A long line is joined once, when it is complete, and not kept here.

    Raises:
      BadFileError: a line is over MAX_LINE_BYTES.
    """
    parts: list[bytes] = []
    size, number, offset = 0, 1, 0
    for chunk in chunks:
        *ends, remainder = chunk.split(b"\n")
        for end in ends:
            parts.append(end)
            size += len(end)
            yield number, offset, _join_and_clear(parts)
            number, offset, size = number + 1, offset + size + 1, 0
        if remainder:
            parts.append(remainder)
            size += len(remainder)
            if size > MAX_LINE_BYTES:
                raise BadFileError(f"line {number} is over {MAX_LINE_BYTES:,} bytes long: these are not lines of JSON")
    if parts:
        yield number, offset, _join_and_clear(parts)


def _join_and_clear(parts: list[bytes]) -> bytes:
    """Return the parts as one and empty the list."""
    line = b"".join(parts)
    parts.clear()
    return line
