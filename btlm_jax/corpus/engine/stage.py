"""Run one stage of the pipeline: tasks in worker processes, each restartable, and a manifest when all are done.

A stage's directory contains

    plan.json             written first: stage, settings, inputs, tasks; a start with another plan is refused
    done/00003.json       what task 3 read and wrote; written last, so a task that was killed is repeated whole
    quarantine/           bad lines, one file per task that found any
    manifest.json         written at the end: the plan, the totals by source, every output with its sha256

A task is a fixed list of input files and a pure function of them, so nothing depends on the number of workers, on the
order in which they finish, or on restarts. A task whose outputs are missing, or of another size, is repeated. The
manifest contains no times and no paths of this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from btlm_jax import notices
from btlm_jax.corpus.engine.progress import Progress
from btlm_jax.corpus.engine.slurm import wait_for_earlier_job
from btlm_jax.corpus.engine.tasks import DONE_FOLDER, Task, TaskFunction, finished_record
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.display.progress import Log
from btlm_jax.storage.files import delete_temporary_files, exclusive_lock, hash_json, read_json_object, write_atomically

FORMAT = "btlm-corpus-stage"
FORMAT_VERSION = 1
PLAN_FILE, MANIFEST_FILE, LOCK_FILE = "plan.json", "manifest.json", ".lock"
_LOOKUPS = 16  # of finished tasks at a time
WORK_FOLDER = "work"
QUARANTINE_FOLDER = "quarantine"
# In a stage's directory beside its outputs.
STAGE_FILES = (PLAN_FILE, MANIFEST_FILE, DONE_FOLDER, WORK_FOLDER, QUARANTINE_FOLDER, "slurm")
COMMAND_LOCK_FILE = ".command.lock"  # of a command with several steps, each of which has its own lock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: `settings` and the tasks' inputs determine every byte that it writes."""

    name: str
    settings: dict
    tasks: Sequence[Task]
    run: TaskFunction
    output_folder: str = "."  # where the tasks write, relative to the stage's directory
    # Of its earlier steps, for the manifest's totals: among them what was read.
    totals_before: dict = dataclasses.field(default_factory=dict)

    @property
    def plan(self) -> dict:
        tasks = [[[item.name, item.num_bytes, item.sha256] for item in task.inputs] for task in self.tasks]
        return {"stage": self.name, "settings": self.settings, "tasks": tasks}


def run_stage(
    stage: Stage, directory: Path, *, workers: Workers, log: Log, check: Callable[[list[dict]], None]
) -> dict:
    """Run the tasks that are not done yet and return the manifest.

    `check` gets the results of all tasks before the manifest is written; it raises ValueError to refuse them.

    Raises:
      ValueError: the directory has been used with another plan, an input changed, or a task refused its input.
      FileExistsError: another process is working in the directory.
      OSError: something cannot be read or written.
    """
    check_output(directory)
    (directory / DONE_FOLDER).mkdir(parents=True, exist_ok=True)
    outputs = directory / stage.output_folder
    message = f"another process is working in {directory}; wait for it"
    with exclusive_lock(directory / LOCK_FILE, message=message):
        _check_plan(stage, directory)
        wait_for_earlier_job(directory, name=stage.name, log=log)
        for folder in (directory, directory / DONE_FOLDER, directory / QUARANTINE_FOLDER, outputs):
            delete_temporary_files(folder)
        find = functools.partial(finished_record, directory=directory, outputs=outputs)
        with ThreadPoolExecutor(_LOOKUPS) as pool:  # each asks a file system, or a bucket, for every file of a task
            found = pool.map(find, stage.tasks)
            records = {task.index: record for task, record in zip(stage.tasks, found, strict=True)}
        waiting = [task for task in stage.tasks if records[task.index] is None]
        if (directory / MANIFEST_FILE).is_file() and not waiting:
            manifest = _finished_manifest(directory)
            if manifest is not None:
                log(f"{stage.name}: done already, in {directory}")
                return manifest
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        progress = Progress(
            stage.name,
            num_tasks=len(stage.tasks),
            num_done=len(stage.tasks) - len(waiting),
            weights=[task.weight for task in waiting],
            log=log,
        )

        def on_done(task: Task, record: dict) -> None:
            records[task.index] = record
            progress.task_done(task.weight, record["counted"]["bytes"])

        workers.run_tasks(stage.run, waiting, directory, name=stage.name, progress=progress, on_done=on_done)
        progress.report()
        ordered = [record for task in stage.tasks if (record := records[task.index]) is not None]
        assert len(ordered) == len(stage.tasks)
        check([record["result"] for record in ordered])
        return _write_manifest(stage, directory, ordered)


