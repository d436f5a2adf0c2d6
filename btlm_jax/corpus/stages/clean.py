"""The stage `clean`: raw files -> documents with repaired Unicode in `.jsonl.zst`; short documents are dropped.

As for SlimPajama: `ftfy.fix_text(text, normalization="NFC")`, then documents under 200 normalised characters dropped.
https://github.com/Cerebras/modelzoo, data_preparation/nlp/slimpajama/preprocessing
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

import ftfy

from btlm_jax import notices
from btlm_jax.corpus.engine.counts import DocumentCounts
from btlm_jax.corpus.engine.inputs import make_tasks, raw_inputs_of
from btlm_jax.corpus.engine.stage import QUARANTINE_FOLDER, Stage, run_stage
from btlm_jax.corpus.engine.tasks import Heartbeat, LocalInput, LocalTask
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.near_duplicates import MIN_CHARACTERS
from btlm_jax.corpus.near_duplicates.normalize import is_shorter
from btlm_jax.corpus.readers.raw import DEFAULT_KEYS, BadFileError, Defect, Keys, read_raw
from btlm_jax.corpus.readers.records import Record, ShardWriter
from btlm_jax.display.progress import Log
from btlm_jax.storage.files import AtomicFile
from btlm_jax.storage.location import PathOrUrl

RECIPE = 3  # raise when the steps change
FAIL, KEEP_PREFIX = "fail", "keep-prefix"
ON_BAD_FILE = (FAIL, KEEP_PREFIX)

FTFY = ftfy.TextFixerConfig(normalization="NFC", explain=False)
_FTFY_WITHOUT_HTML = FTFY._replace(unescape_html=False)
# In a line of only these characters ftfy changes nothing but the curly quotes: next to ASCII alone they are no sign of
# a wrong encoding. Lines with any other character, or with an entity as ftfy knows them, are passed to ftfy.
_UNCHANGED = "\\t\\n -~\u2018\u2019\u201c\u201d\u2013\u2014\u2026"
_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
_SUSPECT = re.compile(f"[^{_UNCHANGED}]")
_SUSPECT_OR_ENTITY = re.compile(f"{_SUSPECT.pattern}|{_ENTITY.pattern}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What to clean, and what to do with bad input."""

    inputs: tuple[PathOrUrl, ...]
    default_source: str
    on_bad_file: str
    max_bad_rate: float
    keys: Keys = DEFAULT_KEYS
    folders_are_sources: bool = False  # the first folder of a file's name is the source, before default_source

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
      FileNotFoundError: there are no raw files.
      ValueError: a file is bad, too many lines are bad, no document is left, or `output` is inside the input folder.
    """
    check_not_inside(output, config.inputs)
    stage = Stage(
        name="clean",
        settings={
            "recipe": RECIPE,
            "ftfy": ftfy.__version__,
            "min_characters": MIN_CHARACTERS,
            "default_source": config.default_source,
            "on_bad_file": config.on_bad_file,
            "keys": dataclasses.asdict(config.keys),
            **({"folders_are_sources": True} if config.folders_are_sources else {}),
        },
        tasks=make_tasks(raw_inputs_of(config.inputs)),
        run=functools.partial(_clean_task, config=config),
    )
    quarantine = output / QUARANTINE_FOLDER
    check = functools.partial(_check, max_bad_rate=config.max_bad_rate, quarantine=quarantine)
    manifest = run_stage(stage, output, workers=workers, log=log, check=check)
    _report(manifest["totals"], quarantine=quarantine)
    return manifest


def fix_unicode(text: str) -> str:
    """Return `ftfy.fix_text(text, normalization="NFC")`, calling it only for lines that it may change."""
    return "".join(fix_unicode_pieces(text))


def fix_unicode_pieces(text: str) -> Iterator[str]:
    """Yield the fixed text in pieces.

    ftfy works line by line, but for one state: after the line with the first "<" it takes the text for HTML, and leaves
    entities such as &amp; as they are.
    """
    first_tag = text.find("<")
    has_entities = _ENTITY.search(text, 0, len(text) if first_tag < 0 else first_tag) is not None
    suspects = _SUSPECT_OR_ENTITY if has_entities else _SUSPECT
    match, num_done = suspects.search(text), 0
    while match is not None:
        start = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.start()) + 1 or len(text)
        yield _straighten_quotes(text[num_done:start])
        config = _FTFY_WITHOUT_HTML if 0 <= first_tag < start else FTFY
        yield ftfy.fix_text(text[start:end], config)
        num_done = end
        match = suspects.search(text, num_done)
    yield _straighten_quotes(text[num_done:])


def _straighten_quotes(text: str) -> str:
    """Replace curly quotes by straight ones, as ftfy does."""
    if text.isascii():
        return text
    text = text.replace("\u2018", "'").replace("\u2019", "'")
    return text.replace("\u201c", '"').replace("\u201d", '"')


def _report(totals: dict, *, quarantine: Path) -> None:
    """Say what is not as it was in the raw files."""
    if num_bad := totals["bad"]["quarantined"]:
        message = f"{num_bad:,} lines or files are bad and left out, {first_defect(quarantine)}"
        notices.report("line-quarantined", message, count=num_bad)
    for change, count in sorted(totals["changed values"].items()):
        notices.report("value-changed", f"{change}: {count:,}", count=count)


def check_not_inside(output: Path, inputs: Sequence[PathOrUrl]) -> None:
    """Check that what a stage writes is not among what it reads.

    Raises:
      ValueError: it is.
    """
    for source in inputs:
        if isinstance(source, Path) and output.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"output {output} lies in input {source}, so it would be read as input; choose another")


class Quarantine:
    """Writes a task's defects to a file of the stage's quarantine as they are found; none make no file."""

    def __init__(self, directory: Path, *, task: LocalTask):
        self._path = directory / QUARANTINE_FOLDER / f"{task.index:05d}.jsonl"
        self._stack = contextlib.ExitStack()
        self._file: AtomicFile | None = None
        self.first: Defect | None = None
        self.num_defects = 0

    def __enter__(self) -> Quarantine:
        return self

    def add(self, defect: Defect) -> None:
        """Write a defect."""
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._stack.enter_context(AtomicFile(self._path))
            self.first = defect
        self._file.write(json.dumps(dataclasses.asdict(defect)).encode() + b"\n")
        self.num_defects += 1

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, traceback)


def first_defect(quarantine: Path) -> str:
    """Return where the first defect of a quarantine is, its reason, and where all are."""
    files = sorted(quarantine.glob("*.jsonl"))
    if not files:
        return f"which {quarantine} does not list any more: its files are gone"
    with open(files[0], encoding="utf-8") as file:
        found = json.loads(file.readline())
    line = f", line {found['line']}" if found["line"] else ""
    return f"{found['file']}{line}: {found['reason']}; {quarantine} has all"


def _clean_task(task: LocalTask, directory: Path, heartbeat: Heartbeat, *, config: CleanConfig) -> dict:
    counts, dropped, repairs = DocumentCounts(), Counter(), Counter()
    with (
        Quarantine(directory, task=task) as quarantine,
        ShardWriter(directory, stem=f"documents-{task.index:05d}") as writer,
    ):
        for item in task.inputs:
            for raw in _read(item, quarantine, repairs, config=config):
                counts.count_read(raw)
                heartbeat(1, raw.num_bytes)
                data = b"".join(piece.encode() for piece in fix_unicode_pieces(raw.text))
                counts.count_changed(data != raw.text.encode())
                others = dataclasses.replace(raw, text="")
                del raw  # here and below: to hold as few copies of a long document as possible
                record = dataclasses.replace(others, text=data.decode())
                del data
                if is_shorter(record.text, than=MIN_CHARACTERS):
                    dropped["short"] += 1
                else:
                    counts.count_written(record)
                    writer.add(record)
                del record
    bad = Counter({"quarantined": quarantine.num_defects})
    totals = counts.totals(dropped=dropped, bad=bad) | {"changed values": dict(repairs)}
    first = quarantine.first
    example = f"{first.file}: {first.reason}" if first else ""
    return {"totals": totals, "outputs": writer.outputs, "example": example}


def _read(item: LocalInput, quarantine: Quarantine, repairs: Counter, *, config: CleanConfig) -> Iterator[Record]:
    """Yield the documents of a file; put its defects into quarantine, count values that were changed in `repairs`."""

    def is_record(value: Record | Defect) -> TypeGuard[Record]:
        if isinstance(value, Defect):
            quarantine.add(value)
        return isinstance(value, Record)

    folder, slash, _ = item.name.partition("/")
    default_source = folder if slash and config.folders_are_sources else config.default_source
    try:
        found = read_raw(
            item.path,
            name=item.name,
            default_source=default_source,
            is_piece=item.is_piece,
            keys=config.keys,
            repairs=repairs,
        )
        yield from filter(is_record, found)
    except BadFileError as error:
        if config.on_bad_file == FAIL:
            raise ValueError(
                f"{item.name} cannot be used: {error}. --on_bad_file={KEEP_PREFIX} goes on with what comes before"
            ) from error
        quarantine.add(Defect(file=item.name, line=0, offset=0, reason=str(error), head=""))


def _check(results: list[dict], *, max_bad_rate: float, quarantine: Path) -> None:
    bad = sum(result["totals"]["bad"]["quarantined"] for result in results)
    good = sum(part["documents"] for result in results for part in result["totals"]["read"].values())
    if bad > max_bad_rate * (good + bad):
        example = next((f" ({text})" for result in results if (text := result.get("example"))), "")
        if not good:
            raise ValueError(f"no document can be read{example}; {quarantine} says of each line or file why")
        raise ValueError(
            f"{bad:,} of {good + bad:,} lines are bad, which is more than max_bad_rate={max_bad_rate}; {quarantine} "
            f"says which and why{example}. Mend or remove them; btlm corpus clean --max_bad_rate=RATE leaves them out, "
            "and keeps finished work"
        )
    if not any(result["totals"]["written"] for result in results):
        raise ValueError(
            f"nothing is left: all documents are short (under {MIN_CHARACTERS} characters), or there are none"
        )
