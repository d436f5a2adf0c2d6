"""Random access to the records of a token store behind a URL: a record is one range of bytes of its shard.

Nothing is copied to this machine's disk, because a store of 627 B tokens is larger than most disks. The footer of a
shard lists the offsets of its records. It is read with the first record of the shard, and the offsets stay in memory:
4 bytes a record.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from btlm_jax.data.array_record import chunk_offsets, footer_offset, likely_tail_bytes, parse_record
from btlm_jax.data.store import Shard
from btlm_jax.storage.location import ByteRange, RangeReader, join_location


class RemoteRecords:
    """Random access to the records of shards behind a URL; safe to use from many threads."""

    def __init__(self, directory: str, shards: Sequence[Shard]):
        self._directory, self._shards = directory, shards
        self._ranges = RangeReader(directory)
        self._ends = list(itertools.accumulate(shard.num_blocks for shard in shards))
        self._chunks: dict[int, np.ndarray] = {}  # shard number -> offset of each chunk, and the end of the last one

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, records: Sequence[int]) -> Iterator[bytes]:
        """Read records, all in one request, and return an iterator that checks each and yields it.

        Raises:
          OSError: the shards cannot be read.
          ValueError: the footer of a shard is damaged. The iterator raises it for a damaged record.
        """
        shards = [bisect.bisect_right(self._ends, record) for record in records]
        self._find_chunks(sorted(set(shards) - self._chunks.keys()))
        ranges = []
        for record, shard in zip(records, shards, strict=True):
            number = record - self._ends[shard] + self._shards[shard].num_blocks
            begin, end = self._chunks[shard][number : number + 2].tolist()
            ranges.append(ByteRange(self._shards[shard].file, begin, end))
        chunks = self._ranges.read(ranges)
        return (parse_record(data, begin=each.begin) for data, each in zip(chunks, ranges, strict=True))

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
        begin = footer_offset(tail, file_bytes=shard.num_bytes)
        if shard.num_bytes - begin > len(tail):
            (tail,) = self._ranges.read([_tail(shard, num_bytes=shard.num_bytes - begin)])
        offsets = chunk_offsets(tail[len(tail) - (shard.num_bytes - begin) :], begin=begin)
        if len(offsets) != shard.num_blocks + 1:
            raise ValueError(f"it has {len(offsets) - 1:,} records, the manifest says {shard.num_blocks:,}")
        return offsets


def _tail(shard: Shard, *, num_bytes: int) -> ByteRange:
    return ByteRange(shard.file, max(shard.num_bytes - num_bytes, 0), shard.num_bytes)
