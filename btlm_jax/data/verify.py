"""Verify a whole token store: hash every file and compare with the manifest, and check that blocks are consecutive."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from btlm_jax.data.reader import SplitReader, open_store
from btlm_jax.data.store import (
    BEGINS,
    DATASET_NAME,
    EXAMPLES,
    MANIFEST_FILE,
    PADDING,
    TRAINED,
    Manifest,
    Shard,
    Source,
    Split,
    TokenBlock,
    streams_of,
)
from btlm_jax.display.progress import RateLimit
from btlm_jax.storage.files import parse_json
from btlm_jax.storage.location import PathOrUrl, hash_range, join_location, read_bytes

INTERVAL = 5.0  # seconds between lines of progress


def verify(directory: PathOrUrl, *, log: Callable[[str], None]) -> Manifest:
    """Hash every shard and the tokenizer, read every block, compare with the manifest, and return the manifest.

    What TFDS reads beside them, features.json and dataset_info.json, must describe the same shards.

    The first token of a block must be the last of the block before it in its stream, so that each token is a target
    exactly once. From a store behind a URL one shard at a time is copied to the folder of temporary files.

    Raises:
      FileNotFoundError: a file of the store is missing.
      OSError: there is no room for a shard, or it cannot be reached.
      ValueError: some files are damaged; names them all.
    """
    manifest = open_store(directory, expected_fingerprint="").manifest
    reading = _Reading(directory, manifest, log)
    reading.check_tokenizer()
    check_tfds_metadata(directory, manifest)
    for name, split in manifest.splits.items():
        with contextlib.closing(reading.blocks(split)) as blocks:
            counts = _check_streams(enumerate(blocks), name=f"{name} of {directory}", split=split, manifest=manifest)
        recorded = (split.num_tokens, sum(source.num_documents for source in split.sources.values()))
        if tuple(map(sum, zip(*counts, strict=True))) != recorded:
            raise ValueError(
                f"split {name} of {directory} has {counts} (tokens, documents), its manifest says {recorded}"
            )
        for (source, part), found in zip(_streams_of(split), counts, strict=False):  # of no stream where all is one
            if found != (part.num_tokens, part.num_documents):
                raise ValueError(
                    f"source {source!r} in split {name} of {directory} has {found} (tokens, documents), its manifest "
                    f"says {(part.num_tokens, part.num_documents)}; rebuild the store"
                )
    return manifest


def check_tfds_metadata(directory: PathOrUrl, manifest: Manifest) -> None:
    """Check that features.json and dataset_info.json, with which TFDS opens the store, agree with the manifest.

    Raises:
      FileNotFoundError: one is missing.
      ValueError: one is damaged, or describes something else.
    """
    tensor = {"dtype": manifest.dtype, "encoding": "bytes", "shape": {"dimensions": [str(manifest.block_len + 1)]}}
    marks = tensor | {"dtype": "uint8"} if EXAMPLES in manifest.features else None
    splits = {
        name: [str(shard.num_blocks) for shard in split.shards] for name, split in sorted(manifest.splits.items())
    }
    features, info = (_read_json(directory, name) for name in ("features.json", "dataset_info.json"))
    records = _at(features, "featuresDict", "features")
    found_splits = {
        _at(split, "name"): _at(split, "shardLengths") for split in _items(_at(info, "splits")) if _at(split, "name")
    }
    for file, what, found, expected in (
        ("features.json", "tokens", _at(records, "tokens", "tensor"), tensor),
        ("features.json", "marks", _at(records, "marks", "tensor"), marks),
        (
            "features.json",
            "num_targets",
            _at(records, "num_targets", "tensor", "dtype"),
            "int32",
        ),
        ("dataset_info.json", "its name", _at(info, "name"), DATASET_NAME),
        ("dataset_info.json", "its format", _at(info, "fileFormat"), "array_record"),
        ("dataset_info.json", "the blocks of each shard", found_splits, splits),
    ):
        if found != expected:
            raise ValueError(
                f"{join_location(directory, file)} does not describe this store: {what} is {found}, by {MANIFEST_FILE} "
                f"{expected}; restore it or rebuild the store"
            )


def _read_json(directory: PathOrUrl, name: str) -> object:
    location = join_location(directory, name)
    try:
        return parse_json(read_bytes(location), name=location)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"token store {directory} lacks {name}; restore it or rebuild the store") from error
    except ValueError as error:
        raise ValueError(f"{error}; restore it or rebuild the store") from error


def _at(value: object, *keys: str) -> object:
    """Return the value of a key inside objects of JSON; None where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _items(value: object) -> list:
    return value if isinstance(value, list) else []


def _check_streams(
    blocks: Iterator[tuple[int, TokenBlock]], *, name: str, split: Split, manifest: Manifest
) -> list[tuple[int, int]]:
    """Check that each block of a split belongs to one stream; return (targets, documents) of each stream."""
    counts, end = [], 0
    own = [(source.first_block, source.num_blocks) for _, source in _streams_of(split)]
    for first, count in own or [(0, split.num_blocks)]:
        if first != end:
            break
        end = first + count
        counts.append(_check_stream(itertools.islice(blocks, count), last=end - 1, manifest=manifest))
    if next(blocks, None) is not None or end != split.num_blocks:
        raise ValueError(f"block {end} of split {name} is of no source, or of two, by its manifest; rebuild the store")
    return counts


