"""One task of a stage: its input files, made local, and the record under done/ that appears when it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from btlm_jax.corpus.engine.progress import peak_bytes
from btlm_jax.storage.files import local_scratch_file, write_atomically
from btlm_jax.storage.location import PathOrUrl, hash_range, version_stamp

DONE_FOLDER = "done"

Tick = Callable[[int, int], None]  # (documents, bytes of text) since the last call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One input file, or a piece of one; sha256 is "" for a raw file, which is hashed when its task reads it."""

    name: str
    path: PathOrUrl
    num_bytes: int
    sha256: str
    begin: int = 0
    is_piece: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A share of a stage's work; `weight` is what the ETA counts."""

    index: int
    inputs: tuple[Input, ...]
    weight: int

    def __str__(self) -> str:
        names = [item.name for item in self.inputs]
        return f"task {self.index}" + (f" ({names[0]}{' and more' * (len(names) > 1)})" if names else "")


Run = Callable[[Task, Path, Tick], dict]  # picklable; writes into the directory; returns what done/ keeps


def run_task(run: Run, task: Task, directory: Path, tick: Tick) -> dict:
    """Run one task whole, keep its record under done/, and return it; `counted` in it is for watchers far away."""
    counted = {"documents": 0, "bytes": 0}

    def count(num_documents: int, num_bytes: int) -> None:
        counted["documents"] += num_documents
        counted["bytes"] += num_bytes
        tick(num_documents, num_bytes)

    stamps = [version_stamp(item.path) for item in task.inputs]
    with at_hand(task.inputs, directory) as inputs:
        result = run(dataclasses.replace(task, inputs=inputs), directory, count)
    for item, stamp in zip(task.inputs, stamps, strict=True):
        if version_stamp(item.path) != stamp:
            raise ValueError(f"{item.path} changed while it was read; run again when nothing writes to it")
    counted["peak_bytes"] = peak_bytes()
    record = {"stamps": stamps, "sha256": [item.sha256 for item in inputs], "counted": counted, "result": result}
    write_atomically(record_path(directory, task), json.dumps(record))
    return record


def count_nothing(num_documents: int, num_bytes: int) -> None:
    """Be the tick of a task whose watcher is on another machine: the task's record tells it."""


def finished(task: Task, directory: Path, *, outputs: Path) -> dict | None:
    """Return the record of a finished task; None if it is not, or if what it wrote is gone or of another size.

    Raises:
      ValueError: its inputs are not the same any more.
    """
    path = record_path(directory, task)
    if not path.is_file():
        return None
    record = json.loads(path.read_bytes())
    if not all(_is_whole(outputs / output["file"], output) for output in record["result"]["outputs"]):
        return None
    for item, stamp, sha256 in zip(task.inputs, record["stamps"], record["sha256"], strict=True):
        if version_stamp(item.path) != stamp and _hash(item) != sha256:
            raise ValueError(
                f"input {item.path} changed after it was processed; choose another --output, or delete {directory}"
            )
    return record


def record_path(directory: Path, task: Task) -> Path:
    """Return where a task's record is kept."""
    return directory / DONE_FOLDER / f"{task.index:05d}.json"


@contextlib.contextmanager
def at_hand(inputs: Sequence[Input], folder: Path) -> Iterator[tuple[Input, ...]]:
    """Yield the inputs as whole local files with their hashes; remote files and pieces are copied for the time being.

    Raises:
      ValueError: one is not what its sha256 says.
    """
    with contextlib.ExitStack() as stack:
        yield tuple(_at_hand(item, folder, stack) for item in inputs)


def _at_hand(item: Input, folder: Path, stack: contextlib.ExitStack) -> Input:
    if isinstance(item.path, Path) and not item.is_piece:
        local, sha256 = item.path, hash_file(item.path)
    else:
        file = stack.enter_context(local_scratch_file(folder, prefix="input"))
        sha256 = hash_range(item.path, begin=item.begin, num_bytes=item.num_bytes, copy_to=file)
        file.flush()
        local = Path(file.name)
    if item.sha256 and sha256 != item.sha256:
        raise ValueError(f"{item.path} is not what the stage that wrote it recorded; make it again")
    return dataclasses.replace(item, path=local, sha256=sha256)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(item: Input) -> str:
    if isinstance(item.path, Path) and not item.is_piece:
        return hash_file(item.path)
    return hash_range(item.path, begin=item.begin, num_bytes=item.num_bytes, copy_to=None)


def _is_whole(path: Path, output: dict) -> bool:
    return path.is_file() and path.stat().st_size == output["num_bytes"]