def check_output(directory: Path) -> None:
    """Check that nothing of others is in a directory to write to, where temporary files are deleted.

    Raises:
      ValueError: it holds something, and neither a plan of a stage, in it or in its work, nor a lock.
    """
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    is_stage = names & {PLAN_FILE, LOCK_FILE, COMMAND_LOCK_FILE} or any(directory.glob(f"{WORK_FOLDER}/*/{PLAN_FILE}"))
    others = names - {*STAGE_FILES}  # a stage that was killed before its plan leaves folders only
    if others and not is_stage:
        raise ValueError(
            f"{directory} holds other things, {min(others)} for one, and no stage's work; give another output"
        )


@contextlib.contextmanager
def only_command(output: Path, *, inputs: Sequence[Path]) -> Iterator[None]:
    """Ensure that one command works in `output` and its steps' directories; take the lock before anything is written.

    Raises:
      ValueError: `output` is one of the inputs, so that the command would write into what it reads; or it holds
        something else than a stage's work.
      FileExistsError: another process is working there.
    """
    for source in inputs:
        if output.resolve() == source.resolve():
            raise ValueError(f"output {output} is the input, and is not written to; choose another --output")
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    message = f"another process is working in {output}; wait for it"
    with exclusive_lock(output / COMMAND_LOCK_FILE, message=message):
        yield


def _finished_manifest(directory: Path) -> dict | None:
    """Return the manifest of a finished stage; None, with a notice, if it is damaged: it is written again."""
    path = directory / MANIFEST_FILE
    try:
        manifest = read_json_object(path)
        if manifest.get("fingerprint") == fingerprint_of(manifest):
            return manifest
        reason = f"{path} does not have its fingerprint"
    except ValueError as error:
        reason = str(error)
    notices.report("task-repeated", f"{reason}; it is written again")
    return None


def accept_all(results: list[dict]) -> None:
    """Accept all results: the `check` of a stage whose tasks refuse unusable input themselves."""


def _check_plan(stage: Stage, directory: Path) -> None:
    """Write the plan, or compare it with the one that the directory was started with."""
    path = directory / PLAN_FILE
    plan = json.loads(json.dumps(stage.plan))
    if not path.is_file():
        write_atomically(path, json.dumps(plan, indent=1, sort_keys=True))
        return
    started = read_json_object(path)
    if started == plan:
        return
    if not isinstance(started.get("settings"), dict) or not {"stage", "tasks"} <= started.keys():
        raise ValueError(f"{path} is no plan of a stage; choose another --output, or delete {directory}")
    changes = [
        f"{key}={started['settings'].get(key)!r} then, {plan['settings'].get(key)!r} now"
        for key in sorted(started["settings"].keys() | plan["settings"].keys())
        if started["settings"].get(key) != plan["settings"].get(key)
    ]
    if started["stage"] != plan["stage"]:
        changes = [f"stage {started['stage']} then, {plan['stage']} now"]
    elif started["tasks"] != plan["tasks"]:
        changes.append("the input files are others, or of other sizes or contents")
    raise ValueError(f"{directory} was begun otherwise: {'; '.join(changes)}; choose another --output, or delete it")


def _write_manifest(stage: Stage, directory: Path, records: list[dict]) -> dict:
    totals: dict = {}
    _add(totals, stage.totals_before)
    for record in records:
        part = record["result"]["totals"]
        _add(totals, {key: part[key] for key in part if key != "read" or not stage.totals_before})
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
    """Return the sha256 over all other fields of a stage's manifest."""
    others = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return hash_json(others)


def _add(total: dict, part: dict) -> None:
    """Add the counts of nested dicts to `total`."""
    for key, value in part.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value
