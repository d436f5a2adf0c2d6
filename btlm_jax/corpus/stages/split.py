"""The stage `split`: documents -> train, validation, test, without held-out or evaluation text in train.

    work/evaluation  one task: an index of the evaluation texts, if there are any
    work/assign      a task per file: documents with evaluation text dropped; of the others the split by the hash of the
                     normalised text, so equal texts share one; training documents are scattered over partitions by
                     another hash
    work/heldout     one task: an index of the signatures of all held-out documents
    .                a task per partition: near-duplicates of held-out documents dropped, the others shuffled

Hashes of the seed and the text decide everything, so nothing depends on workers. A task needs the memory of
GATHER_BYTES of text; `heldout` needs 2 kB per held-out document, and the last step maps its tables into memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import ftfy
import numpy as np

from btlm_jax import notices
from btlm_jax.corpus.engine.counts import DocumentCounts
from btlm_jax.corpus.engine.inputs import raw_inputs, read_documents, stage_inputs
from btlm_jax.corpus.engine.stage import Stage, accept_all, only_command, run_stage
from btlm_jax.corpus.engine.tasks import Heartbeat, LocalTask, Task
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.near_duplicates.normalize import normalized_pieces
from btlm_jax.corpus.readers.raw import DEFAULT_KEYS
from btlm_jax.corpus.readers.records import (
    SUFFIX,
    Record,
    RecordWriter,
    ShardWriter,
    batch_records,
    join_arrays,
    load_array,
    output_entry,
    read_records,
    save_array,
)
from btlm_jax.corpus.stages.contamination import HeldOut, no_signatures, strict_signature
from btlm_jax.corpus.stages.evaluation_text import MIN_WORDS, RULES, EvaluationIndex, index_task
from btlm_jax.display.progress import Log
from btlm_jax.storage.location import PathOrUrl

RECIPE = 2  # raise when the steps change
TRAIN, VALIDATION, TEST = "train", "validation", "test"
GATHER_BYTES = 128_000_000  # of text shuffled at a time
MAX_PARTITIONS = 128
MANY_SOURCES = 256  # more are likely not meant
_PIECE_FRAME_BYTES = 1_000_000  # of text that a task buffers for each partition
_OF_TASK = "-of-"  # in the names of these pieces
_HELDOUT_ARRAYS = ("signatures", "order", "keys")
_HAS_EVALUATION_TEXT = "has evaluation text"  # why a document is dropped
_COMPARED = 512  # documents compared with the held-out ones at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How to split."""

    input: Path
    validation: float  # share of the documents
    test: float
    seed: int
    weights: dict[str, float]  # source -> how often its training documents are repeated; 1 if it is not named
    evaluation: tuple[PathOrUrl, ...]  # raw files whose text must not be trained on
    evaluation_rule: str  # one of RULES
    evaluation_key: str = DEFAULT_KEYS.text  # key or column of their text

    def __post_init__(self):
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more and less than 0.5")
        for source, weight in self.weights.items():
            if not 0 <= weight <= 100:
                raise ValueError(f"the weight {weight} of {source} must be between 0 and 100")
        if not self.evaluation_key:
            raise ValueError("evaluation_key='' must be the name of a key")
        if self.evaluation_rule not in RULES:
            raise ValueError(f"evaluation_rule={self.evaluation_rule!r} is not known; it may be {' or '.join(RULES)}")


def split(config: SplitConfig, *, output: Path, workers: Workers, log: Log) -> dict:
    """Split what a finished stage wrote and return the manifest, whose outputs name their `split`.

    Raises:
      FileNotFoundError: there is no finished stage, or no evaluation text.
      ValueError: the input is damaged, a weight's source does not exist, or `output` has other settings or inputs.
    """
    with only_command(output, inputs=[config.input]):
        return _split(config, output=output, workers=workers, log=log)


