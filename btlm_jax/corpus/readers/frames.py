"""Decompress streams of zstd frames or gzip members, check that the last one is complete, and split them into lines."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import zstandard

CHUNK = 1 << 18
HEAD_BYTES = 200  # shown of a line that cannot be used


class BadFileError(ValueError):
    """A file cannot be read to its end; the message says why."""


class LineTooLongError(ValueError):
    """What stands in the place of a line that is too long to be kept; `head` is its beginning."""

    def __init__(self, head: bytes, *, num_bytes: int, max_bytes: float):
        super().__init__(f"it is too long: {num_bytes:,} bytes, and {max_bytes:,} are the most")
        self.head = head


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


def split_lines(chunks: Iterator[bytes], *, max_bytes: float) -> Iterator[tuple[int, int, bytes | LineTooLongError]]:
    """Yield (number from 1, offset, line without its newline) of each line; an error for one over `max_bytes`.

    A long line is joined once, when it is complete, and not kept here.
    """
    parts: list[bytes] = []
    size, number, offset = 0, 1, 0
    for chunk in chunks:
        *ends, remainder = chunk.split(b"\n")
        for end in ends:
            parts.append(end)
            size += len(end)
            yield number, offset, _join_and_clear(parts, size=size, max_bytes=max_bytes)
            number, offset, size = number + 1, offset + size + 1, 0
        if remainder:
            parts.append(remainder)
            size += len(remainder)
            if size > max_bytes:
                parts[:] = [_head(parts)]  # the rest is only counted
    if parts:
        yield number, offset, _join_and_clear(parts, size=size, max_bytes=max_bytes)


def _join_and_clear(parts: list[bytes], *, size: int, max_bytes: float) -> bytes | LineTooLongError:
    """Return the parts of a line of `size` bytes as one, or what stands in its place, and empty the list."""
    too_long = size > max_bytes
    line = LineTooLongError(_head(parts), num_bytes=size, max_bytes=max_bytes) if too_long else b"".join(parts)
    parts.clear()
    return line


def _head(parts: list[bytes]) -> bytes:
    return b"".join(part[:HEAD_BYTES] for part in parts[:2])[:HEAD_BYTES]
