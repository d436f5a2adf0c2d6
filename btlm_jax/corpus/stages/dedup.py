"""The stage `dedup`: find near-duplicates over the whole corpus, keep one document of each cluster. Four steps on disk:

    work/signatures   a task per file: keys of every band, sorted; signatures; lengths and ranks
    work/pairs        a task per band and range of keys: pairs of documents that share a key, verified
    work/clusters     one task: pairs -> connected components -> which documents are kept; if pairs are verified, each
                      document that is dropped is verified against one that is kept, for in a chain of pairs the ends
                      need not be alike
    .                 a task per file: the documents that are kept

Each step starts when the one before is complete. The memory needed is that of one file's signatures, of a range of
keys, or in `clusters` 56 bytes per document of the corpus.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from btlm_jax.corpus.engine.counts import DocumentCounts
from btlm_jax.corpus.engine.inputs import read_documents, stage_inputs
from btlm_jax.corpus.engine.stage import Stage, accept_all, only_command, run_stage
from btlm_jax.corpus.engine.tasks import Heartbeat, LocalTask, Task
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.near_duplicates.lsh import (
    PRESETS,
    Clusters,
    Preset,
    all_agree,
    band_keys,
    bucket_pairs,
    survivors,
    verified_survivors,
)
from btlm_jax.corpus.near_duplicates.normalize import normalized_pieces
from btlm_jax.corpus.readers.records import (
    Record,
    ShardWriter,
    join_arrays,
    load_array,
    read_records,
    save_array,
    utf8_pieces,
)
from btlm_jax.display.progress import Log

RECIPES = {"slimpajama": 1, "strict": 2}  # preset -> raise when its steps change
PARTITION_DOCUMENTS = 1 << 22  # a task holds the keys of so many documents
_COMPARED = 1 << 13  # pairs of signatures compared at a time


def deduplicate(source: Path, *, preset: str, output: Path, workers: Workers, log: Log) -> dict:
    """Deduplicate what a finished stage wrote and return the manifest.

    Raises:
      FileNotFoundError: there is no finished stage in `source`.
      ValueError: the input is damaged, or `output` has other settings or inputs.
    """
    with only_command(output, inputs=[source]):
        return _deduplicate(source, preset=preset, output=output, workers=workers, log=log)


def _deduplicate(source: Path, *, preset: str, output: Path, workers: Workers, log: Log) -> dict:
    rules = PRESETS[preset]
    cleaned = read_documents(source, of=("clean", "dedup"), also=("pieces",), purpose="deduplicate")
    tasks = [
        Task(index=index, inputs=(item,), weight=item.num_bytes)
        for index, item in enumerate(stage_inputs(source, cleaned))
    ]
    counts = [file["num_documents"] for file in cleaned["outputs"]]
    settings = {
        "recipe": RECIPES[rules.name],
        "preset": rules.name,
        "bands": rules.bands,
        "rows": rules.rows,
        "threshold": rules.threshold,
        "input": cleaned["fingerprint"],
    }
    work = {step: output / "work" / step for step in ("signatures", "pairs", "clusters")}
    run = functools.partial(run_stage, workers=workers, log=log, check=accept_all)
    stage = functools.partial(Stage, settings=settings)
    step = functools.partial(_signature_task, preset=preset)
    run(stage(name="dedup signatures", tasks=tasks, run=step), work["signatures"])
    num_partitions = 1 + sum(counts) // PARTITION_DOCUMENTS
    ranges = [Task(index=index, inputs=(), weight=1) for index in range(rules.bands * num_partitions)]
    step = functools.partial(
        _pair_task, preset=preset, counts=counts, signatures=work["signatures"], num_partitions=num_partitions
    )
    run(stage(name="dedup pairs", tasks=ranges, run=step), work["pairs"])
    step = functools.partial(
        _cluster_task,
        preset=preset,
        counts=counts,
        signatures=work["signatures"],
        pairs=work["pairs"],
        num_files=len(ranges),
    )
    one_task = [Task(index=0, inputs=(), weight=1)]
    clusters = run(stage(name="dedup clusters", tasks=one_task, run=step), work["clusters"])
    log(f"dedup: clusters by size up to {json.dumps(clusters['totals']['sizes'])}")
    step = functools.partial(_filter_task, clusters=work["clusters"])
    return run(stage(name="dedup", tasks=tasks, run=step), output)


def rank(record: Record) -> int:
    """Return a hash that decides between equally long documents: of the text, then of the id.

    The id comes second because it may depend on the name of the file that the document came from.
    """
    digests = [hashlib.blake2b(digest_size=4) for _ in range(2)]
    for digest, text in zip(digests, (record.text, record.id), strict=True):
        for piece in utf8_pieces(text):
            digest.update(piece)
    return int.from_bytes(b"".join(digest.digest() for digest in digests), "big")


def _signature_task(task: LocalTask, directory: Path, heartbeat: Heartbeat, *, preset: str) -> dict:
    rules = PRESETS[preset]
    signatures, lengths, ranks = [], [], []
    for record in read_records(task.inputs[0].path):
        signatures.append(rules.signature(normalized_pieces(record.text)))
        lengths.append(len(record.text))
        ranks.append(rank(record))
        heartbeat(1, record.num_bytes)
    stacked = np.stack(signatures)
    keys = band_keys(stacked, rules)
    order = np.argsort(keys, axis=1, kind="stable").astype(np.uint32)
    arrays = {
        "keys": np.take_along_axis(keys, order.astype(np.int64), axis=1),
        "order": order,
        "lengths": np.array(lengths, np.int64),
        "ranks": np.array(ranks, np.uint64),
    }
    if rules.threshold:
        arrays["signatures"] = stacked
    outputs = [save_array(directory, f"{name}-{task.index:05d}", array) for name, array in arrays.items()]
    return {"totals": {}, "outputs": outputs}


def _pair_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    preset: str,
    counts: Sequence[int],
    signatures: Path,
    num_partitions: int,
) -> dict:
    rules = PRESETS[preset]
    band, partition = divmod(task.index, num_partitions)
    bounds = [((partition + end) << 64) // num_partitions for end in (0, 1)]
    offsets = np.cumsum([0, *counts])
    keys, documents = [], []
    for shard in range(len(counts)):
        ordered = load_array(signatures, f"keys-{shard:05d}")[band]
        begin = np.searchsorted(ordered, np.uint64(bounds[0]))
        end = len(ordered) if bounds[1] == 1 << 64 else np.searchsorted(ordered, np.uint64(bounds[1]))
        keys.append(np.array(ordered[begin:end]))
        documents.append(load_array(signatures, f"order-{shard:05d}")[band, begin:end] + offsets[shard])
    agree = _SignatureCheck(signatures, offsets=offsets, rules=rules) if rules.threshold else all_agree
    pairs = bucket_pairs(np.concatenate(keys), np.concatenate(documents), agree=agree)
    heartbeat(sum(map(len, keys)), 0)
    return {"totals": {"pairs": len(pairs)}, "outputs": [save_array(directory, f"pairs-{task.index:05d}", pairs)]}


class _SignatureCheck:
    """Check whether two documents' signatures have enough equal numbers; reads them from memory-mapped files."""

    def __init__(self, folder: Path, *, offsets: np.ndarray, rules: Preset):
        self._folder, self._offsets, self._rules = folder, offsets, rules

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        agree = np.empty(len(first), bool)
        for start in range(0, len(first), _COMPARED):
            part = slice(start, start + _COMPARED)
            equal = self._rows(first[part]) == self._rows(second[part])
            agree[part] = equal.mean(axis=1) >= self._rules.threshold
        return agree

    def pairs_among(self, documents: np.ndarray) -> np.ndarray:
        """Return the pairs of these documents that share a key and agree, int64 [pairs, 2]."""
        keys = [
            band_keys(self._rows(documents[start : start + _COMPARED]), self._rules)
            for start in range(0, len(documents), _COMPARED)
        ]
        return np.concatenate([bucket_pairs(band, documents, agree=self) for band in np.concatenate(keys, axis=1)])

    def _rows(self, documents: np.ndarray) -> np.ndarray:
        rows = np.empty((len(documents), self._rules.bands * self._rules.rows), np.uint32)
        shards = np.searchsorted(self._offsets, documents, side="right") - 1
        for shard in np.unique(shards):
            own = shards == shard
            rows[own] = load_array(self._folder, f"signatures-{shard:05d}")[documents[own] - self._offsets[shard]]
        return rows


