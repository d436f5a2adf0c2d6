"""Pack token streams into blocks and blocks into ArrayRecord shards; write the metadata with which TFDS opens them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from btlm_jax.data import store
from btlm_jax.data.store import TokenBlock
from btlm_jax.storage.files import sync_and_hash

TFDS_VERSION = "1.0.0"
_EXAMPLE: Any = tf_example_pb2  # these modules make their classes when they are imported
_FEATURE: Any = tf_feature_pb2


def pack(documents: Iterable[Sequence[int]], *, block_len: int, eos_id: int, dtype: str) -> Iterator[TokenBlock]:
    """Yield the blocks of one stream `EOS document EOS document ... EOS`; the last is padded with EOS."""
    pending = [np.asarray([eos_id], dtype)]
    size = 1
    for document in documents:
        pending.append(np.asarray([*document, eos_id], dtype))
        size += len(document) + 1
        if size > block_len:
            stream = np.concatenate(pending)
            num_packed = (size - 1) // block_len * block_len
            yield from cut_into_blocks(stream[: num_packed + 1], block_len=block_len, eos_id=eos_id)
            pending, size = [stream[num_packed:]], size - num_packed
    yield from cut_into_blocks(np.concatenate(pending), block_len=block_len, eos_id=eos_id)


def cut_into_blocks(stream: np.ndarray, *, block_len: int, eos_id: int) -> Iterator[TokenBlock]:
    """Yield the blocks of a piece of a stream; its first token is the last target of the piece before, or EOS."""
    for start in range(0, len(stream) - 1, block_len):
        tokens = stream[start : start + block_len + 1]
        padding = np.full(block_len + 1 - len(tokens), eos_id, stream.dtype)
        yield TokenBlock(tokens=np.concatenate([tokens, padding]), num_targets=len(tokens) - 1)


def write_shards(directory: Path, *, split: str, blocks: Sequence[TokenBlock]) -> list[store.Shard]:
    """Write a split's shards and return their manifest entries."""
    groups = [blocks[start : start + store.BLOCKS_PER_SHARD] for start in range(0, len(blocks), store.BLOCKS_PER_SHARD)]
    shards = []
    for index, group in enumerate(groups):
        path = directory / store.shard_name(split=split, index=index, num_shards=len(groups))
        shards.append(write_shard(path, blocks=group))
    return shards


def write_shard(path: Path, *, blocks: Iterable[TokenBlock]) -> store.Shard:
    """Write one shard and return its manifest entry.

    Raises:
      OSError: it cannot be written; the unfinished file is deleted.
    """
    num_blocks = 0
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for block in blocks:
            writer.write(_serialized(block))
            num_blocks += 1
        writer.close()
    except RuntimeError as error:  # ArrayRecord's error for a full disk
        path.unlink(missing_ok=True)
        raise OSError(f"shard {path} cannot be written: {error}") from error
    return store.Shard(file=path.name, num_blocks=num_blocks, num_bytes=path.stat().st_size, sha256=sync_and_hash(path))


def _serialized(block: TokenBlock) -> bytes:
    """Serialise a block as TFDS does, but with the fields in the same order in every process."""
    tokens = _FEATURE.Feature(bytes_list=_FEATURE.BytesList(value=[block.tokens.tobytes()]))
    num_targets = _FEATURE.Feature(int64_list=_FEATURE.Int64List(value=[block.num_targets]))
    feature = {"tokens": tokens, "num_targets": num_targets}
    if block.marks is not None:
        feature["marks"] = _FEATURE.Feature(bytes_list=_FEATURE.BytesList(value=[block.marks.tobytes()]))
    features = _FEATURE.Features(feature=feature)
    return _EXAMPLE.Example(features=features).SerializeToString(deterministic=True)


def write_tfds_metadata(
    directory: Path, splits: dict[str, store.Split], *, block_len: int, dtype: str, has_marks: bool = False
) -> None:
    """Write features.json and dataset_info.json, with which TFDS opens the shards without TensorFlow."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,  # pyright: ignore[reportArgumentType] # TFDS's own Path is an interface that pathlib fulfils
        dataset_name=store.DATASET_NAME,
        filetype_suffix="array_record",
    )
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[shard.num_blocks for shard in split.shards],
            num_bytes=sum(shard.num_bytes for shard in split.shards),
            filename_template=template,
        )
        for name, split in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=make_features(block_len=block_len, dtype=dtype, has_marks=has_marks),
        split_infos=infos,
        version=TFDS_VERSION,
        filename_template=template,
        check_data=False,
    )


def make_features(*, block_len: int, dtype: str, has_marks: bool) -> tfds.features.FeaturesDict:
    """Return the record format of data/store.py as TFDS features."""

    def array(dtype: str) -> tfds.features.Tensor:
        encoding = tfds.features.Encoding.BYTES
        return tfds.features.Tensor(shape=(block_len + 1,), dtype=np.dtype(dtype).type, encoding=encoding)

    marks = {"marks": array("uint8")} if has_marks else {}
    return tfds.features.FeaturesDict({"tokens": array(dtype), "num_targets": tfds.features.Scalar(np.int32)} | marks)
