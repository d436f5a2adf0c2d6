"""Random access to a token store: block number -> its tokens, through Grain on ArrayRecord. Nothing here trains.

A record is a serialised `tf.train.Example`, so that TFDS can open the same files; it is parsed here with TFDS's own
protocol buffer, without TensorFlow. A store behind a URL is read by ranges of bytes (remote.py).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import grain
import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from btlm_jax.data import store
from btlm_jax.data.store import Manifest, Shard, Split, TokenBlock
from btlm_jax.storage.files import allow_open_files
from btlm_jax.storage.location import PathOrUrl, join_location


class Records(Protocol):
    """Random access to the serialised records of a split's shards."""

    def __len__(self) -> int: ...

    def read(self, records: Sequence[int]) -> Iterator[bytes]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FileInstruction:
    """A whole shard in Grain's terms; given its length, Grain does not open it before it is read."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class LocalRecords:
    """Random access to the records of shards on a disk; safe to use from many threads."""

    def __init__(self, directory: Path, shards: Sequence[Shard]):
        files = [
            _FileInstruction(
                filename=str(directory / shard.file),
                skip=0,
                take=shard.num_blocks,
                examples_in_shard=shard.num_blocks,
            )
            for shard in shards
        ]
        self._source = grain.sources.ArrayRecordDataSource(files)  # pyright: ignore[reportArgumentType] # frozen is fine
        self._num_records = sum(shard.num_blocks for shard in shards)

    def __len__(self) -> int:
        return self._num_records

    def read(self, records: Sequence[int]) -> Iterator[bytes]:
        """Return an iterator over records.

        Raises:
          RuntimeError: one is damaged; from the iterator.
        """
        return (self._source[record] for record in records)


class SplitReader:
    """Random access to the blocks of one split; safe to use from many threads."""

    def __init__(self, directory: PathOrUrl, *, manifest: Manifest, split: Split):
        self.split = split
        self.block_len = manifest.block_len
        self._directory = directory
        self._dtype = np.dtype(manifest.dtype)
        self._vocab_size = manifest.tokenizer.vocab_size
        self.eos_id = manifest.tokenizer.eos_id
        self.has_marks = store.EXAMPLES in manifest.features
        self._shard_ends = list(itertools.accumulate(shard.num_blocks for shard in split.shards))
        self._records = _open_records(directory, split.shards)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, block: int) -> TokenBlock:
        """Read one block; raises what `read_many` raises."""
        return self.read_many([block])[0]

    def read_many(self, blocks: Sequence[int]) -> list[TokenBlock]:
        """Read blocks; behind a URL all are asked for at once.

        Raises:
          OSError: they cannot be reached.
          ValueError: a block's record is unreadable or not a block of this store; names the shard and the block.
        """
        assert all(0 <= block < len(self) for block in blocks), f"a block of {blocks} is not one of {len(self)}"
        records = self._records.read(blocks)
        return [self._next(records, block) for block in blocks]

    def _next(self, records: Iterator[bytes], block: int) -> TokenBlock:
        try:
            example = tf_example_pb2.Example.FromString(  # pyright: ignore[reportAttributeAccessIssue] # made at import
                next(records)
            )
            feature = example.features.feature
            tokens = np.frombuffer(feature["tokens"].bytes_list.value[0], self._dtype)
            num_targets = feature["num_targets"].int64_list.value[0]
            if tokens.size != self.block_len + 1 or not 0 < num_targets <= self.block_len:
                raise ValueError(
                    f"it has {tokens.size} tokens and {num_targets} targets; expected {self.block_len + 1}"
                )
            if (largest := int(tokens.max())) >= self._vocab_size:
                raise ValueError(f"it has the id {largest}, and the tokenizer's ids end at {self._vocab_size - 1}")
            marks = np.frombuffer(feature["marks"].bytes_list.value[0], np.uint8) if self.has_marks else None
            if marks is not None and marks.size != tokens.size:
                raise ValueError(f"it has {marks.size} marks; expected {tokens.size}")
        except (RuntimeError, DecodeError, IndexError, ValueError) as error:
            shard = self.split.shards[bisect.bisect_right(self._shard_ends, block)]
            raise ValueError(
                f"block {block} in shard {join_location(self._directory, shard.file)} is unreadable: {error}; "
                "restore the shard from its source, or rebuild the store"
            ) from error
        return TokenBlock(tokens, num_targets, marks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStore:
    """An open token store."""

    directory: PathOrUrl
    manifest: Manifest

    def split(self, name: str) -> SplitReader:
        """Return a reader of the split; `name` is store.TRAIN or store.HELDOUT."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise ValueError(f"token store {self.directory} has no split {name!r}; it has {known}")
        return SplitReader(self.directory, manifest=self.manifest, split=self.manifest.splits[name])


def open_store(directory: PathOrUrl, *, expected_fingerprint: str) -> TokenStore:
    """Open a token store and check that it is whole and the expected one.

    `expected_fingerprint` is what the run's checkpoint recorded, or "" at a first start.

    Raises:
      FileNotFoundError: the manifest, a shard or the tokenizer is missing.
      ValueError: the manifest is corrupt, a shard has another size, or the store is not the expected one.
      OSError: it has more shards than a process may open files.
    """
    manifest = store.read_manifest(directory)
    if expected_fingerprint and manifest.fingerprint != expected_fingerprint:
        raise ValueError(
            f"token store {directory} has fingerprint {manifest.fingerprint}, but the run was started on a store with "
            f"fingerprint {expected_fingerprint}; point data.store to that one, or start in a new workdir"
        )
    store.check_shards(directory, manifest)
    if isinstance(directory, Path):
        allow_open_files(sum(len(split.shards) for split in manifest.splits.values()), name=f"token store {directory}")
    return TokenStore(directory=directory, manifest=manifest)


def _open_records(directory: PathOrUrl, shards: Sequence[Shard]) -> Records:
    if isinstance(directory, Path):
        return LocalRecords(directory, shards)
    from btlm_jax.data.remote import RemoteRecords  # our own reader of ArrayRecord's bytes: a local store needs none

    return RemoteRecords(directory, shards)