def _split(config: SplitConfig, *, output: Path, workers: Workers, log: Log) -> dict:
    source = read_documents(config.input, of=("clean", "dedup"), purpose="split")
    written = source["totals"]["written"]
    sources = sorted(written)
    unknown = sorted(config.weights.keys() - set(sources))
    if unknown:
        raise ValueError(f"weights name {', '.join(unknown)}, which is no source; there are {', '.join(sources)}")
    if len(sources) > MANY_SOURCES:
        notices.report(
            "many-sources",
            f"{config.input} has {len(sources):,} sources, {sources[0]!r} for one, each to be held out and evaluated "
            "apart; btlm corpus clean --source_key=KEY takes another key, or none with a KEY that nothing has",
            count=len(sources),
        )
    inputs = stage_inputs(config.input, source)
    num_bytes = sum(count["bytes"] for count in written.values())
    num_partitions = min(1 + num_bytes // GATHER_BYTES, MAX_PARTITIONS)
    run = functools.partial(run_stage, workers=workers, log=log)
    work = {step: output / "work" / step for step in ("evaluation", "assign", "heldout")}
    settings = {
        "recipe": RECIPE,
        **{name: getattr(config, name) for name in ("validation", "test", "seed", "weights")},
        "evaluation": _index_evaluation(config, run=run, directory=work["evaluation"]),
        "partitions": num_partitions,
        "input": source["fingerprint"],
    }
    stage = functools.partial(Stage, settings=settings)
    tasks = [Task(index=index, inputs=(item,), weight=item.num_bytes) for index, item in enumerate(inputs)]
    step = functools.partial(
        _assign_task, config=config, sources=sources, num_partitions=num_partitions, evaluation=work["evaluation"]
    )
    check = functools.partial(_check_heldout, config=config)
    assigned = run(stage(name="split assign", tasks=tasks, run=step), work["assign"], check=check)
    step = functools.partial(_heldout_task, assigned=work["assign"], num_files=len(tasks))
    one_task = [Task(index=0, inputs=(), weight=1)]
    run(stage(name="split heldout", tasks=one_task, run=step), work["heldout"], check=accept_all)
    train_share = (1 - config.validation - config.test) / num_partitions
    sizes = {f"{TRAIN}-{partition:05d}": num_bytes * train_share for partition in range(num_partitions)}
    for name, share in ((VALIDATION, config.validation), (TEST, config.test)):
        sizes |= {f"{name}-{number:05d}": written[source]["bytes"] * share for number, source in enumerate(sources)}
    counts = Counter(dict.fromkeys(sizes, 0))
    for file in assigned["outputs"]:
        counts[part_of(file["file"])] += file["num_documents"]
    parts = {part: counts[part] for part in sizes}
    step = functools.partial(_gather_task, parts=parts, num_files=len(tasks), work=work, seed=config.seed)
    gathering = [Task(index=index, inputs=(), weight=1 + int(size)) for index, size in enumerate(sizes.values())]
    before = {name: assigned["totals"][name] for name in ("read", "dropped")}
    return run(stage(name="split", tasks=gathering, run=step, totals_before=before), output, check=_check_train)


def _index_evaluation(config: SplitConfig, *, run: Callable[..., dict], directory: Path) -> str:
    """Index the evaluation texts and return a fingerprint of the index; say what will not be found.

    Raises:
      ValueError: a text cannot be read, or the directory holds the index of other texts.
    """
    if not config.evaluation and not directory.is_dir():
        return ""
    inputs = [item for location in config.evaluation for item in raw_inputs(location)]
    stage = Stage(
        name="split evaluation",
        settings={
            "recipe": RECIPE,
            "rule": config.evaluation_rule,
            "key": config.evaluation_key,
            "ftfy": ftfy.__version__,
            "unicode": unicodedata.unidata_version,
        },
        tasks=[Task(index=0, inputs=tuple(inputs), weight=1)],
        run=functools.partial(index_task, rule=config.evaluation_rule, key=config.evaluation_key),
    )
    manifest = run(stage, directory, check=accept_all)
    totals = manifest["totals"]
    for name in sorted(totals.get("files without runs", ())):
        notices.report(
            "evaluation-without-runs",
            f"evaluation text {name} has no text of {MIN_WORDS} words or more, so nothing of it is found in documents",
        )
    if totals["found whole only"]:
        notices.report(
            "evaluation-short",
            f"{totals['found whole only']:,} of {totals['texts']:,} evaluation texts have less than {MIN_WORDS} words: "
            "only a document that is nothing else is dropped for them",
            count=totals["found whole only"],
        )
    if totals["unusable"]:
        notices.report(
            "evaluation-unusable",
            f"{totals['unusable']:,} of {totals['texts']:,} evaluation texts cannot be looked for by the rule "
            f"{config.evaluation_rule}",
            count=totals["unusable"],
        )
    return manifest["fingerprint"]


def _check_heldout(results: list[dict], *, config: SplitConfig) -> None:
    """Check that a document is held out where some are to be: a token store needs one."""
    files = [output["file"] for result in results for output in result["outputs"]]
    if config.validation and not any(name.startswith(VALIDATION) for name in files):
        read = sum(count["documents"] for result in results for count in result["totals"]["read"].values())
        raise ValueError(
            f"validation={config.validation:g} holds out none of {read:,} documents: give a larger --validation, for "
            "example 0.05, and another --output"
        )


def _check_train(results: list[dict]) -> None:
    if not any(output["split"] == TRAIN for result in results for output in result["outputs"]):
        raise ValueError("no training document is left")


def _assign_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    config: SplitConfig,
    sources: list[str],
    num_partitions: int,
    evaluation: Path,
) -> dict:
    index = EvaluationIndex.load(evaluation, rule=config.evaluation_rule) if config.evaluation else None
    counts, signatures = DocumentCounts(), []
    dropped = Counter({_HAS_EVALUATION_TEXT: 0} if index is not None else {})
    with _Pieces(directory, task=task.index) as pieces:
        for record in read_records(task.inputs[0].path):
            counts.count_read(record)
            heartbeat(1, record.num_bytes)
            if index is not None and index.is_in(record.text):
                dropped[_HAS_EVALUATION_TEXT] += 1
                continue
            text_hash = hash_text(record.text, seed=config.seed)
            position = text_hash / 2**64
            if position < config.validation + config.test:
                name = VALIDATION if position < config.validation else TEST
                pieces.add(f"{name}-{sources.index(record.source):05d}", record)
                signatures.append(strict_signature(record.text))
                continue
            name = f"{record.id} {text_hash}"  # an id alone may be that of many documents
            copies = _copies(name, weight=config.weights.get(record.source, 1.0), seed=config.seed)
            if not copies:
                dropped["weight of the source"] += 1
            for copy in range(copies):
                partition = _keyed_hash("partition", config.seed, f"{name} {copy}".encode()) * num_partitions >> 64
                pieces.add(f"{TRAIN}-{partition:05d}", record)
    stacked = np.stack(signatures) if signatures else no_signatures()
    outputs = [*pieces.outputs, save_array(directory, f"signatures-{task.index:05d}", stacked)]
    return {"totals": counts.totals(dropped=dropped, bad=Counter()), "outputs": outputs}


