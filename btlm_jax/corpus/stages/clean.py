"""The stage `clean`: raw files -> repaired Unicode, short documents dropped, `.jsonl.zst`.

As SlimPajama did: `ftfy.fix_text(text, normalization="NFC")`, then documents under 200 normalised characters go.
https://github.com/Cerebras/modelzoo, data_preparation/nlp/slimpajama/preprocessing
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ftfy

from btlm_jax.corpus.engine.counts import Tally
from btlm_jax.corpus.engine.inputs import make_tasks, raw_inputs
from btlm_jax.corpus.engine.stage import Log, Stage, run_stage
from btlm_jax.corpus.engine.tasks import Input, Task, Tick
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.near_duplicates.normalize import MIN_CHARACTERS, is_shorter
from btlm_jax.corpus.readers.raw import BadFile, Defect, read_raw
from btlm_jax.corpus.readers.records import Record, ShardWriter
from btlm_jax.storage.files import AtomicFile
from btlm_jax.storage.location import PathOrUrl

RECIPE = 1  # raise when the steps change
QUARANTINE_FOLDER = "quarantine"
FAIL, KEEP_PREFIX = "fail", "keep-prefix"
ON_BAD_FILE = (FAIL, KEEP_PREFIX)

_FTFY = ftfy.TextFixerConfig(normalization="NFC", explain=False)
_FTFY_WITHOUT_HTML = _FTFY._replace(unescape_html=False)
# Of what is not here, ftfy may change anything. Of these it changes nothing but the quotes: they are no sign of a wrong
# encoding in the company of ASCII alone, and a line that has other characters is left to ftfy.
_CALM = "\\t\\n -%'-~\u2018\u2019\u201c\u201d\u2013\u2014\u2026"
_SUSPECT, _SUSPECT_OR_AMPERSAND = re.compile(f"[^&{_CALM}]"), re.compile(f"[^{_CALM}]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What to clean, and what to do with bad input."""

    input: PathOrUrl
    default_source: str
    on_bad_file: str
    max_bad_rate: float

    def __post_init__(self):
        if self.on_bad_file not in ON_BAD_FILE:
            raise ValueError(f"on_bad_file={self.on_bad_file!r} is not known; it may be {' or '.join(ON_BAD_FILE)}")
        if not 0 <= self.max_bad_rate <= 1:
            raise ValueError(f"max_bad_rate={self.max_bad_rate} must be between 0 and 1")
        if not self.default_source:
            raise ValueError("source='' must be a name")


def clean(config: CleanConfig, *, output: Path, workers: Workers, log: Log) -> dict:
    """Clean the raw files and return the manifest.

    Raises:
      FileNotFoundError: there are none.
      ValueError: a file is bad, too many lines are, nothing is left, or `output` lies where the raw files are.
    """
    if isinstance(config.input, Path) and output.resolve().is_relative_to(config.input.resolve()):
        raise ValueError(f"output {output} lies in input {config.input}, so it would be read as input; choose another")
    stage = Stage(
        name="clean",
        settings={
            "recipe": RECIPE,
            "ftfy": ftfy.__version__,
            "min_characters": MIN_CHARACTERS,
            "default_source": config.default_source,
            "on_bad_file": config.on_bad_file,
        },
        tasks=make_tasks(raw_inputs(config.input, log=log)),
        run=functools.partial(_clean_task, default_source=config.default_source, on_bad_file=config.on_bad_file),
    )
    check = functools.partial(_check, max_bad_rate=config.max_bad_rate, quarantine=output / QUARANTINE_FOLDER)
    return run_stage(stage, output, workers=workers, log=log, check=check)


def fixed(text: str) -> str:
    """Return `ftfy.fix_text(text, normalization="NFC")`, calling it only for the lines that it can change."""
    return "".join(fixed_pieces(text))


def fixed_pieces(text: str) -> Iterator[str]:
    """Yield the fixed text piece by piece.

    ftfy works line by line; the one thing it carries over is that from the line of the first "<" on, the text is taken
    for HTML, whose entities stay.
    """
    first_tag = text.find("<")
    has_entities = text.find("&", 0, len(text) if first_tag < 0 else first_tag) >= 0
    suspects = _SUSPECT_OR_AMPERSAND if has_entities else _SUSPECT
    match, done = suspects.search(text), 0
    while match is not None:
        start = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.start()) + 1 or len(text)
        yield _straight(text[done:start])
        config = _FTFY_WITHOUT_HTML if 0 <= first_tag < start else _FTFY
        yield ftfy.fix_text(text[start:end], config)
        done = end
        match = suspects.search(text, done)
    yield _straight(text[done:])


def _straight(text: str) -> str:
    """Make curly quotes straight, as ftfy does."""
    if text.isascii():
        return text
    text = text.replace("\u2018", "'").replace("\u2019", "'")
    return text.replace("\u201c", '"').replace("\u201d", '"')


def _clean_task(task: Task, directory: Path, tick: Tick, *, default_source: str, on_bad_file: str) -> dict:
    tally, dropped, defects = Tally(), Counter(), []
    with ShardWriter(directory, stem=f"documents-{task.index:05d}") as writer:
        for item in task.inputs:
            for found in _read(item, defects, default_source=default_source, on_bad_file=on_bad_file):
                tally.read(found)
                tick(1, found.num_bytes)
                data = b"".join(piece.encode() for piece in fixed_pieces(found.text))
                tally.changed(data != found.text.encode())
                others = dataclasses.replace(found, text="")
                del found  # here and below: of a long document as little is held as can be
                record = dataclasses.replace(others, text=data.decode())
                del data
                if is_shorter(record.text, than=MIN_CHARACTERS):
                    dropped["short"] += 1
                else:
                    tally.wrote(record)
                    writer.add(record)
                del record
    if defects:
        folder = directory / QUARANTINE_FOLDER
        folder.mkdir(exist_ok=True)
        with AtomicFile(folder / f"{task.index:05d}.jsonl") as file:
            for defect in defects:
                file.write(json.dumps(dataclasses.asdict(defect)).encode() + b"\n")
    bad = Counter({"quarantined": len(defects)})
    return {"totals": tally.totals(dropped=dropped, bad=bad), "outputs": writer.outputs}


def _read(item: Input, defects: list[Defect], *, default_source: str, on_bad_file: str) -> Iterator[Record]:
    """Yield the documents of a file; put its defects aside."""

    def is_document(found: Record | Defect) -> bool:
        if isinstance(found, Defect):
            defects.append(found)
        return isinstance(found, Record)

    try:
        yield from filter(is_document, read_raw(item.path, name=item.name, default_source=default_source))
    except BadFile as error:
        if on_bad_file == FAIL:
            raise ValueError(
                f"{item.name} cannot be used: {error}. --on_bad_file={KEEP_PREFIX} goes on with what comes before"
            ) from error
        defects.append(Defect(file=item.name, line=0, offset=0, reason=str(error), head=""))


def _check(results: list[dict], *, max_bad_rate: float, quarantine: Path) -> None:
    bad = sum(result["totals"]["bad"]["quarantined"] for result in results)
    good = sum(part["documents"] for result in results for part in result["totals"]["read"].values())
    if bad > max_bad_rate * (good + bad):
        raise ValueError(
            f"{bad:,} of {good + bad:,} lines are bad, which is more than max_bad_rate={max_bad_rate}; {quarantine} "
            "says which and why. Finished work is kept: the same command with a higher --max_bad_rate accepts it"
        )
    if not any(result["totals"]["written"] for result in results):
        raise ValueError("nothing is left: all documents are short, or there are none")
