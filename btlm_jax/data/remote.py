"""The records of a token store behind a URL, each read by the range of bytes that holds it.

Nothing is copied to this machine's disk: a store of 627 B tokens is larger than most. Where a record lies, the end of
its shard says, which is read when the first of its records is wanted, and kept: 4 bytes a record.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from btlm_jax.data.array_record import chunk_begins, footer_begin, likely_tail_bytes, only_record
from btlm_jax.data.store import Shard
from btlm_jax.storage.location import ByteRange, RangeReader, join_location


class RemoteRecords:
    """Random access to the records of shards behind a URL; safe to use from many threads."""

    def __init__(self, directory: str, shards: Sequence[Shard]):
        self._directory, self._shards = directory, shards
        self._ranges = RangeReader(directory)
        self._ends = list(itertools.accumulate(shard.num_blocks for shard in shards))
        self._chunks: dict[int, np.ndarray] = {}  # by number of the shard: where its chunks begin, and the last ends

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, records: Sequence[int]) -> Iterator[bytes]:
        """Read records, all at once, and return an iterator that checks each and gives it out.

        Raises:
          OSError: the shards cannot be read; at once.
          ValueError: at once, a shard's end is damaged; from the iterator, a record is.
        """
        shards = [bisect.bisect_right(self._ends, record) for record in records]
        self._find_chunks(sorted(set(shards) - self._chunks.keys()))
        parts = []
        for record, shard in zip(records, shards, strict=True):
            number = record - self._ends[shard] + self._shards[shard].num_blocks
            begin, end = self._chunks[shard][number : number + 2].tolist()
            parts.append(ByteRange(self._shards[shard].file, begin, end))
        found = self._ranges.read(parts)
        return (only_record(data, begin=part.begin) for data, part in zip(found, parts, strict=True))

    def _find_chunks(self, numbers: list[int]) -> None:
        shards = [self._shards[number] for number in numbers]
        tails = self._ranges.read([_tail(shard, num_bytes=likely_tail_bytes(shard.num_blocks)) for shard in shards])
        for number, shard, tail in zip(numbers, shards, tails, strict=True):
            try:
                self._chunks[number] = self._chunks_of(shard, tail)
            except ValueError as error:
                raise ValueError(
                    f"shard {join_location(self._directory, shard.file)} is unreadable: {error}; "
                    "restore the shard from its source, or rebuild the store"
                ) from error

    def _chunks_of(self, shard: Shard, tail: bytes) -> np.ndarray:
        begin = footer_begin(tail, file_bytes=shard.num_bytes)
        if shard.num_bytes - begin > len(tail):
            (tail,) = self._ranges.read([_tail(shard, num_bytes=shard.num_bytes - begin)])
        begins = chunk_begins(tail[len(tail) - (shard.num_bytes - begin) :], begin=begin)
        if len(begins) != shard.num_blocks + 1:
            raise ValueError(f"it has {len(begins) - 1:,} records, the manifest says {shard.num_blocks:,}")
        return begins


def _tail(shard: Shard, *, num_bytes: int) -> ByteRange:
    return ByteRange(shard.file, max(shard.num_bytes - num_bytes, 0), shard.num_bytes)
