"""Record a run's numbers: metrics.jsonl (every step, exact), TensorBoard, a console line or bar, and wall seconds.

Where the seconds of each start of a run went is kept in a file of that start, which runs/ reads. What follows
metrics.jsonl in processes of its own is in trackers.py, which is imported for runs that have log.trackers.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import secrets
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, TextIO

from btlm_jax import __version__, notices
from btlm_jax.display.progress import StepBar, print_line
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.curriculum import Curriculum
from btlm_jax.storage.files import parse_json_object, write_atomically
from btlm_jax.train import METRICS_FILE, STARTS, TENSORBOARD

SMOOTHING_STEPS = 20  # tokens/s, MFU and the ETA on the console are means over this many steps
LINE_SECONDS = 2.0  # between lines of the console, at least
MACHINE_CHANGED = "this machine: "  # so begin events of a resume on another one
OF_CLOCK = ("tokens_per_second", "mfu", "seconds", "seconds_over_predicted")  # of a step's line: what time decides
TRAINING = ("step", "data wait")  # the ledger's categories whose seconds count for tokens/s and MFU
_REPLAYED = ("train", "eval", "sample")  # kinds of lines that a resumed run writes again; it removes no goodput
_AFTER_STEP = ("eval", "sample")  # kinds of lines that are written after the checkpoint of their step, where it ends
_REPEATED = "repeated"  # a key of events that follow from the steps before them
_NUMBERS_OF = {"train": ("tokens", "loss", "learning_rate"), "eval": ("tokens", "loss")}  # what is drawn of a line
_BAR_FIELDS = ("ETA", "loss", "len", "lr", "tok/s", "MFU")  # a narrow terminal cuts off the last ones
WRITE_SECONDS = 5.0  # between writes of a start's file: a killed run loses the knowledge of so much time at most
_MAX_MARKS = 128  # of a start
_WARM_UP = 3  # steps of a phase that are left out of a median: they fill the loader
LEAST_STEPS = _WARM_UP + 10  # of a phase, for such a median
_NONE: Mapping[str, int] = MappingProxyType({})
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Result(Protocol):
    """A held-out result whose JSON has "loss" and "sources"; of each source "loss" and "bits_per_byte"."""

    def to_json(self) -> dict: ...


class Tracker(Protocol):
    """What shows a run: TensorBoard, and those of trackers.py."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Take finite numbers by name, such as "train/loss"."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text, such as the sample at the end."""
        ...

    def finish(self, *, is_done: bool) -> None:
        """Write what is left; the run has all its steps if it `is_done`."""
        ...


class Follower(Protocol):
    """A tracker in a process of its own, which reads the metrics file; nothing that fails there ends the run."""

    def start(self) -> None: ...

    def check(self) -> None:
        """Report it if the process has ended."""
        ...

    def finish(self, *, is_whole: bool) -> None:
        """Have it take the lines up to the file's end, all of the last step's among them if that `is_whole`."""
        ...


def numbers_of(row: dict) -> dict[str, float]:
    """Return the finite numbers of a train or eval line by the names that trackers show; of other lines none."""
    if row["kind"] == "train":
        named = {f"train/{name}": value for name, value in row.items() if name not in ("kind", "step", "seconds")}
    elif row["kind"] == "eval":
        named = {"heldout/all": row["loss"]}
        for name, source in row["sources"].items():
            named |= {f"heldout/{name}": source["loss"]}
            named |= {f"heldout_bits_per_byte/{name}": source.get("bits_per_byte", math.nan)}
    else:
        return {}
    return {name: value for name, value in named.items() if math.isfinite(value)}


def text_of(row: dict) -> str:
    """Return a "sample" line as one text: the prompt, a bar, the continuation."""
    return f"{row.get('prompt')}\u2502{row.get('continuation')}"


def flat_config(values: dict) -> dict[str, bool | int | float | str]:
    """Return a config's nested values as section.key -> value; tuples, which trackers do not take, as texts."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in flat_config(value).items()}
        else:
            flat[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a metrics file, "nan", "inf" and "-inf" as floats; an incomplete last line is left out.

    Raises:
      ValueError: another line is damaged; names it.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse_row(line, name=f"{path}, line {number}"))
        except ValueError as error:
            raise ValueError(f"{error}; delete that line to read the rest") from error
    return rows