class _Pieces:
    """Writes a task's documents, one file for each part of the split.

    Held-out documents, of which there are few, wait in memory: each source has files of its own, and a process may only
    have so many open.
    """

    def __init__(self, directory: Path, *, task: int):
        self._directory, self._task = directory, task
        self._stack = contextlib.ExitStack()
        self._writers: dict[str, RecordWriter] = {}
        self._heldout: dict[str, list[Record]] = {}
        self.outputs: list[dict] = []

    def __enter__(self) -> _Pieces:
        self._stack.__enter__()
        return self

    def add(self, part: str, record: Record) -> None:
        """Append a document to a part."""
        if not part.startswith(TRAIN):
            self._heldout.setdefault(part, []).append(record)
            return
        if part not in self._writers:
            self._writers[part] = self._stack.enter_context(self._open(part))
        self._writers[part].add(record)

    def _open(self, part: str) -> RecordWriter:
        return RecordWriter(piece_path(self._directory, part, self._task), frame_bytes=_PIECE_FRAME_BYTES)

    def __exit__(self, *raised) -> None:
        self._stack.__exit__(*raised)
        if raised[0] is None:
            for part, records in self._heldout.items():
                with self._open(part) as writer:
                    for record in records:
                        writer.add(record)
                self._writers[part] = writer
            self.outputs = [
                output_entry(writer, num_documents=writer.num_documents) for _, writer in sorted(self._writers.items())
            ]


