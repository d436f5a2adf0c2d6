"""A writer of tiny token stores for tests, independent of btlm_jax.corpus.

Token i of a stream is i, so that the value of a target names its place in the stream. No document ends in it.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from btlm_jax.data import store


def write_store(
    directory: Path,
    *,
    block_len: int,
    train_tokens: int | dict[str, int],
    heldout_tokens: dict[str, int],
    blocks_per_shard: int,
) -> store.Manifest:
    """Write a store whose train stream has `train_tokens` targets and whose held-out streams have `heldout_tokens`.

    With a number for each source `train` has a stream of each too; the first begins with token 0, the next with 10,000.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(b"tiny tokenizer")
    if isinstance(train_tokens, dict):
        train_blocks, train_source = _streams(train_tokens, first=0, block_len=block_len)
    else:
        train_blocks = stream_blocks(first=0, num_targets=train_tokens, block_len=block_len)
        train_source = {"all": _source(train_tokens, first_block=0, num_blocks=0)}
    heldout_blocks, sources = _streams(heldout_tokens, first=10_000, block_len=block_len)
    splits = {
        store.TRAIN: _write_split(directory, store.TRAIN, train_blocks, train_source, blocks_per_shard),
        store.HELDOUT: _write_split(directory, store.HELDOUT, heldout_blocks, sources, blocks_per_shard),
    }
    _write_tfds_files(directory, splits, block_len=block_len)
    tokenizer = store.TokenizerInfo(
        kind="sentencepiece",
        file="tokenizer.model",
        sha256=hashlib.sha256(b"tiny tokenizer").hexdigest(),
        vocab_size=1 << 16,
        eos_id=0,
    )
    manifest = store.Manifest(
        block_len=block_len,
        dtype="uint16",
        tokenizer=tokenizer,
        splits=splits,
        features=(store.SOURCES,) if isinstance(train_tokens, dict) else (),
        made_by={"test": True},
    )
    store.write_manifest(directory, manifest)
    return manifest


def _streams(num_tokens: dict[str, int], *, first: int, block_len: int):
    """Return the blocks of a stream of each source, and the sources."""
    blocks, sources = [], {}
    for index, (name, num_targets) in enumerate(num_tokens.items()):
        own = stream_blocks(first=first + 10_000 * index, num_targets=num_targets, block_len=block_len)
        sources[name] = _source(num_targets, first_block=len(blocks), num_blocks=len(own))
        blocks += own
    return blocks, sources


def stream_blocks(*, first: int, num_targets: int, block_len: int) -> list[tuple[np.ndarray, int]]:
    """Cut the stream first, first+1, ..., first+num_targets into (tokens [T+1], num_targets), padded with 0."""
    stream = np.arange(first, first + num_targets + 1)
    blocks = []
    for start in range(0, num_targets, block_len):
        tokens = stream[start : start + block_len + 1]
        padded = np.zeros(block_len + 1, np.uint16)
        padded[: len(tokens)] = tokens
        blocks.append((padded, len(tokens) - 1))
    return blocks


def _write_tfds_files(directory: Path, splits: dict[str, store.Split], *, block_len: int) -> None:
    """Write what TFDS writes beside the shards."""
    tokens = {"dtype": "uint16", "encoding": "bytes", "shape": {"dimensions": [str(block_len + 1)]}}
    numbers = {"dtype": "int32", "encoding": "none", "shape": {}}
    features = {"tokens": {"tensor": tokens}, "num_targets": {"tensor": numbers}}
    lengths = {name: [str(shard.num_blocks) for shard in split.shards] for name, split in splits.items()}
    infos = [{"name": name, "shardLengths": lengths[name]} for name in splits]
    info = {"name": "tokens", "fileFormat": "array_record", "version": "1.0.0", "splits": infos}
    (directory / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (directory / "dataset_info.json").write_text(json.dumps(info))


def _source(num_tokens: int, *, first_block: int, num_blocks: int) -> store.Source:
    return store.Source(
        num_documents=0, num_bytes=num_tokens, num_tokens=num_tokens, first_block=first_block, num_blocks=num_blocks
    )


def _write_split(directory, name, blocks, sources, blocks_per_shard) -> store.Split:
    features = tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(
                shape=blocks[0][0].shape, dtype=np.uint16, encoding=tfds.features.Encoding.BYTES
            ),
            "num_targets": tfds.features.Scalar(np.int32),
        }
    )
    shards = []
    groups = [blocks[i : i + blocks_per_shard] for i in range(0, len(blocks), blocks_per_shard)]
    for index, group in enumerate(groups):
        path = directory / store.shard_name(split=name, index=index, num_shards=len(groups))
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for tokens, num_targets in group:
            writer.write(features.serialize_example({"tokens": tokens, "num_targets": np.int32(num_targets)}))
        writer.close()
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        shards.append(store.Shard(file=path.name, num_blocks=len(group), num_bytes=len(content), sha256=sha256))
    return store.Split(
        num_blocks=len(blocks),
        num_tokens=sum(num_targets for _, num_targets in blocks),
        shards=tuple(shards),
        sources=sources,
    )
