"""Run one stage of the pipeline: tasks in worker processes, each restartable, and a manifest when all are done.

A stage's directory holds

    plan.json             written first: stage, settings, inputs, tasks; a start with another plan is refused
    done/00003.json       what task 3 read and wrote; it appears last, so a killed task is redone whole
    quarantine/           bad lines, a file a task that found some
    manifest.json         written last: the plan, the totals by source, every output with its sha256

A task is a fixed list of input files and a pure function of them, so nothing depends on the number of workers, on their
order, or on how often they were killed. No manifest holds times or paths of this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from btlm_jax.corpus.progress import Progress, make_counters, record_peak, tick_of
from btlm_jax.files import write_atomically

FORMAT = "btlm-corpus-stage"
FORMAT_VERSION = 1
PLAN_FILE, MANIFEST_FILE, DONE_FOLDER = "plan.json", "manifest.json", "done"
TASK_BYTES = 64_000_000  # small input files share a task up to this size

Log = Callable[[str], None]
Tick = Callable[[int, int], None]  # (documents, bytes of text) since the last call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One input file; sha256 is "" for a raw file, which is hashed when its task reads it."""

    name: str
    path: Path
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A share of a stage's work; `weight` is what the ETA counts."""

    index: int
    inputs: tuple[Input, ...]
    weight: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What to do, and everything that the bytes written depend on: `settings` and the tasks' inputs."""

    name: str
    settings: dict
    tasks: Sequence[Task]
    run: Callable[[Task, Path, Tick], dict]  # picklable; writes into the directory; returns what done/ keeps

    @property
    def plan(self) -> dict:
        tasks = [[[item.name, item.num_bytes, item.sha256] for item in task.inputs] for task in self.tasks]
        return {"stage": self.name, "settings": self.settings, "tasks": tasks}


def run_stage(
    stage: Stage, directory: Path, *, num_workers: int, log: Log, check: Callable[[list[dict]], None]
) -> dict:
    """Run what is not done yet and return the manifest.

    `check` sees the records of all tasks before the manifest is written, and may refuse them.

    Raises:
      ValueError: the directory holds another plan's work, an input changed, or a task refused its input.
      OSError: something cannot be read or written.
    """
    (directory / DONE_FOLDER).mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        _check_plan(stage, directory)
        records = {task.index: _finished(task, directory) for task in stage.tasks}
        waiting = [task for task in stage.tasks if records[task.index] is None]
        if (directory / MANIFEST_FILE).is_file() and not waiting:
            log(f"{stage.name}: done already, in {directory}")
            return json.loads((directory / MANIFEST_FILE).read_bytes())
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        progress = Progress(
            stage.name,
            num_tasks=len(stage.tasks),
            num_done=len(stage.tasks) - len(waiting),
            weights=[task.weight for task in waiting],
            log=log,
        )
        runner = _run_here if num_workers == 1 else _run_in_pool
        for task, record in runner(stage, waiting, directory, num_workers=num_workers, progress=progress):
            records[task.index] = record
            progress.task_done(task.weight)
        progress.report()
        ordered = [records[task.index] for task in stage.tasks]
        check([record["result"] for record in ordered])
        return _write_manifest(stage, directory, ordered)


def accept(results: list[dict]) -> None:
    """Accept what the tasks wrote: they have refused already what cannot be used."""


def _run_here(
    stage: Stage, tasks: Sequence[Task], directory: Path, *, num_workers: int, progress: Progress
) -> Iterator[tuple[Task, dict]]:
    assert num_workers == 1
    for task in tasks:
        yield task, run_task(stage.run, task, directory, progress.tick)


