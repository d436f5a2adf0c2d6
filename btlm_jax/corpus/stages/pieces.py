"""The stage `pieces`: long documents -> contiguous pieces, each a document, so that few or long ones can be split.

What follows, dedup and split, then compares and divides pieces: a repetition inside a document is found, and the
held-out text of a single book is pieces of it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from btlm_jax.corpus.engine.counts import DocumentCounts
from btlm_jax.corpus.engine.inputs import read_stage, stage_inputs
from btlm_jax.corpus.engine.stage import Stage, accept_all, run_stage
from btlm_jax.corpus.engine.tasks import Heartbeat, LocalTask, Task
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.readers.records import ShardWriter, read_records
from btlm_jax.display.progress import Log

RECIPE = 1  # raise when the steps change
_SEPARATORS = (re.compile("\n\n+"), re.compile("\n"), re.compile(" "))  # after which a piece ends, the best first
_HASHED = 64  # characters


def divide(source: Path, *, characters: int, output: Path, workers: Workers, log: Log) -> dict:
    """Divide the documents of a finished stage into pieces of about `characters`; return the manifest.

    Raises:
      FileNotFoundError: there is no finished stage in `source`.
      ValueError: the input is damaged, or `output` has other settings or inputs.
    """
    manifest = read_stage(source)
    stage = Stage(
        name="pieces",
        settings={"recipe": RECIPE, "characters": characters, "input": manifest["fingerprint"]},
        tasks=[
            Task(index=index, inputs=(item,), weight=item.num_bytes)
            for index, item in enumerate(stage_inputs(source, manifest))
        ],
        run=functools.partial(_divide_task, characters=characters),
    )
    return run_stage(stage, output, workers=workers, log=log, check=accept_all)


def pieces_of(text: str, *, characters: int) -> Iterator[str]:
    """Yield the pieces of a text, of half to one and a half `characters`; a text that is not longer is one.

    A piece ends after an empty line, or else a line, or else a word. Of several such places a hash of what follows
    decides, so that a passage that stands in a text twice is soon divided in the same places.
    """
    start = 0
    while 2 * (len(text) - start) > 3 * characters:
        end = _end_of_piece(
            text, begin=start + characters // 2, end=start + 3 * characters // 2, default=start + characters
        )
        yield text[start:end]
        start = end
    yield text[start:]


def _end_of_piece(text: str, *, begin: int, end: int, default: int) -> int:
    for separator in _SEPARATORS:
        places = [match.end() for match in separator.finditer(text, begin, end)]
        if places:
            return min(places, key=lambda place: zlib.crc32(text[place : place + _HASHED].encode("utf-8", "replace")))
    return default


def _divide_task(task: LocalTask, directory: Path, heartbeat: Heartbeat, *, characters: int) -> dict:
    counts = DocumentCounts()
    with ShardWriter(directory, stem=f"documents-{task.index:05d}") as writer:
        for record in read_records(task.inputs[0].path):
            counts.count_read(record)
            heartbeat(1, record.num_bytes)
            is_whole = 2 * len(record.text) <= 3 * characters
            for number, text in enumerate(pieces_of(record.text, characters=characters)):
                name = record.id if is_whole else f"{record.id}#{number}"
                piece = dataclasses.replace(record, id=name, text=text)
                counts.count_written(piece)
                writer.add(piece)
    return {"totals": counts.totals(dropped=Counter(), bad=Counter()), "outputs": writer.outputs}
