"""The bytes of an ArrayRecord file, to read single records by ranges of bytes, which its library cannot do with a URL.

A file is a sequence of chunks: one a record (`group_size:1`), then the footer, which lists the offsets of the records'
chunks, then the postscript in the last 64 KiB, which has the offset of the footer. A block header of 24 bytes is
inserted every 64 KiB.
https://github.com/google/array_record/blob/main/cpp/layout.proto
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import zstandard

from btlm_jax.data.highwayhash import highway_hash_64
from btlm_jax.storage.protobuf import read_fields, read_varint, read_varints

POSTSCRIPT_BYTES = _BLOCK = 1 << 16
_BLOCK_HEADER = 24
_HASH_KEY = struct.unpack("<4Q", b"Riegeli/records\n" * 2)
_HEADER = struct.Struct("<QQQB7sQ")  # of a chunk: its hash, size and hash of the data, type, records, decoded size
_SIMPLE = ord("r")
_UNCOMPRESSED, _ZSTD = 0, ord("z")
_MAGIC = 0x71930E704FDAE05E


def likely_tail_bytes(num_records: int) -> int:
    """Return how many bytes at a file's end hold its footer in most cases; measured: 6 compressed bytes a record."""
    return 2 * POSTSCRIPT_BYTES + 8 * num_records


def footer_offset(tail: bytes, *, file_bytes: int) -> int:
    """Return the offset of the footer, from the last bytes of a file: its postscript at least.

    Raises:
      ValueError: the file does not end as an ArrayRecord file does.
    """
    begin = file_bytes - POSTSCRIPT_BYTES
    if begin < 0 or begin % _BLOCK or len(tail) < POSTSCRIPT_BYTES:
        raise ValueError("it is no ArrayRecord file")
    fields = dict(read_fields(_chunk(tail[-POSTSCRIPT_BYTES:], begin=begin)[0]))  # its record is there three times
    offset = fields.get(1)
    if fields.get(2) != _MAGIC or not isinstance(offset, int) or not 0 < offset < begin:
        raise ValueError("its postscript is not that of an ArrayRecord file")
    return offset


def chunk_offsets(footer: bytes, *, begin: int) -> np.ndarray:
    """Return the offset of each record's chunk, and the end of the last one.

    `footer` are the bytes of the file from `begin`, the footer's offset, on.

    Raises:
      ValueError: it is damaged, or has chunks of several records.
    """
    _, *chunks = _chunk(footer, begin=begin)
    fields = [dict(read_fields(chunk)) for chunk in chunks]
    if any(chunk.get(3) != 1 for chunk in fields):
        raise ValueError("its records are not one a chunk (group_size:1)")
    offsets = np.array([*(chunk.get(1, 0) for chunk in fields), begin], np.min_scalar_type(begin))
    if np.any(offsets[1:] <= offsets[:-1]):
        raise ValueError("its footer is not in order")
    return offsets


def parse_record(data: bytes, *, begin: int) -> bytes:
    """Return the record of a chunk; `data` are the bytes of the file from `begin`, the chunk's offset, on.

    Raises:
      ValueError: it is damaged, or not a chunk of one record.
    """
    records = _chunk(data, begin=begin)
    if len(records) != 1:
        raise ValueError(f"its chunk at byte {begin:,} has {len(records)} records")
    return records[0]


def _chunk(data: bytes, *, begin: int) -> list[bytes]:
    """Return the records of the chunk at offset `begin` of the file; `data` are the bytes from there on."""
    chunk = b"".join(_without_block_headers(data, begin=begin))
    if len(chunk) < _HEADER.size:
        raise ValueError(f"its chunk at byte {begin:,} is cut short")
    header_hash, data_size, data_hash, kind, count, decoded_size = _HEADER.unpack_from(chunk)
    body = memoryview(chunk)[_HEADER.size : _HEADER.size + data_size]
    if header_hash != highway_hash_64(chunk[8 : _HEADER.size], key=_HASH_KEY):
        raise ValueError(f"the header of its chunk at byte {begin:,} does not have its hash")
    if len(body) != data_size or data_hash != highway_hash_64(body, key=_HASH_KEY):
        raise ValueError(f"its chunk at byte {begin:,} does not have its hash")
    if kind != _SIMPLE:
        raise ValueError(f"its chunk at byte {begin:,} is of type {kind}; only simple chunks can be read by ranges")
    compression, (size, values_begin) = body[0], read_varint(body, 1)
    values_begin, sizes = values_begin + size, body[values_begin : values_begin + size]
    sizes = list(read_varints(_decompressed(sizes, compression)))
    values = _decompressed(body[values_begin:], compression)
    if len(sizes) != int.from_bytes(count, "little") or sum(sizes) != decoded_size or decoded_size != len(values):
        raise ValueError(f"its chunk at byte {begin:,} has other sizes than its header")
    ends = np.cumsum(sizes).tolist()
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _without_block_headers(data: bytes, *, begin: int) -> Iterator[bytes]:
    start = 0
    for header in range(-begin % _BLOCK, len(data), _BLOCK):
        yield data[start:header]
        start = header + _BLOCK_HEADER
    yield data[start:]


def _decompressed(data: memoryview, compression: int) -> bytes:
    if compression == _UNCOMPRESSED:
        return bytes(data)
    if compression != _ZSTD:
        raise ValueError(f"it is compressed by {chr(compression)!r}; only zstd and none can be read by ranges")
    size, start = read_varint(data, 0)
    try:
        return zstandard.ZstdDecompressor().decompress(data[start:], max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(f"its compressed data is damaged: {error}") from error