def _run_in_pool(
    stage: Stage, tasks: Sequence[Task], directory: Path, *, num_workers: int, progress: Progress
) -> Iterator[tuple[Task, dict]]:
    """Yield tasks as they end; at the first failure start no more, let the running ones end, and raise it."""
    context = multiprocessing.get_context("spawn")  # the parent has threads, which a fork would leave in any state
    counters = make_counters(context)
    with ProcessPoolExecutor(num_workers, context, initializer=_begin_worker, initargs=(counters,)) as pool:
        running = {pool.submit(_run_in_worker, stage.run, task, directory): task for task in tasks}
        try:
            while running:
                ended, _ = wait(running, timeout=progress.interval, return_when=FIRST_COMPLETED)
                progress.count(counters)
                for future in ended:
                    yield running.pop(future), future.result()
            progress.count(counters)
        except BrokenProcessPool as error:
            raise ValueError(
                f"{stage.name}: a worker was killed, perhaps for its memory; finished work is kept: run the same "
                "command again, with fewer --workers if memory is short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_counters: tuple = ()


def _begin_worker(counters: tuple) -> None:
    global _counters  # a spawned process gets shared memory at its start only
    _counters = counters


def _run_in_worker(run: Callable, task: Task, directory: Path) -> dict:
    record = run_task(run, task, directory, tick_of(_counters))
    record_peak(_counters)
    return record


def run_task(run: Callable[[Task, Path, Tick], dict], task: Task, directory: Path, tick: Tick) -> dict:
    """Run one task whole, keep its record under done/, and return it."""
    stamps = [_stamp(item.path) for item in task.inputs]
    hashes = [_hash_checked(item) for item in task.inputs]
    result = run(task, directory, tick)
    for item, stamp in zip(task.inputs, stamps, strict=True):
        if _stamp(item.path) != stamp:
            raise ValueError(f"{item.path} changed while it was read; run again when nothing writes to it")
    record = {"stamps": stamps, "sha256": hashes, "result": result}
    write_atomically(_record_path(directory, task), json.dumps(record))
    return record


def _check_plan(stage: Stage, directory: Path) -> None:
    """Keep the plan, or compare it with the one that the directory was begun with."""
    path = directory / PLAN_FILE
    plan = json.loads(json.dumps(stage.plan))
    if not path.is_file():
        write_atomically(path, json.dumps(plan, indent=1, sort_keys=True))
        return
    begun = json.loads(path.read_bytes())
    if begun == plan:
        return
    changes = [
        f"{key}={begun['settings'].get(key)!r} then, {plan['settings'].get(key)!r} now"
        for key in sorted(begun["settings"].keys() | plan["settings"].keys())
        if begun["settings"].get(key) != plan["settings"].get(key)
    ]
    if begun["stage"] != plan["stage"]:
        changes = [f"stage {begun['stage']} then, {plan['stage']} now"]
    elif begun["tasks"] != plan["tasks"]:
        changes.append("the input files are others, or of other sizes or contents")
    raise ValueError(f"{directory} was begun otherwise: {'; '.join(changes)}; choose another --output, or delete it")


def _finished(task: Task, directory: Path) -> dict | None:
    """Return the record of a finished task, after making sure that its inputs are still the same."""
    path = _record_path(directory, task)
    if not path.is_file():
        return None
    record = json.loads(path.read_bytes())
    for item, stamp, sha256 in zip(task.inputs, record["stamps"], record["sha256"], strict=True):
        if _stamp(item.path) != stamp and hash_file(item.path) != sha256:
            raise ValueError(
                f"input {item.path} changed after it was processed; choose another --output, or delete {directory}"
            )
    return record


def _write_manifest(stage: Stage, directory: Path, records: list[dict]) -> dict:
    totals: dict = {}
    for record in records:
        _add(totals, record["result"]["totals"])
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **stage.plan,
        "input_sha256": [record["sha256"] for record in records],
        "totals": totals,
        "outputs": [output for record in records for output in record["result"]["outputs"]],
    }
    body["fingerprint"] = fingerprint_of(body)
    write_atomically(directory / MANIFEST_FILE, json.dumps(body, indent=1, sort_keys=True))
    return body


def fingerprint_of(manifest: dict) -> str:
    """Return the sha256 over everything else that a stage's manifest says."""
    rest = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _add(total: dict, part: dict) -> None:
    """Add nested counts."""
    for key, value in part.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def _record_path(directory: Path, task: Task) -> Path:
    return directory / DONE_FOLDER / f"{task.index:05d}.json"


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _hash_checked(item: Input) -> str:
    sha256 = hash_file(item.path)
    if item.sha256 and sha256 != item.sha256:
        raise ValueError(f"{item.path} is not what the stage that wrote it recorded; make it again")
    return sha256


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is working in {directory}; wait for it") from error
        yield
