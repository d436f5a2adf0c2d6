"""Give a run's numbers to W&B or MLflow, by a process a tracker, which follows metrics.jsonl: `log.trackers`.

So their imports, threads and services are not in the process that trains, and what fails or hangs in them does not end
or slow it. What a tracker has not got, as it failed or was off, it gets when the run goes on, or by

    python -m btlm_jax.train.trackers wandb WORKDIR

A workdir is one run of the tracker, and each start goes on with it. After a kill the steps that are trained again are
passed over where the tracker has them; only those of the second before its process was killed are sent again.
Where they are trained with other settings, or after --resume_step, another run begins in the tracker, with all steps:
once, by what a file of the workdir has of the settings and of the steps that were set aside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import html
import importlib.util
import json
import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from btlm_jax import ending_of, install_command, module_command, notices
from btlm_jax.display.progress import print_line
from btlm_jax.recipe.config import TrainConfig, config_from, train_config_from
from btlm_jax.storage.files import hash_json, lock_open_file, read_json_object, write_atomically
from btlm_jax.train import CONFIG_FILE, METRICS_FILE, REPLACED, TRACKERS
from btlm_jax.train.metric_writer import Tracker, flat_config, numbers_of, parse_row, text_of

PROJECT = "btlm_jax"  # where the tracker's own variable names none
FINISH_SECONDS = 120.0  # that a run waits for a tracker at its end
_POLL_SECONDS = 1.0
_RECORD_SECONDS = 1.0  # between writes of how far a tracker is
_BATCH = 100  # lines that are read before they are sent
_NOTE = "note: "  # before what the run is to report
_OF_NO_NUMBER = ("log.", "checkpoint.", "bad_numbers.", "mesh.")  # keys that do not change what is trained
_WHOLE = b"whole"  # what the run says at its end where the last step has all its lines


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of trackers are there.

    Raises:
      ImportError: one is missing; says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"log.trackers={','.join(names)} needs the package {name}: {install_command(name)}")


class TrackerProcess:
    """A tracker's process, as the run sees it: see metric_writer.Follower."""

    def __init__(self, name: str, workdir: Path, *, first_step: int):
        """Take the first step that this start trains."""
        self._name, self._workdir = name, workdir
        self._log = workdir / TRACKERS / f"{name}.log"
        command = [*module_command(__name__), name, str(workdir.resolve())]
        self._by_hand = f"{sys.executable} -m {__name__} {name} {shlex.quote(str(workdir))}"
        self._command = [*command, "--follow", f"--first_step={first_step}"]
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process, which reads the metrics file from its beginning."""
        self._log.parent.mkdir(exist_ok=True)
        with open(self._log, "ab") as log:
            # In a session of its own, so that Ctrl-C and SIGTERM reach the run alone, which then ends this.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )

    def check(self) -> None:
        """Print what the process says; report it if it has ended."""
        if (process := self._process) is None:
            return
        if process.poll() is None:
            assert process.stdout is not None
            if select.select([process.stdout], [], [], 0)[0]:
                self._print(os.read(process.stdout.fileno(), 1 << 16))
        else:
            self._ended(process, process.communicate()[0])

    def finish(self, *, is_whole: bool) -> None:
        """Wait until the tracker has everything, or the time is over."""
        self.check()
        if (process := self._process) is None:
            return
        try:
            said, _ = process.communicate(_WHOLE if is_whole else b"", timeout=FINISH_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            self._print(process.communicate()[0])
            self._stopped(f"it has not taken all in {FINISH_SECONDS:.0f} s after the run's end")
            return
        if process.returncode:
            self._ended(process, said)
        else:
            self._print(said)

    def _print(self, said: bytes) -> None:
        for line in said.decode(errors="replace").splitlines():
            if line.startswith(_NOTE):
                notices.report("tracker-begun-again", f"{self._name}: {line.removeprefix(_NOTE)}")
            else:
                print_line(f"{self._name}: {line}")

    def _ended(self, process: subprocess.Popen, said: bytes) -> None:
        self._print(said)
        self._stopped(f"it ended ({ending_of(process.returncode)}): {self._last_line()}")

    def _stopped(self, reason: str) -> None:
        self._process = None
        notices.report(
            "tracker-stopped",
            f"{self._name} is stopped, and the run goes on without it: {reason}. {self._log} has more; once it is "
            f"mended, the next start sends what is missing, or {self._by_hand}",
        )

    def _last_line(self) -> str:
        try:
            lines = self._log.read_bytes()[-4096:].decode(errors="replace").split("\n")
        except OSError as error:
            return str(error)
        return next((line.strip()[:300].rstrip(".") for line in reversed(lines) if line.strip()), "it said nothing")


# What follows runs in the tracker's process.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """How far a tracker is: a file of the workdir. Written after steps are sent, so that none is left out."""

    run_id: str  # in the tracker; "" before it is known
    last_step: int  # that the tracker has
    earlier_run_ids: tuple[str, ...]  # of runs that end where steps were trained anew
    settings: str  # a hash of those that its last start trained with
    replaced: tuple[str, ...]  # what --resume_step had set aside by then, as `_replaced` names it


class Wandb:
    """W&B. Its variables, as WANDB_MODE=offline, WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY, mean what they always do."""

    def __init__(self, config: TrainConfig, *, name: str, folder: Path, run_id: str):
        self._wandb: Any = importlib.import_module("wandb")
        self.run_id = run_id or secrets.token_hex(4)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or name,
            id=self.run_id,
            resume="allow",
            config=json.loads(config.to_json()),
            dir=os.environ.get("WANDB_DIR") or str(folder),
            settings=self._wandb.Settings(console="off"),
        )
        self.place = self._run.url or str(folder / "wandb")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def finish(self, *, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI, or in an SQLite file of the workdir."""

    def __init__(self, config: TrainConfig, *, name: str, folder: Path, run_id: str):
        mlflow: Any = importlib.import_module("mlflow")
        given = os.environ.get("MLFLOW_TRACKING_URI")
        self.place = given or f"sqlite:///{folder / 'mlflow.db'}"
        self._client, self._metric = mlflow.MlflowClient(self.place), mlflow.entities.Metric
        if run_id:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(title)
        files = None if given else str(folder / "mlflow")  # by default below the current directory
        number = experiment.experiment_id if experiment else self._client.create_experiment(title, files)
        self.run_id = self._client.create_run(number, run_name=name).info.run_id
        values = {key: str(value) for key, value in flat_config(json.loads(config.to_json())).items()}
        self._client.log_batch(self.run_id, params=[mlflow.entities.Param(*each) for each in values.items()])
        self._client.log_text(self.run_id, config.to_json(), "config.json")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self.run_id, metrics=[self._metric(*each, now, step) for each in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self.run_id, text, f"{name}-{step}.txt")

    def finish(self, *, is_done: bool) -> None:
        self._client.set_terminated(self.run_id, status="FINISHED" if is_done else "KILLED")