def medians_of_phases(rows: Sequence[dict], curriculum: Curriculum, name: str) -> dict[int, float]:
    """Return the median of a number of train lines, "seconds" for one, by the phase's index.

    Steps before the last resume with another layout, model setting or machine are left out, and so are a phase's first
    steps, and phases with fewer than LEAST_STEPS lines that have the number.
    """
    trained = [row for row in rows if row["kind"] == "train"]
    last = max((row["step"] for row in trained), default=0)
    changes = (row["step"] for row in rows if row["kind"] == "event" and _is_of_a_change(row))
    changed = max((step for step in changes if step < last), default=0)
    found: dict[int, list[float]] = {}
    for row in trained:
        if row["step"] > changed and name in row:
            found.setdefault(curriculum.phase_at(row["step"] - 1).index, []).append(row[name])
    return {phase: statistics.median(each[_WARM_UP:]) for phase, each in found.items() if len(each) >= LEAST_STEPS}


def _is_of_a_change(event: dict) -> bool:
    """Return whether an event says that a resume changed what decides a step's time."""
    setting, message = str(event.get("setting", "")), str(event.get("message", ""))
    return setting.startswith(("mesh.", "model.")) or message.startswith(MACHINE_CHANGED)


def parse_row(line: bytes, *, name: str) -> dict:
    """Return what a line of a metrics file says, with what readers of its kind need.

    Raises:
      ValueError: it is damaged; begins with `name`.
    """
    row: dict[str, Any] = _with_floats(parse_json_object(line, name=name), name=name)
    if not isinstance(row.get("kind"), str) or type(row.get("step")) is not int:
        raise ValueError(f'{name} has no "kind", or no whole number as "step"')
    values = {key: row.get(key) for key in _NUMBERS_OF.get(row["kind"], ())}
    if row["kind"] == "eval":
        sources = row.get("sources")
        if not isinstance(sources, dict) or not all(isinstance(source, dict) for source in sources.values()):
            raise ValueError(f'{name} has no "sources" with a loss each')
        values |= {f"loss of {source}": losses.get("loss") for source, losses in sources.items()}
    for key, value in values.items():
        if type(value) not in (int, float):
            raise ValueError(f'{name} has no number as "{key}"')
    return row


def append_setting_changed(path: Path, step: int, *, key: str, old: object, new: object) -> None:
    """Record what `MetricWriter.setting_changed` does, in the metrics file of a run that is done."""
    line = _line_of(_setting_event(step, key=key, old=old, new=new)).encode()
    with open(path, "ab+") as file:
        file.seek(0)
        if line not in _events_at(step, file.read().split(b"\n")):  # of an earlier command
            file.write(line + b"\n")


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Let no import within load these modules, which a library imports where they are installed."""
    hidden = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None makes an import raise ImportError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class _TensorBoard:
    """TensorBoard's files. That they cannot be written any more is said once, and the run goes on without them."""

    def __init__(self, folder: Path, *, first_step: int):
        with _hidden("torch", "google.cloud.storage"):  # 0.02 s instead of 2.3 (2 vCPU Intel Xeon, 2026-11-29)
            from tensorboardX import SummaryWriter

        # A queue without an end: where the thread that reads it dies, a full one would block the run for ever.
        self._writer = SummaryWriter(str(folder), purge_step=first_step, max_queue=0)
        self._files: Any = self._writer.file_writer
        self._is_alive = True

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if self._can_write():
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        if self._can_write():
            self._writer.add_text(name, textwrap.indent(text, "    "), step)  # Markdown's verbatim text

    def hyperparameters(self, values: dict[str, bool | int | float | str]) -> None:
        """Take the run's settings for the table of runs."""
        from tensorboardX.summary import hparams

        if self._can_write():
            for summary in hparams(values, {"train/loss": 0.0, "heldout/all": 0.0}):  # the names of columns
                self._files.add_summary(summary)

    def finish(self, *, is_done: bool) -> None:
        del is_done
        try:
            self._writer.close()
        except OSError as error:
            if self._is_alive:
                self._stop(str(error))

    def _can_write(self) -> bool:
        """Return whether the thread that writes is there."""
        if self._is_alive and not self._files.event_writer._worker.is_alive():
            self._stop("the thread that writes its files has failed, see above")
        return self._is_alive

    def _stop(self, reason: str) -> None:
        self._is_alive = False
        self._files.event_writer._event_queue.cancel_join_thread()  # the process ends without it
        notices.report("tracker-stopped", f"TensorBoard's files are not written on: {reason}")


