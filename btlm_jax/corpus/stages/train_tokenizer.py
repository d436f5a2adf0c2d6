"""The stage `tokenizer`: train SentencePiece with byte fallback, or byte-level BPE, on documents of `split`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

from btlm_jax.corpus.engine.inputs import read_stage, stage_inputs
from btlm_jax.corpus.engine.stage import Stage, accept_all, run_stage
from btlm_jax.corpus.engine.tasks import Heartbeat, LocalTask, Task
from btlm_jax.corpus.engine.workers import LocalWorkers
from btlm_jax.corpus.readers.records import output_entry, read_records
from btlm_jax.corpus.stages.split import TRAIN
from btlm_jax.display.progress import Log
from btlm_jax.storage.files import AtomicFile
from btlm_jax.tokenizers import byte_level
from btlm_jax.tokenizers.sentencepiece_bpe import SENTENCEPIECE, TOKENIZER_BYTES, TOKENIZER_FILE, train_sentencepiece

RECIPE = 1  # raise when the steps change
KINDS = (SENTENCEPIECE, byte_level.KIND)


def train_tokenizer_stage(source: Path, *, kind: str, vocab_size: int, output: Path, log: Log) -> dict:
    """Train a tokenizer on the first training documents, which are shuffled, and return the stage's manifest.

    `kind` is one of KINDS.

    Raises:
      FileNotFoundError: there is no finished split in `source`.
      ValueError: the vocabulary is too small, or too large for the text, or `output` has other settings or inputs.
    """
    documents = read_stage(source)
    files = zip(stage_inputs(source, documents), documents["outputs"], strict=True)
    training = [item for item, file in files if file.get("split") == TRAIN]
    sizes = itertools.accumulate((item.num_bytes for item in training), initial=0)
    inputs = tuple(item for item, before in zip(training, sizes, strict=False) if before <= TOKENIZER_BYTES)
    if not inputs:
        raise ValueError(f"{source} holds the stage {documents['stage']}; train on what btlm corpus split wrote")
    stage = Stage(
        name="tokenizer",
        settings={"recipe": RECIPE, "kind": kind, "vocab_size": vocab_size, "bytes": TOKENIZER_BYTES},
        tasks=[Task(index=0, inputs=inputs, weight=1)],
        run=functools.partial(_train_task, kind=kind, vocab_size=vocab_size),
    )
    return run_stage(stage, output, workers=LocalWorkers(1), log=log, check=accept_all)


def _train_task(task: LocalTask, directory: Path, heartbeat: Heartbeat, *, kind: str, vocab_size: int) -> dict:
    is_byte_level = kind == byte_level.KIND
    train = byte_level.train_byte_level if is_byte_level else train_sentencepiece
    contents = train(_texts(task, heartbeat), vocab_size=vocab_size)
    with AtomicFile(directory / (byte_level.STORED_FILE if is_byte_level else TOKENIZER_FILE)) as file:
        file.write(contents)
    return {"totals": {}, "outputs": [output_entry(file, num_documents=0)]}


def _texts(task: LocalTask, heartbeat: Heartbeat) -> Iterator[str]:
    size = 0
    for item in task.inputs:
        for record in read_records(item.path):
            if size > TOKENIZER_BYTES:
                return
            size += record.num_bytes
            heartbeat(1, record.num_bytes)
            yield record.text
