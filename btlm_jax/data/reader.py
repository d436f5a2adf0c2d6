"""Random access to a token store: block number -> its tokens, through Grain on ArrayRecord. Knows nothing of training.

A record is a serialised `tf.train.Example`, so TFDS opens the same files; it is parsed here with TFDS's own protocol
buffer, without TensorFlow.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from btlm_jax import store
from btlm_jax.store import Manifest, Shard, Split


class Block(NamedTuple):
    """One record of the store."""

    tokens: np.ndarray  # [block_len + 1], of the store's dtype, read-only
    num_targets: int  # block_len, but less in the padded last block of a stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FileInstruction:
    """A whole shard in Grain's terms; given its length, Grain does not open it before it is read."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class SplitReader:
    """Random access to the blocks of one split; safe to use from many threads."""

    def __init__(self, directory: Path, *, manifest: Manifest, split: Split):
        self.split = split
        self.block_len = manifest.block_len
        self._directory = directory
        self._dtype = np.dtype(manifest.dtype)
        self._shard_ends = list(itertools.accumulate(shard.num_blocks for shard in split.shards))
        self._source = grain.sources.ArrayRecordDataSource([_instruction(directory, shard) for shard in split.shards])

    def __len__(self) -> int:
        return len(self._source)

    def read(self, block: int) -> Block:
        """Read one block.

        Raises:
          ValueError: the block's record is unreadable or not a block of this store; names the shard and the block.
        """
        assert 0 <= block < len(self), f"block {block} of {len(self)}"
        try:
            example = tf_example_pb2.Example.FromString(self._source[block])
            feature = example.features.feature
            tokens = np.frombuffer(feature["tokens"].bytes_list.value[0], self._dtype)
            num_targets = feature["num_targets"].int64_list.value[0]
            if tokens.size != self.block_len + 1 or not 0 < num_targets <= self.block_len:
                raise ValueError(
                    f"it has {tokens.size} tokens and {num_targets} targets; expected {self.block_len + 1}"
                )
        except (RuntimeError, DecodeError, IndexError, ValueError) as error:
            shard = self.split.shards[bisect.bisect_right(self._shard_ends, block)]
            raise ValueError(
                f"block {block} in shard {self._directory / shard.file} is unreadable: {error}; "
                "restore the shard from its source, or rebuild the store"
            ) from error
        return Block(tokens, num_targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStore:
    """An open token store."""

    directory: Path
    manifest: Manifest

    def split(self, name: str) -> SplitReader:
        """Return a reader of the split; `name` is store.TRAIN or store.HELDOUT."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise ValueError(f"token store {self.directory} has no split {name!r}; it has {known}")
        return SplitReader(self.directory, manifest=self.manifest, split=self.manifest.splits[name])


def open_store(directory: Path, *, expected_fingerprint: str) -> TokenStore:
    """Open a token store and check that it is whole and the expected one.

    `expected_fingerprint` is what the run's checkpoint recorded, or "" at a first start.

    Raises:
      FileNotFoundError: the manifest, a shard or the tokenizer is missing.
      ValueError: the manifest is corrupt, a shard has another size, or the store is not the expected one.
    """
    manifest = store.read_manifest(directory)
    if expected_fingerprint and manifest.fingerprint != expected_fingerprint:
        raise ValueError(
            f"token store {directory} has fingerprint {manifest.fingerprint}, but the run was started on a store with "
            f"fingerprint {expected_fingerprint}; point data.store to that one, or start in a new workdir"
        )
    store.check_shards(directory, manifest)
    return TokenStore(directory=directory, manifest=manifest)


def verify(directory: Path) -> Manifest:
    """Hash every shard and the tokenizer again, read every block, compare with the manifest, and return it.

    The blocks of a stream must follow on one another, so that each token is a target exactly once.

    Raises:
      FileNotFoundError: a file of the store is missing.
      ValueError: some files are damaged; names them all.
    """
    manifest = open_store(directory, expected_fingerprint="").manifest
    recorded = {shard.file: shard.sha256 for split in manifest.splits.values() for shard in split.shards}
    recorded[manifest.tokenizer.file] = manifest.tokenizer.sha256
    damaged = [file for file, sha256 in recorded.items() if _sha256(directory / file) != sha256]
    if damaged:
        raise ValueError(
            f"token store {directory} is damaged: the contents of {', '.join(damaged)} do not hash to what "
            f"{store.MANIFEST_FILE} records; restore or rebuild them"
        )
    for name, split in manifest.splits.items():
        reader = SplitReader(directory, manifest=manifest, split=split)
        own = [(source.first_block, source.num_blocks) for source in split.sources.values() if source.num_blocks]
        found = [_check_stream(reader, first, count, manifest) for first, count in own or [(0, split.num_blocks)]]
        recorded = (split.num_tokens, sum(source.num_documents for source in split.sources.values()))
        if tuple(map(sum, zip(*found, strict=True))) != recorded:
            raise ValueError(
                f"split {name} of {directory} has {found} (tokens, documents), its manifest says {recorded}"
            )
    return manifest


def _check_stream(reader: SplitReader, first: int, count: int, manifest: Manifest) -> tuple[int, int]:
    """Return the targets and the ends of documents of a stream, after checking that its blocks make one."""
    num_tokens = num_documents = 0
    last = reader.read(first).tokens[0]
    for number in range(first, first + count):
        block = reader.read(number)
        is_full = block.num_targets == manifest.block_len or number == first + count - 1
        if block.tokens[0] != last or not is_full:
            raise ValueError(f"block {number} does not go on where the block before it ended; rebuild the store")
        last = block.tokens[-1]
        num_tokens += block.num_targets
        num_documents += int((block.tokens[1 : block.num_targets + 1] == manifest.tokenizer.eos_id).sum())
    return num_tokens, num_documents


def _instruction(directory: Path, shard: Shard) -> _FileInstruction:
    return _FileInstruction(
        filename=str(directory / shard.file),
        skip=0,
        take=shard.num_blocks,
        examples_in_shard=shard.num_blocks,
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
