"""How fast batches of the local run are read from a token store, against how fast it trains.

Command:  python benchmarks/data_reading.py [--store=DIR]

Prints tokens a second of wall-clock time, the median over repeats, for the two phases of configs/local_cpu.py: the
rows read on one thread, whole batches on the device with read-ahead, and, as the peer, Grain's own shuffled pipeline
over the same records decoded by TFDS (whole blocks only). Without --store it writes random tokens into a temporary
directory. The goal is 20 times the speed of training, so that reading takes less than a twentieth of a core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from btlm_jax.data import store
from btlm_jax.data.loader import TrainLoader, read_rows
from btlm_jax.data.order import TrainingOrder
from btlm_jax.data.reader import SplitReader, TokenStore, open_store
from btlm_jax.recipe.config import DataConfig
from btlm_jax.recipe.curriculum import Curriculum, Phase, make_curriculum

BLOCK_LEN, NUM_BLOCKS, VOCAB_SIZE = 1024, 4096, 4096
STEPS, REPEATS, PREFETCH = 200, 5, 4
TRAINING_TOKENS_PER_SECOND = 5_000  # of configs/local_cpu.py on 2 CPU cores, the upper end
GOAL = 20 * TRAINING_TOKENS_PER_SECOND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a token store; default: random tokens in a temporary directory")
    directory = parser.parse_args().store
    if directory:
        print_table(open_store(directory, expected_fingerprint=""))
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_random_store(Path(temporary))
        print_table(open_store(Path(temporary), expected_fingerprint=""))


def print_table(token_store: TokenStore) -> None:
    """Measure every phase and print one row each."""
    split = token_store.manifest.splits[store.TRAIN]
    print(f"{split.num_blocks:,} blocks of {token_store.manifest.block_len:,} tokens; goal {GOAL:,} tokens/s")
    peer = statistics.median(peer_rate(token_store) for _ in range(REPEATS))
    print(f"{'batch':>10} {'rows, one thread':>18} {'on the device':>15} {'times training':>15} {'Grain + TFDS':>15}")
    for seq_len, batch_size in ((256, 16), (1024, 4)):
        num_tokens = STEPS * seq_len * batch_size
        curriculum = make_curriculum(seq_len=(seq_len,), batch_size=(batch_size,), num_tokens=(num_tokens,))
        host = statistics.median(host_rate(token_store, curriculum) for _ in range(REPEATS))
        device = statistics.median(device_rate(token_store, curriculum) for _ in range(REPEATS))
        print(
            f"{seq_len:>5} x {batch_size:<2} {host:>18,.0f} {device:>15,.0f} "
            f"{device / TRAINING_TOKENS_PER_SECOND:>15,.0f} {peer:>15,.0f}"
        )


def host_rate(token_store: TokenStore, curriculum: Curriculum) -> float:
    """Return tokens a second of working out the order and reading the rows, on this thread."""
    reader = token_store.split(store.TRAIN)
    order = TrainingOrder(curriculum=curriculum, num_blocks=len(reader), block_len=reader.block_len, seed=1)
    [phase] = curriculum.phases
    start = time.perf_counter()
    for step in range(phase.num_steps):
        read_step(reader, order, phase, step)
    return phase.num_tokens / (time.perf_counter() - start)


def read_step(reader: SplitReader, order: TrainingOrder, phase: Phase, step: int) -> None:
    windows = order.windows(phase, sequences=range(step * phase.batch_size, (step + 1) * phase.batch_size))
    read_rows(reader, [(window.block, window.window * phase.seq_len) for window in windows], seq_len=phase.seq_len)


def device_rate(token_store: TokenStore, curriculum: Curriculum) -> float:
    """Return tokens a second of whole batches on the device, read ahead on threads."""
    loader = TrainLoader(
        token_store,
        curriculum=curriculum,
        data=DataConfig(store="store", seed=1, weights="", max_epochs=1_000, prefetch=PREFETCH, document_mask=False),
        accumulation=1,
        shardings=[NamedSharding(jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1]), P(None, "fsdp"))],
    )
    start = time.perf_counter()
    for _, batch in loader.batches(first_step=0):
        jax.block_until_ready(batch)
    return curriculum.num_tokens / (time.perf_counter() - start)


def peer_rate(token_store: TokenStore) -> float:
    """Return tokens a second of Grain's shuffle, TFDS's decoding and Grain's batches of 4, with the same read-ahead."""
    manifest = token_store.manifest
    paths = [str(token_store.directory / shard.file) for shard in manifest.splits[store.TRAIN].shards]
    features = make_features(manifest.block_len, np.dtype(manifest.dtype))
    options = grain.ReadOptions(num_threads=PREFETCH, prefetch_buffer_size=PREFETCH)
    source = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths)).shuffle(seed=1)
    batches = source.map(features.deserialize_example_np).batch(4)[:STEPS].to_iter_dataset(options)
    start = time.perf_counter()
    num_tokens = sum(batch["tokens"].size for batch in batches)
    return num_tokens / (time.perf_counter() - start)


def make_features(block_len: int, dtype: np.dtype) -> tfds.features.FeaturesDict:
    tokens = tfds.features.Tensor(shape=(block_len + 1,), dtype=dtype, encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict({"tokens": tokens, "num_targets": tfds.features.Scalar(np.int32)})


def write_random_store(directory: Path) -> None:
    """Write a store with a train split of random tokens."""
    features = make_features(BLOCK_LEN, np.dtype(np.uint16))
    path = directory / store.shard_name(split=store.TRAIN, index=0, num_shards=1)
    random = np.random.default_rng(0)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(NUM_BLOCKS):
        block = random.integers(0, VOCAB_SIZE, BLOCK_LEN + 1, np.uint16)
        writer.write(features.serialize_example({"tokens": block, "num_targets": np.int32(BLOCK_LEN)}))
    writer.close()
    shard = store.Shard(file=path.name, num_blocks=NUM_BLOCKS, num_bytes=path.stat().st_size, sha256="")
    (directory / "tokenizer.model").touch()
    tokenizer = store.TokenizerInfo(kind="none", file="tokenizer.model", sha256="", vocab_size=VOCAB_SIZE, eos_id=0)
    split = store.Split(num_blocks=NUM_BLOCKS, num_tokens=NUM_BLOCKS * BLOCK_LEN, shards=(shard,), sources={})
    manifest = store.Manifest(
        block_len=BLOCK_LEN, dtype="uint16", tokenizer=tokenizer, splits={store.TRAIN: split}, features=(), made_by={}
    )
    store.write_manifest(directory, manifest)


if __name__ == "__main__":
    main()