def _cluster_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    preset: str,
    counts: Sequence[int],
    signatures: Path,
    pairs: Path,
    num_files: int,
) -> dict:
    rules = PRESETS[preset]
    num_documents = sum(counts)
    clusters = Clusters(num_documents)
    for index in range(num_files):
        clusters.join(np.array(load_array(pairs, f"pairs-{index:05d}")))
    shards = range(len(counts))
    roots = clusters.roots(np.arange(num_documents))
    offsets = np.cumsum([0, *counts])
    choose = survivors
    if rules.threshold:
        check = _SignatureCheck(signatures, offsets=offsets, rules=rules)
        choose = functools.partial(verified_survivors, agree=check, pairs_among=check.pairs_among)
    is_kept = choose(
        roots,
        lengths=join_arrays(signatures, [f"lengths-{shard:05d}" for shard in shards]),
        ranks=join_arrays(signatures, [f"ranks-{shard:05d}" for shard in shards]),
    )
    heartbeat(num_documents, 0)
    sizes = Counter(str(1 << int(size - 1).bit_length()) for size in np.bincount(roots) if size)
    outputs = [
        save_array(directory, f"kept-{shard:05d}", is_kept[offsets[shard] : offsets[shard + 1]]) for shard in shards
    ]
    return {"totals": {"sizes": dict(sorted(sizes.items(), key=lambda item: int(item[0])))}, "outputs": outputs}


def _filter_task(task: LocalTask, directory: Path, heartbeat: Heartbeat, *, clusters: Path) -> dict:
    counts, dropped = DocumentCounts(), Counter()
    all_kept = load_array(clusters, f"kept-{task.index:05d}")
    with ShardWriter(directory, stem=f"documents-{task.index:05d}") as writer:
        for is_kept, record in zip(all_kept, read_records(task.inputs[0].path), strict=True):
            counts.count_read(record)
            heartbeat(1, record.num_bytes)
            if is_kept:
                counts.count_written(record)
                writer.add(record)
            else:
                dropped["near-duplicates"] += 1
    return {"totals": counts.totals(dropped=dropped, bad=Counter()), "outputs": writer.outputs}