def piece_path(directory: Path, part: str, task: int) -> Path:
    """Return the path of the file with the documents of a part that come from one task."""
    return directory / f"{part}{_OF_TASK}{task:05d}{SUFFIX}"


def part_of(file: str) -> str:
    """Return the part of which a file of `piece_path` has documents."""
    return file.partition(_OF_TASK)[0]


def _heldout_task(task: LocalTask, directory: Path, heartbeat: Heartbeat, *, assigned: Path, num_files: int) -> dict:
    signatures = join_arrays(assigned, [f"signatures-{index:05d}" for index in range(num_files)])
    heartbeat(len(signatures), 0)
    heldout = HeldOut.index(signatures)
    return {"totals": {}, "outputs": [save_array(directory, name, getattr(heldout, name)) for name in _HELDOUT_ARRAYS]}


def _gather_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    parts: dict[str, int],
    num_files: int,
    work: dict[str, Path],
    seed: int,
) -> dict:
    part, num_documents = list(parts.items())[task.index]
    name = part.split("-")[0]
    counts, dropped, num_read = DocumentCounts(), Counter(), 0
    if name == TRAIN:
        heldout = HeldOut(**{array: load_array(work["heldout"], array) for array in _HELDOUT_ARRAYS})
    else:
        heldout = HeldOut.index(no_signatures())
    with ShardWriter(directory, stem=part) as writer:
        documents = _documents(work["assign"], part=part, num_files=num_files, seed=seed)
        for chunk in batch_records(documents, num_characters=GATHER_BYTES):
            kept_records = []
            num_read += len(chunk)
            for start in range(0, len(chunk), _COMPARED):
                compared = chunk[start : start + _COMPARED]
                for record, is_near in zip(
                    compared, heldout.has_near_duplicate([record.text for record in compared]), strict=True
                ):
                    heartbeat(1, record.num_bytes)
                    if is_near:
                        dropped["near a held-out document"] += 1
                    else:
                        kept_records.append(record)
            for record in _shuffled(kept_records, seed=seed):
                counts.count_written(record)
                writer.add(record)
        if num_read != num_documents:
            raise OSError(
                f"{work['assign']} has {num_read:,} of the {num_documents:,} documents of {part}: a file is missing or "
                "cut short; give the command again, which makes it again"
            )
    totals = counts.totals(dropped=dropped, bad=Counter())
    outputs = [{**output, "split": name} for output in writer.outputs]
    return {"totals": totals | {"splits": {name: totals["written"]}}, "outputs": outputs}


def _documents(folder: Path, *, part: str, num_files: int, seed: int) -> Iterator[Record]:
    """Yield a part's documents, the files in the order of a hash, so that sources mix."""
    for task in sorted(range(num_files), key=lambda number: _keyed_hash("files", seed, f"{part} {number}".encode())):
        path = piece_path(folder, part, task)
        if path.is_file():  # a task with no document of the part writes none
            yield from read_records(path)


def _shuffled(records: list[Record], *, seed: int) -> list[Record]:
    """Return the documents in the order of a hash of their ids and, for repeated documents, the number of the copy."""
    copies, keys = Counter(), []
    for record in records:
        keys.append(_keyed_hash("order", seed, f"{record.id} {copies[record.id]}".encode()))
        copies[record.id] += 1
    return [records[index] for index in np.argsort(np.array(keys, np.uint64), kind="stable")]


def _copies(name: str, *, weight: float, seed: int) -> int:
    """Return how often to repeat a document: the weight rounded down, or up for its fraction of the documents."""
    fraction = _keyed_hash("weight", seed, name.encode()) / 2**64
    return int(weight) + (fraction < weight % 1)


def hash_text(text: str, *, seed: int) -> int:
    """Return 64 bits of a hash of the seed and the normalised text."""
    digest = hashlib.blake2b(digest_size=8, key=f"split {seed}".encode())
    for codes in normalized_pieces(text):
        digest.update(codes.astype("<u4").data)
    return int.from_bytes(digest.digest(), "big")


def _keyed_hash(purpose: str, seed: int, data: bytes) -> int:
    """Return 64 bits of a hash that differs by purpose and seed."""
    digest = hashlib.blake2b(data, digest_size=8, key=f"{purpose} {seed}".encode())
    return int.from_bytes(digest.digest(), "big")