class GoodputLedger:
    """Wall seconds of one thread by category, such as "data wait"; an inner category pauses the outer one.

    Other threads may read it. `began` is when the time begins, as the clock has it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, began: float | None = None):
        self.first_step: int | None = None  # that this start of the run trains
        self.step: int | None = None  # the last one that is recorded
        self.repeated_steps = 0  # that an earlier start has recorded, and this one trains again
        self.passed_over: list[tuple[int, int]] = []  # (first, last) step, for each time that the run went back here
        self.facts: dict[str, str] = {}  # what the start knows of itself: devices, versions, the store's fingerprint
        self._clock = clock
        self._began = self._charged = clock() if began is None else began
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._marks: list[tuple[int, dict[str, float]]] = []
        self._lock = threading.RLock()  # a signal's handler may read it within `_charge`

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` block to category `name`."""
        with self._lock:
            self._charge()
            self._running.append(name)
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                self._running.pop()

    def begin_steps(self, first_step: int) -> None:
        """Note that everything before the first step is done."""
        with self._lock:
            self.first_step, self.step = first_step, first_step - 1
            self.mark()

    def mark(self) -> None:
        """Keep how many seconds were counted up to the last recorded step, if it is a new one."""
        with self._lock:
            if self.step is not None and (not self._marks or self._marks[-1][0] < self.step):
                self._marks.append((self.step, self.seconds()))
                if len(self._marks) > _MAX_MARKS:
                    del self._marks[1::2]  # the first and the last stay: an odd number of them is left

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every category up to now, the running one included, and the "total" since the start."""
        with self._lock:
            self._charge()
            return {**self._seconds, "total": self._charged - self._began}

    def to_json(self) -> dict:
        """Return the steps, what is running, and the seconds up to now and up to some of the steps before."""
        with self._lock:
            self.mark()
            return {
                "first_step": self.first_step,
                "step": self.step,
                "repeated_steps": self.repeated_steps,
                "passed_over": self.passed_over,
                "running": self._running[-1] if self._running else "",
                "facts": dict(self.facts),
                "seconds": _rounded(self.seconds()),
                "marks": [[step, _rounded(seconds)] for step, seconds in self._marks],
            }

    def describe(self) -> str:
        """Return one line: the total, and each category's share of it, largest first."""
        seconds = self.seconds()
        total = seconds.pop("total")
        seconds["other"] = total - sum(seconds.values())
        shares = [
            f"{name} {value / total if total else 0:.1%}"
            for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        ]
        return f"Time {datetime.timedelta(seconds=round(total))}: {', '.join(shares)}"

    def _charge(self) -> None:
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._charged
        self._charged = now


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


