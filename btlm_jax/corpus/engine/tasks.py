"""One task of a stage: its input files, copied to this machine if they are remote, and its record under done/."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from btlm_jax import notices
from btlm_jax.corpus.engine.progress import peak_bytes
from btlm_jax.storage.files import hash_file, read_json_object, scratch_file, write_atomically
from btlm_jax.storage.location import PathOrUrl, hash_range, version_stamp

DONE_FOLDER = "done"

Heartbeat = Callable[[int, int], None]  # takes (documents, bytes of text) processed since the last call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """An input file or a piece of one. The sha256 is "" for a raw file, which is hashed when its task reads it."""

    name: str
    location: PathOrUrl
    num_bytes: int
    sha256: str
    begin: int = 0
    is_piece: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalInput:
    """An input as a whole file on this machine, with the hash of its contents."""

    name: str
    path: Path
    sha256: str
    is_piece: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A part of a stage's work; the ETA counts tasks by their `weight`."""

    index: int
    inputs: tuple[Input, ...]
    weight: int

    def __str__(self) -> str:
        names = [item.name for item in self.inputs]
        return f"task {self.index}" + (f" ({names[0]}{' and more' * (len(names) > 1)})" if names else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTask:
    """A task as its function sees it: every input a local file."""

    index: int
    inputs: tuple[LocalInput, ...]


# (task, the stage's directory to write to, heartbeat) -> what the record keeps as "result"; can be pickled.
TaskFunction = Callable[[LocalTask, Path, Heartbeat], dict]


def run_task(function: TaskFunction, task: Task, directory: Path, heartbeat: Heartbeat) -> dict:
    """Run one task whole, write its record under done/, and return it.

    The record's "counted" is the sum of the heartbeats, for a parent on another machine.

    Raises:
      ValueError: an input changed while it was read, or is not what its sha256 says.
    """
    counted = {"documents": 0, "bytes": 0}

    def count(num_documents: int, num_bytes: int) -> None:
        counted["documents"] += num_documents
        counted["bytes"] += num_bytes
        heartbeat(num_documents, num_bytes)

    try:
        stamps = [version_stamp(item.location) for item in task.inputs]
        with local_copies(task.inputs, directory) as inputs:
            result = function(LocalTask(index=task.index, inputs=inputs), directory, count)
        for item, stamp in zip(task.inputs, stamps, strict=True):
            if version_stamp(item.location) != stamp:
                raise ValueError(f"{item.location} changed while it was read; run again when nothing writes to it")
    except Exception as error:
        notices.note_whether_named(error)  # its traceback does not reach the process that reports it
        raise
    counted["peak_bytes"] = peak_bytes()
    record = {"stamps": stamps, "sha256": [item.sha256 for item in inputs], "counted": counted, "result": result}
    write_atomically(record_path(directory, task), json.dumps(record))
    return record


def no_heartbeat(num_documents: int, num_bytes: int) -> None:
    """Do nothing: the heartbeat of a task whose parent is on another machine and reads the counts from its record."""


def finished_record(task: Task, directory: Path, *, outputs: Path) -> dict | None:
    """Return the record of a finished task; None if there is none, or an output in `outputs` is missing or cut short.

    Raises:
      ValueError: its inputs have changed since.
    """
    path = record_path(directory, task)
    if not path.is_file():
        return None
    record = _read_record(path, num_inputs=len(task.inputs))
    if record is None:
        return None
    if not all(_is_whole(outputs / output["file"], output) for output in record["result"]["outputs"]):
        return None
    for item, stamp, sha256 in zip(task.inputs, record["stamps"], record["sha256"], strict=True):
        if version_stamp(item.location) != stamp and _hash_input(item) != sha256:
            raise ValueError(
                f"input {item.location} changed after it was processed; choose another --output, or delete {directory}"
            )
    return record


def _read_record(path: Path, *, num_inputs: int) -> dict | None:
    """Return what a finished task wrote; None, with a notice, if the file is damaged."""
    try:
        record = read_json_object(path)
    except ValueError as error:
        notices.report("task-repeated", f"{error}; the task is repeated")
        return None
    match record:
        case {"result": {"outputs": list(outputs), "totals": dict()}, "stamps": list(stamps), "sha256": list(hashes)}:
            is_of_inputs = len(stamps) == len(hashes) == num_inputs
            if is_of_inputs and isinstance(record.get("counted"), dict) and all(map(is_output, outputs)):
                return record
    notices.report("task-repeated", f"{path} is no record of a task; the task is repeated")
    return None


def is_output(value: object) -> bool:
    """Return whether a value of JSON describes a file that a task wrote."""
    match value:
        case {"file": str(file), "num_bytes": int(), "sha256": str()}:
            return bool(file) and not Path(file).is_absolute() and ".." not in Path(file).parts
    return False


def record_path(directory: Path, task: Task) -> Path:
    """Return the path of a task's record."""
    return directory / DONE_FOLDER / f"{task.index:05d}.json"


@contextlib.contextmanager
def local_copies(inputs: Sequence[Input], folder: Path) -> Iterator[tuple[LocalInput, ...]]:
    """Yield the inputs as whole local files; remote files and pieces are copied to `folder` while the block runs.

    Raises:
      ValueError: the contents of one do not have its sha256.
    """
    with contextlib.ExitStack() as stack:
        yield tuple(_local_copy(item, folder, stack) for item in inputs)


def _local_copy(item: Input, folder: Path, stack: contextlib.ExitStack) -> LocalInput:
    if isinstance(item.location, Path) and not item.is_piece:
        path, sha256 = item.location, hash_file(item.location)
    else:
        file = stack.enter_context(scratch_file(folder, prefix="input"))
        sha256 = hash_range(item.location, begin=item.begin, num_bytes=item.num_bytes, copy_to=file)
        file.flush()
        path = Path(file.name)
    if item.sha256 and sha256 != item.sha256:
        raise ValueError(f"{item.location} is not what the stage that wrote it recorded; make it again")
    return LocalInput(name=item.name, path=path, sha256=sha256, is_piece=item.is_piece)


def _hash_input(item: Input) -> str:
    if isinstance(item.location, Path) and not item.is_piece:
        return hash_file(item.location)
    return hash_range(item.location, begin=item.begin, num_bytes=item.num_bytes, copy_to=None)


def _is_whole(path: Path, output: dict) -> bool:
    return path.is_file() and path.stat().st_size == output["num_bytes"]