_CLASSES = {"wandb": Wandb, "mlflow": Mlflow}


def follow(name: str, workdir: Path, *, is_followed: bool, first_step: int) -> None:
    """Give a tracker the lines of a run that it has not got: those that are there, or until the run ends.

    The `first_step` that a start trains is 0 where there is none.

    Raises:
      ValueError: the workdir's config is damaged.
      OSError: a file cannot be read or written.
    """
    config = train_config_from(read_json_object(workdir / CONFIG_FILE))
    folder = workdir / TRACKERS
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock, open(workdir / METRICS_FILE, "rb") as metrics:
        lock_open_file(lock, fcntl.LOCK_EX)  # the process of a run that was killed may still be sending
        path = folder / f"{name}.json"
        settings, replaced = _settings_hash(config), _replaced(workdir)
        record = _read_record(path, settings=settings, replaced=replaced)
        record = _on_course(record, settings=settings, replaced=replaced, first_step=first_step)
        tracker = _CLASSES[name](config, name=workdir.name, folder=folder, run_id=record.run_id)
        begins = "goes on with" if record.run_id else "begins"
        record = dataclasses.replace(record, run_id=tracker.run_id)
        _write_record(path, record)
        _say(f"{begins} run {tracker.run_id} in {tracker.place}")
        steps = _Steps(config, after=record.last_step)
        is_whole = True
        for lines in _batches_of_lines(metrics, is_followed=is_followed):
            is_whole = lines.is_whole
            for line in lines.lines:
                steps.add(line)
            record = _send(tracker, steps.take(is_last=lines.is_last and is_whole), record, path=path)
        tracker.finish(is_done=record.last_step == config.curriculum.table.num_steps)