class StartRecord:
    """The file of one start of a run in its workdir: which command, where, its ledger, how it ended.

    A thread rewrites it every WRITE_SECONDS, so that it is known of a killed run too. A file that cannot be written is
    left as it is: what stands in the way of it ends the run where the metrics are written. The end is written over it.
    Of the notices, name -> number, those before it in this process that are of other runs are `of_others`.
    """

    def __init__(self, workdir: Path, ledger: GoodputLedger, *, of_others: Mapping[str, int] = _NONE):
        self._began = time.time() - ledger.seconds()["total"]
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._began))
        self._path = workdir / STARTS / f"{stamp}-{secrets.token_hex(4)}.json"
        self._ledger = ledger
        self._of_others = collections.Counter(of_others)
        self._facts: dict[str, Any] = {
            "number": len(list(self._path.parent.glob("[!.]*.json"))),  # of earlier starts
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "command": ["btlm", *map(_without_secrets, sys.argv[1:])],
            "folder": os.getcwd(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "btlm_jax": __version__,
        }
        self._end: dict[str, Any] | None = None
        self._is_over = threading.Event()
        self._lock = threading.RLock()  # between the thread and `end`

    def keep(self) -> None:
        """Write the file from here on."""

        def write() -> None:
            self.write()  # before git is asked, which may take long
            self._facts |= {"commit": _commit()} | {name: _version(name) for name in ("jax", "jaxlib", "numpy")}
            while not self._is_over.is_set():
                self.write()
                self._is_over.wait(WRITE_SECONDS)

        threading.Thread(target=write, name="start record", daemon=True).start()

    def write(self) -> None:
        """Write the file, if the workdir is there."""
        with self._lock, contextlib.suppress(OSError):
            if self._path.parent.parent.is_dir():
                self._path.parent.mkdir(exist_ok=True)
                row = {**self._facts, "began": self._began, "written": time.time(), **self._ledger.to_json()}
                row |= {"notices": dict(collections.Counter(notices.counts()) - self._of_others), "end": self._end}
                try:
                    write_atomically(self._path, json.dumps(row))
                except OSError:
                    if self._end is not None and self._path.is_file():
                        self._path.write_text(json.dumps(row))  # a full disk has the room that the file takes

    def end(self, code: int, reason: str) -> None:
        """Record with which exit code the command ends, and why."""
        self._is_over.set()
        # Without waiting for ever: a process that ends at once may hold the lock in a thread that hangs.
        if self._lock.acquire(timeout=1.0):
            self._end = {"code": code, "reason": " ".join(reason.split())}
            self.write()
            self._lock.release()


def _without_secrets(word: str) -> str:
    """Return a word of a command without what tells in a URL who asks: user, password, the query that is signed."""
    return re.sub(r"://[^/?#\s]*@", "://...@", re.sub(r"(://[^?\s]*)\?\S*", r"\1?...", word))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit of the checkout that the code is run from, with "-dirty" if files of it have changed, or ""."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return ""
    # Without optional locks nothing is written to the checkout, in which someone may be committing.
    git = ["git", "--no-optional-locks", "-C", str(checkout)]
    command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationWork:
    """What a run's evaluations compute: a few blocks now and then, all of them at the end."""

    every_steps: int
    flops: float  # of one during training
    final_flops: float  # of what is evaluated at the end


def remaining_seconds(
    curriculum: Curriculum,
    *,
    flops_of_phase: tuple[float, ...],
    evaluation: EvaluationWork,
    step: int,
    flops_rate: float,
    evaluation_rate: float,
) -> float:
    """Return the time of the steps and evaluations after `step`: their FLOPs divided by the rates, in FLOP/s.

    `flops_of_phase` are the FLOPs of a token in each phase. What follows the last evaluation is not in it.
    """
    flops, last = 0.0, curriculum.num_steps - 1  # the evaluation after the last step is the final one
    for phase, flops_per_token in zip(curriculum.phases, flops_of_phase, strict=True):
        num_steps = max(0, phase.end_step - max(step, phase.first_step))
        flops += num_steps * phase.tokens_per_step * flops_per_token
    ends = sum(
        1 for phase in curriculum.phases if step < phase.end_step <= last and phase.end_step % evaluation.every_steps
    )
    num_evaluations = ends + max(last // evaluation.every_steps - step // evaluation.every_steps, 0)
    return flops / flops_rate + (num_evaluations * evaluation.flops + evaluation.final_flops) / evaluation_rate


Compare = Callable[[int, float], dict[str, float]]  # (tokens, loss) -> more numbers of a step


def compare_with_nothing(tokens: int, loss: float) -> dict[str, float]:
    """Return no more numbers of a step."""
    del tokens, loss
    return {}


class MetricWriter:
    """Write what a run measures; `step` is the number of complete steps. Without `is_writer` nothing is written.

    Entering removes the lines from `first_step` on that this run writes again: a killed run may have written them after
    its last checkpoint. What it said of its own beginning is not said twice. Leaving writes the ledger's seconds.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        evaluates_before: bool,
        curriculum: Curriculum,
        flops_of_phase: tuple[float, ...],
        evaluation: EvaluationWork,
        peak_flops: float,
        log_every: int,
        is_writer: bool,
        ledger: GoodputLedger,
        followers: Sequence[Follower],
        compare: Compare = compare_with_nothing,
        predicted_seconds: tuple[float, ...] = (),
    ):
        """Take FLOPs per token of each phase, the peak FLOP/s of all devices, and more numbers of (tokens, loss).

        `evaluates_before`: the evaluation after the step before the first one is still to be written, or written again.
        `predicted_seconds` are of a step of each phase; none where there is no prediction.
        """
        self._workdir = workdir
        self._first_step = self._last_step = first_step
        self._evaluates_before = evaluates_before
        self._curriculum = curriculum
        self._flops_of_phase = flops_of_phase
        self._evaluation = evaluation
        self._evaluated_flops = 0.0
        self._peak_flops = peak_flops
        self._log_every = log_every
        self._is_writer = is_writer
        self._ledger = ledger
        self._followers = followers
        self._compare = compare
        self._predicted_seconds = predicted_seconds
        self._notable = {first_step, *(phase.end_step for phase in curriculum.phases)}
        self._pace = collections.deque(maxlen=SMOOTHING_STEPS)  # (seconds, tokens, FLOP) of the last steps
        self._is_open, self._is_whole = False, True

    def __enter__(self) -> MetricWriter:
        if self._is_writer:
            path, before = self._workdir / METRICS_FILE, self._first_step - 1
            kept = _remove_replayed(path, first_step=self._first_step, evaluates_before=self._evaluates_before)
            self._ledger.repeated_steps = kept.num_repeated
            self._said_before = kept.events
            self._file: TextIO = open(path, "a", encoding="utf-8")
            self._tensorboard = _TensorBoard(
                self._workdir / TENSORBOARD, first_step=before if self._evaluates_before else self._first_step
            )
            if self._evaluates_before and kept.step_before is not None:
                self._tensorboard.numbers(before, numbers_of(kept.step_before))
            self._bar = StepBar(
                total=self._curriculum.num_steps, first_step=self._first_step, line_seconds=LINE_SECONDS
            )
            self._clock = self._training_seconds()
            self._last_step = before
            self._ledger.begin_steps(self._first_step)
            self._is_open = True
            for follower in self._followers:
                follower.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish(is_whole=error is None)

    def config(self, config: TrainConfig) -> None:
        """Show the run's config, as text and as hyperparameters."""
        if not self._is_open:
            return
        self._tensorboard.text(self._first_step, "config", config.to_json())
        self._tensorboard.hyperparameters(flat_config(dataclasses.asdict(config)))

    def train(self, step: int, *, learning_rate: float, metrics: dict[str, float]) -> None:
        """Record a train step; the values that depend on time are the last in its line."""
        if not self._is_open:
            return
        clock = self._training_seconds()
        seconds, self._clock = max(clock - self._clock, 1e-9), clock
        phase = self._curriculum.phase_at(step - 1)
        flops = phase.tokens_per_step * self._flops_of_phase[phase.index]
        if step == self._first_step + 1:
            self._pace.clear()  # the first step waits for the first batch to be read: it is slower than the others
        self._pace.append((seconds, phase.tokens_per_step, flops))
        self._last_step = self._ledger.step = step
        tokens = self._curriculum.tokens_seen(step)
        row = {
            "kind": "train",
            "step": step,
            "tokens": tokens,
            "seq_len": phase.seq_len,
            "learning_rate": learning_rate,
            **metrics,
            **self._compare(tokens, metrics["loss"]),
            "tokens_per_second": phase.tokens_per_step / seconds,
            "mfu": flops / seconds / self._peak_flops,
            "seconds": seconds,
        }
        if self._predicted_seconds:
            row["seconds_over_predicted"] = seconds / self._predicted_seconds[phase.index]
        self._write(row)
        is_notable = step in self._notable
        if is_notable:
            self._ledger.mark()
        if is_notable or step % self._log_every == 0:
            self._tensorboard.numbers(step, numbers_of(row))
            for follower in self._followers:
                follower.check()
        fields = self._fields(row)
        self._bar.update(
            step,
            bar_text=_line({name: fields[name] for name in _BAR_FIELDS}),
            line_text=_line(fields),
            is_notable=is_notable,
            is_due=step % self._log_every == 0,
        )

    def evaluation(self, step: int, result: Result) -> None:
        """Record a held-out result."""
        if not self._is_open:
            return
        self._evaluated_flops += self._evaluation.flops
        values = result.to_json()
        row = {"kind": "eval", "step": step, "tokens": self._curriculum.tokens_seen(step), **values}
        self._write(row)
        self._tensorboard.numbers(step, numbers_of(row))
        parts = [f"step {step:,}/{self._curriculum.num_steps:,}", f"held-out loss {values['loss']:.4f}"]
        for name, source in values["sources"].items():
            parts.append(f"{name} {source['loss']:.4f} ({source['bits_per_byte']:.4f} bits/byte)")
        print_line(" | ".join(parts))

    def evaluation_follows(self) -> None:
        """Take the last step as one that the next start of the run evaluates."""
        self._is_whole = False

    def sample(self, step: int, *, prompt: str, continuation: str) -> None:
        """Record how the model continues a prompt."""
        if self._is_open:
            row = {"kind": "sample", "step": step, "prompt": prompt, "continuation": continuation}
            self._write(row)
            self._tensorboard.text(step, "sample", text_of(row))

    def event(self, step: int, message: str) -> None:
        """Print an event, and record it at `step`; no later start of the run removes it."""
        if not self._is_open:
            return
        self.record_event(step, message)
        print_line(f"step {step:,}/{self._curriculum.num_steps:,} | {message}")

    @property
    def last_step(self) -> int:
        """Return the last step that was recorded."""
        return self._last_step

    def record_event(self, step: int, message: str, *, is_repeated: bool = False) -> None:
        """Record an event that is said elsewhere; a resumed run removes one that it repeats, as it does steps."""
        if self._is_open:
            self._write_event(_event(step, message) | ({_REPEATED: True} if is_repeated else {}))

    def setting_changed(self, step: int, *, key: str, old: object, new: object) -> None:
        """Record as an event that a key of the config has another value from `step` on than in the checkpoint."""
        if self._is_open:
            self._write_event(_setting_event(step, key=key, old=old, new=new))

    def finish(self) -> None:
        """Record the seconds by category, and close the files; after it nothing can be recorded."""
        self._finish(is_whole=True)

    def _finish(self, *, is_whole: bool) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._write({"kind": "goodput", "step": self._last_step, "seconds": self._ledger.seconds()})
        self._bar.close()
        print_line(self._ledger.describe())
        self._file.close()
        self._tensorboard.finish(is_done=self._last_step == self._curriculum.num_steps)
        for follower in self._followers:
            follower.finish(is_whole=is_whole and self._is_whole)

    def _write_event(self, row: dict) -> None:
        if _line_of(row).encode() not in self._said_before:
            self._write(row)

    def _write(self, row: dict) -> None:
        try:
            self._file.write(_line_of(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._workdir / METRICS_FILE} cannot be written: {error.strerror}") from error

    def _training_seconds(self) -> float:
        seconds = self._ledger.seconds()
        return sum(seconds.get(name, 0.0) for name in TRAINING)

    def _fields(self, row: dict) -> dict[str, str]:
        seconds, tokens, flops = (sum(column) for column in zip(*self._pace, strict=True))
        evaluation_rate = self._evaluated_flops / self._ledger.seconds().get("evaluation", math.inf)
        eta = remaining_seconds(
            self._curriculum,
            flops_of_phase=self._flops_of_phase,
            evaluation=self._evaluation,
            step=row["step"],
            flops_rate=flops / seconds,
            evaluation_rate=evaluation_rate or flops / seconds,  # until one was made
        )
        return {
            "len": f"{row['seq_len']:,}",
            "tokens": f"{row['tokens']:,}",
            "loss": f"{row['loss']:.4f}",
            "lr": f"{row['learning_rate']:.3g}",
            "gnorm": f"{row['grad_norm']:.3g}",
            "tok/s": f"{tokens / seconds:,.0f}",
            "MFU": f"{flops / seconds / self._peak_flops:.1%}",
            "ETA": f"{datetime.timedelta(seconds=round(eta))} + sample",
        }


def _line_of(row: dict) -> str:
    return json.dumps(_with_strings(row), allow_nan=False)


def _event(step: int, message: str) -> dict:
    return {"kind": "event", "step": step, "message": notices.named(message)}  # of a run in a bucket: its URL


def _setting_event(step: int, *, key: str, old: object, new: object) -> dict:
    return {**_event(step, f"{key} was {old!r}, is now {new!r}"), "setting": key, "old": old, "new": new}


def _line(fields: dict[str, str]) -> str:
    return " | ".join(f"{text} {name}" if name == "tok/s" else f"{name} {text}" for name, text in fields.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a resumed run knows of the lines before it."""

    num_repeated: int  # train lines that were removed
    events: frozenset[bytes]  # `_events_at` the step before the first one
    step_before: dict | None  # the train line of that step


def _remove_replayed(path: Path, *, first_step: int, evaluates_before: bool) -> _Kept:
    """Rewrite the file without what is written again from `first_step` on, and without lines that are damaged.

    With `evaluates_before` the step before loses its evaluation, and the sample that follows the run's last one.
    An incomplete last line is what a kill leaves, and is written again; each other one that is damaged is a notice.
    """
    if not path.exists():
        return _Kept(num_repeated=0, events=frozenset(), step_before=None)
    *lines, incomplete = path.read_bytes().split(b"\n")
    remaining, num_repeated, step_before = [], 0, None
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_row(line, name=f"{path}, line {number}")
        except ValueError as error:
            notices.report("metrics-line-dropped", f"{error}; the line is removed")
            continue
        is_of_evaluation = evaluates_before and row["kind"] in _AFTER_STEP
        is_replayed = (row["kind"] in _REPLAYED or _REPEATED in row) and row["step"] >= first_step - is_of_evaluation
        num_repeated += is_replayed and row["kind"] == "train"
        if is_replayed:
            continue
        remaining.append(line)
        if row["kind"] == "train" and row["step"] == first_step - 1:
            step_before = row
    if incomplete or len(remaining) < len(lines):
        write_atomically(path, b"".join(line + b"\n" for line in remaining))
    return _Kept(num_repeated=num_repeated, events=_events_at(first_step - 1, remaining), step_before=step_before)


def _events_at(step: int, lines: Iterable[bytes]) -> frozenset[bytes]:
    """Return the lines of events at a step that stand: of each changed setting the last."""
    events: dict[str | bytes, bytes] = {}
    for line in lines:
        if b'"kind": "event"' not in line:
            continue
        with contextlib.suppress(ValueError):
            row = parse_row(line, name="")
            if row["kind"] == "event" and row["step"] == step:
                events[row.get("setting", line)] = line
    return frozenset(events.values())


def _with_strings(value):
    """Return the value with the floats that JSON does not have as strings."""
    if isinstance(value, dict):
        return {name: _with_strings(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_strings(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _with_floats(value: Any, *, name: str) -> Any:
    """Undo `_with_strings`; a whole number that is no float either is a ValueError that begins with `name`."""
    if isinstance(value, dict):
        return {key: _with_floats(item, name=name) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item, name=name) for item in value]
    if isinstance(value, int) and abs(value) > 2**63:
        raise ValueError(f"{name} has a whole number beyond 2^63")
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
