"""Run one stage of the pipeline: tasks in worker processes, each restartable, and a manifest when all are done.

A stage's directory holds

    plan.json             written first: stage, settings, inputs, tasks; a start with another plan is refused
    done/00003.json       what task 3 read and wrote; it appears last, so a killed task is redone whole
    quarantine/           bad lines, a file a task that found some
    manifest.json         written last: the plan, the totals by source, every output with its sha256

A task is a fixed list of input files and a pure function of them, so nothing depends on the number of workers, on their
order, or on how often they were killed. A task whose outputs are gone, or of another size, is done again. No manifest
holds times or paths of this machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from btlm_jax.corpus.engine.progress import Progress
from btlm_jax.corpus.engine.slurm import wait_for_earlier_job
from btlm_jax.corpus.engine.tasks import DONE_FOLDER, Run, Task, finished
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.storage.files import delete_temporary_files, exclusive_lock, write_atomically

FORMAT = "btlm-corpus-stage"
FORMAT_VERSION = 1
PLAN_FILE, MANIFEST_FILE, LOCK_FILE = "plan.json", "manifest.json", ".lock"

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What to do, and everything that the bytes written depend on: `settings` and the tasks' inputs."""

    name: str
    settings: dict
    tasks: Sequence[Task]
    run: Run
    outputs_in: str = "."  # where the tasks write, seen from the stage's directory

    @property
    def plan(self) -> dict:
        tasks = [[[item.name, item.num_bytes, item.sha256] for item in task.inputs] for task in self.tasks]
        return {"stage": self.name, "settings": self.settings, "tasks": tasks}


def run_stage(
    stage: Stage, directory: Path, *, workers: Workers, log: Log, check: Callable[[list[dict]], None]
) -> dict:
    """Run what is not done yet and return the manifest.

    `check` sees the records of all tasks before the manifest is written, and may refuse them.

    Raises:
      ValueError: the directory holds another plan's work, an input changed, or a task refused its input.
      FileExistsError: another process is working in the directory.
      OSError: something cannot be read or written.
    """
    (directory / DONE_FOLDER).mkdir(parents=True, exist_ok=True)
    outputs = directory / stage.outputs_in
    message = f"another process is working in {directory}; wait for it"
    with exclusive_lock(directory / LOCK_FILE, message=message):
        _check_plan(stage, directory)
        wait_for_earlier_job(directory, name=stage.name, log=log)
        for folder in (directory, directory / DONE_FOLDER, outputs):
            delete_temporary_files(folder)
        records = {task.index: finished(task, directory, outputs=outputs) for task in stage.tasks}
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

        def done(task: Task, record: dict) -> None:
            records[task.index] = record
            progress.task_done(task.weight)

        workers.run_tasks(stage.run, waiting, directory, name=stage.name, progress=progress, done=done)
        progress.report()
        ordered = [records[task.index] for task in stage.tasks]
        check([record["result"] for record in ordered])
        return _write_manifest(stage, directory, ordered)


def accept(results: list[dict]) -> None:
    """Accept what the tasks wrote: they have refused already what cannot be used."""


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