def _streams_of(split: Split) -> list[tuple[str, Source]]:
    return [(name, source) for name, source in streams_of(split) if source.num_blocks]


def _check_stream(blocks: Iterator[tuple[int, TokenBlock]], *, last: int, manifest: Manifest) -> tuple[int, int]:
    """Check that blocks are consecutive pieces of one stream; return how many targets and ends of documents it has.

    Of examples these are the targets that are trained, and how many examples begin.
    """
    num_tokens = num_documents = 0
    token = None
    for number, block in blocks:
        is_full = block.num_targets == manifest.block_len or number == last
        if token not in (None, block.tokens[0]) or not is_full:
            raise ValueError(f"block {number} does not go on where the block before it ended; rebuild the store")
        token = block.tokens[-1]
        if block.marks is None:
            num_tokens += block.num_targets
            num_documents += int((block.tokens[1 : block.num_targets + 1] == manifest.tokenizer.eos_id).sum())
        else:
            num_tokens += int((block.marks[1 : block.num_targets + 1] & TRAINED > 0).sum())
            num_documents += int((block.marks[: block.num_targets] & (BEGINS | PADDING) == BEGINS).sum())
    return num_tokens, num_documents


class _Reading:
    """One pass over the files of a store, in the order of its blocks; logs its progress."""

    def __init__(self, directory: PathOrUrl, manifest: Manifest, log: Callable[[str], None]):
        self._directory, self._manifest, self._log = directory, manifest, log
        self._remaining = [shard for split in manifest.splits.values() for shard in split.shards]
        self._num_bytes = sum(shard.num_bytes for shard in self._remaining)
        self._start, self._rate_limit = time.monotonic(), RateLimit(INTERVAL, is_due_at_start=False)

    def check_tokenizer(self) -> None:
        """Hash the tokenizer's file.

        Raises:
          ValueError: it is damaged; names the damaged shards too.
        """
        file, sha256 = self._manifest.tokenizer.file, self._manifest.tokenizer.sha256
        if hashlib.sha256(read_bytes(join_location(self._directory, file))).hexdigest() != sha256:
            raise self._damaged([file])

    def blocks(self, split: Split) -> Generator[TokenBlock]:
        """Yield the blocks of a split; each shard is hashed before its first block.

        Raises:
          ValueError: a shard is damaged; names it and all damaged shards after it.
        """
        for shard in split.shards:
            with self._local_copy(shard) as (folder, file, sha256):
                if sha256 != shard.sha256:
                    raise self._damaged([shard.file])
                local = dataclasses.replace(split, shards=(dataclasses.replace(shard, file=file),))
                reader = SplitReader(folder, manifest=self._manifest, split=local)
                yield from map(reader.read, range(shard.num_blocks))

    def _damaged(self, files: list[str]) -> ValueError:
        while self._remaining:
            shard = self._remaining[0]
            with self._local_copy(shard) as (_, _, sha256):
                files += [shard.file] if sha256 != shard.sha256 else []
        return ValueError(
            f"token store {self._directory} is damaged: the contents of {', '.join(files)} do not hash to what "
            f"{MANIFEST_FILE} records; restore or rebuild them"
        )

    @contextlib.contextmanager
    def _local_copy(self, shard: Shard) -> Iterator[tuple[Path, str, str]]:
        """Yield the folder and the name of a local file with the contents of a shard, and their sha256."""
        location = join_location(self._directory, shard.file)
        self._remaining.remove(shard)
        if isinstance(self._directory, Path):
            yield self._directory, shard.file, hash_range(location, begin=0, num_bytes=shard.num_bytes, copy_to=None)
        else:
            folder = tempfile.gettempdir()
            free_bytes = shutil.disk_usage(folder).free
            if free_bytes < shard.num_bytes:
                raise OSError(
                    f"{folder} has {free_bytes:,} bytes free, shard {location} has {shard.num_bytes:,}; free some, or "
                    "name another folder as TMPDIR"
                )
            with tempfile.NamedTemporaryFile(prefix="btlm-verify-") as file:
                copy_to = cast(BinaryIO, file)  # which it is, but not by its type
                sha256 = hash_range(location, begin=0, num_bytes=shard.num_bytes, copy_to=copy_to)
                file.flush()
                path = Path(file.name)
                yield path.parent, path.name, sha256
        self._report_if_due()

    def _report_if_due(self) -> None:
        if not self._rate_limit.is_due():
            return
        self._rate_limit.restart()
        remaining = sum(shard.num_bytes for shard in self._remaining)
        done, seconds = self._num_bytes - remaining, time.monotonic() - self._start
        self._log(
            f"verify: {done / 1e9:.2f} of {self._num_bytes / 1e9:.2f} GB, {done / 1e6 / seconds:.1f} MB/s, "
            f"{seconds * remaining / done:.0f} s left"
        )
