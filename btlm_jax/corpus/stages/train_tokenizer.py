"""The stage `tokenizer`: train SentencePiece with byte fallback, or byte-level BPE, on documents of `split`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from btlm_jax.corpus.engine.inputs import read_documents, stage_inputs
from btlm_jax.corpus.engine.stage import Stage, accept_all, run_stage
from btlm_jax.corpus.engine.tasks import Heartbeat, LocalTask, Task
from btlm_jax.corpus.engine.workers import LocalWorkers
from btlm_jax.corpus.readers.records import output_entry, read_records
from btlm_jax.corpus.stages.split import TRAIN
from btlm_jax.display.progress import Log
from btlm_jax.storage.files import AtomicFile
from btlm_jax.tokenizers import byte_level, train_in_process
from btlm_jax.tokenizers.sentencepiece_bpe import SENTENCEPIECE, TOKENIZER_BYTES, TOKENIZER_FILE

MAX_FILES = 64  # that the training text is taken from
RECIPE = 2  # raise when the steps change
KINDS = (SENTENCEPIECE, byte_level.KIND)


def train_tokenizer_stage(source: Path, *, kind: str, vocab_size: int, output: Path, log: Log) -> dict:
    """Train a tokenizer on TOKENIZER_BYTES of training documents and return the stage's manifest.

    `kind` is one of KINDS. Files of training documents, all or MAX_FILES at even distances, give the same share each,
    their first documents; the documents of each file are shuffled.

    Raises:
      FileNotFoundError: there is no finished split in `source`.
      ValueError: the vocabulary is too small, or too large for the text, or `output` has other settings or inputs.
    """
    documents = read_documents(source, of=("split",), purpose="train on")
    files = zip(stage_inputs(source, documents), documents["outputs"], strict=True)
    training = [item for item, file in files if file.get("split") == TRAIN]
    count = min(len(training), MAX_FILES)
    inputs = tuple(training[number * len(training) // count] for number in range(count))
    if not inputs:
        raise ValueError(f"{source} has no training document")
    stage = Stage(
        name="tokenizer",
        settings={"recipe": RECIPE, "kind": kind, "vocab_size": vocab_size, "bytes": TOKENIZER_BYTES},
        tasks=[Task(index=0, inputs=inputs, weight=1)],
        run=functools.partial(_train_task, kind=kind, vocab_size=vocab_size),
    )
    return run_stage(stage, output, workers=LocalWorkers(1), log=log, check=accept_all)


def _train_task(task: LocalTask, directory: Path, heartbeat: Heartbeat, *, kind: str, vocab_size: int) -> dict:
    contents = train_in_process(kind, _texts(task, heartbeat), vocab_size=vocab_size)
    with AtomicFile(directory / (byte_level.STORED_FILE if kind == byte_level.KIND else TOKENIZER_FILE)) as file:
        file.write(contents)
    return {"totals": {}, "outputs": [output_entry(file, num_documents=0)]}


def _texts(task: LocalTask, heartbeat: Heartbeat) -> Iterator[str]:
    """Yield the first documents of each file: an equal share, and what earlier files lacked of theirs."""
    size = 0
    for number, item in enumerate(task.inputs, start=1):
        for record in read_records(item.path):
            if size * len(task.inputs) > TOKENIZER_BYTES * number:
                break
            size += record.num_bytes
            heartbeat(1, record.num_bytes)
            yield record.text