class _Steps:
    """The lines that a tracker is to have, by step: those of log.every_steps and of phases' ends, and evaluations."""

    def __init__(self, config: TrainConfig, *, after: int):
        self._every, self._after = config.log.every_steps, after
        self._notable = {1, *(phase.end_step for phase in config.curriculum.table.phases)}
        self._rows: dict[int, list[dict]] = {}

    def add(self, line: bytes) -> None:
        """Take a line of the metrics file; a damaged one is for the next start to report."""
        try:
            row = parse_row(line, name=METRICS_FILE)
        except ValueError:
            return
        step = row["step"]
        is_due = row["kind"] in ("eval", "sample") or step % self._every == 0 or step in self._notable
        is_new = step > self._after or step == self._after == 0  # before the first step there is an evaluation
        if is_new and row["kind"] in ("train", "eval", "sample") and is_due:
            self._rows.setdefault(step, []).append(row)

    def take(self, *, is_last: bool) -> dict[int, list[dict]]:
        """Return the steps that have all their lines, ascending: the last one only where none will follow."""
        steps = sorted(self._rows)
        return {step: self._rows.pop(step) for step in (steps if is_last else steps[:-1])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lines:
    lines: list[bytes]
    is_last: bool  # nothing follows
    is_whole: bool  # and the last step has all its lines


def _batches_of_lines(metrics: IO[bytes], *, is_followed: bool) -> Iterator[_Lines]:
    """Yield the complete lines of a file as they come, until the run closes standard input."""
    rest, word = b"", None if is_followed else _WHOLE
    while True:
        if word is None and select.select([sys.stdin.buffer], [], [], _POLL_SECONDS)[0]:
            word = sys.stdin.buffer.read()
            signal.alarm(round(FINISH_SECONDS))  # nobody waits longer, if anybody is left
        while True:
            lines = []
            while len(lines) < _BATCH and (line := metrics.readline()):
                rest += line
                if rest.endswith(b"\n"):
                    lines.append(rest[:-1])
                    rest = b""
            is_last = word is not None and len(lines) < _BATCH
            yield _Lines(lines=lines, is_last=is_last, is_whole=word == _WHOLE)
            if is_last:
                return
            if len(lines) < _BATCH:
                break


def _send(tracker: Tracker, steps: dict[int, list[dict]], record: Record, *, path: Path) -> Record:
    """Give a tracker some steps, and return how far it is, which is written once a second and at the end."""
    if not steps:
        return record
    written = time.monotonic()
    try:
        for step, rows in steps.items():
            values: dict[str, float] = {}
            for row in rows:
                values |= numbers_of(row)
            if values:
                tracker.numbers(step, values)
            for row in rows:
                if row["kind"] == "sample":
                    tracker.text(step, "sample", text_of(row))
            record = dataclasses.replace(record, last_step=step)
            if time.monotonic() - written >= _RECORD_SECONDS:
                _write_record(path, record)
                written = time.monotonic()
    finally:
        _write_record(path, record)
    return record


def _on_course(record: Record, *, settings: str, replaced: dict[str, int], first_step: int) -> Record:
    """Return the record with the settings and the replaced steps of now, of a run that begins where it has others."""
    settings = settings if first_step else record.settings
    anew = [step for name, step in replaced.items() if name not in record.replaced]
    anew += [first_step] if settings != record.settings else []
    now = {"settings": settings, "replaced": tuple(sorted({*record.replaced, *replaced}))}
    if not anew or min(anew) > record.last_step:
        return dataclasses.replace(record, **now)
    _say(f"{_NOTE}another run begins: {record.run_id} has steps from {min(anew):,} on, which are trained anew")
    return Record(run_id="", last_step=0, earlier_run_ids=(*record.earlier_run_ids, record.run_id), **now)


def _replaced(workdir: Path) -> dict[str, int]:
    """Return the first step that was trained anew for each time that --resume_step set steps aside.

    Names have the size of what the metrics were then: a folder may be renamed, and another one get its name.
    """
    found = {}
    for folder in (workdir / REPLACED).glob("from-*"):
        metrics, step = folder / METRICS_FILE, folder.name.removeprefix("from-")
        if step.isdecimal():
            found[f"{folder.name}, {metrics.stat().st_size if metrics.is_file() else 0} bytes"] = int(step) + 1
    return found


def _settings_hash(config: TrainConfig) -> str:
    """Return a hash of what of a config decides the numbers."""
    values = flat_config(json.loads(config.to_json()))
    return hash_json({key: value for key, value in values.items() if not key.startswith(_OF_NO_NUMBER)})[:16]


def _read_record(path: Path, *, settings: str, replaced: Iterable[str]) -> Record:
    now = {"settings": settings, "replaced": tuple(sorted(replaced))}
    new = Record(run_id="", last_step=0, earlier_run_ids=(), **now)
    if not path.exists():
        return new
    try:
        return config_from(Record, {**now, **read_json_object(path)}, path="record")  # earlier ones have less
    except ValueError as error:
        _say(f"{_NOTE}another run begins, as what is kept of it is damaged: {error}")
        return new


def _write_record(path: Path, record: Record) -> None:
    write_atomically(path, json.dumps(dataclasses.asdict(record), indent=2))


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the run was killed
        os.write(_output, f"{line}\n".encode())


_output = 1


def main() -> None:
    """Run a tracker's process."""
    global _output
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}", description="Give a run's numbers to a tracker."
    )
    parser.add_argument("name", choices=sorted(_CLASSES))
    parser.add_argument("workdir", type=Path, help="of the run")
    parser.add_argument("--follow", action="store_true", help="go on until standard input is closed")
    parser.add_argument("--first_step", type=int, default=0, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    _output = os.dup(1)
    os.dup2(2, 1)  # what a tracker prints
    follow(flags.name, flags.workdir.resolve(), is_followed=flags.follow, first_step=flags.first_step)


if __name__ == "__main__":
    main()
