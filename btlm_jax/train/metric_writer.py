"""Record a run's numbers: metrics.jsonl (every step, exact), TensorBoard, a console line or bar, and wall seconds."""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, TextIO

from btlm_jax.display.progress import StepBar, print_line
from btlm_jax.recipe.curriculum import Curriculum
from btlm_jax.storage.files import write_atomically
from btlm_jax.train import METRICS_FILE, TENSORBOARD

SMOOTHING_STEPS = 20  # tokens/s, MFU and the ETA on the console are means over this many steps
LINE_SECONDS = 2.0  # between lines of the console, at least
TRAINING = ("step", "data wait")  # the ledger's categories whose seconds count for tokens/s and MFU
_REPLAYED = ("train", "eval")  # kinds of lines that a resumed run writes again; it never removes events and goodput
_BAR_FIELDS = ("ETA", "loss", "len", "lr", "tok/s", "MFU")  # a narrow terminal cuts off the last ones
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Result(Protocol):
    """A held-out result whose JSON has "loss" and "sources"; of each source "loss" and "bits_per_byte"."""

    def to_json(self) -> dict: ...


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a metrics file, "nan", "inf" and "-inf" as floats; an incomplete last line is left out.

    Raises:
      ValueError: another line is damaged; names it.
    """
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is not None:
            rows.append(_with_floats(row))
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: not a JSON object; delete that line to read the rest")
    return rows


class GoodputLedger:
    """Wall seconds of one thread by category, such as "data wait"; an inner category pauses the outer one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._began = self._charged = clock()
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` block to category `name`."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every category up to now, the running one included, and the "total" since the start."""
        self._charge()
        return {**self._seconds, "total": self._charged - self._began}

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


def remaining_seconds(
    curriculum: Curriculum, *, flops_of_phase: tuple[float, ...], step: int, flops_rate: float
) -> float:
    """Return the time that the steps after `step` will take: their FLOPs divided by `flops_rate`, in FLOP/s.

    `flops_of_phase` are the FLOPs of a token in each phase.
    """
    flops = 0.0
    for phase, flops_per_token in zip(curriculum.phases, flops_of_phase, strict=True):
        num_steps = max(0, phase.end_step - max(step, phase.first_step))
        flops += num_steps * phase.tokens_per_step * flops_per_token
    return flops / flops_rate


class MetricWriter:
    """Write what a run measures; `step` is the number of complete steps. Without `is_writer` nothing is written.

    Entering removes the train and eval lines from `first_step` on: a killed run may have written them after its last
    checkpoint, and this run writes them again. Leaving writes the ledger's seconds.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        curriculum: Curriculum,
        flops_of_phase: tuple[float, ...],
        peak_flops: float,
        log_every: int,
        is_writer: bool,
        ledger: GoodputLedger,
    ):
        """Take FLOPs per token of each phase, and the peak FLOP/s of all devices together."""
        self._workdir = workdir
        self._first_step = self._last_step = first_step
        self._curriculum = curriculum
        self._flops_of_phase = flops_of_phase
        self._peak_flops = peak_flops
        self._log_every = log_every
        self._is_writer = is_writer
        self._ledger = ledger
        self._notable = {first_step, *(phase.end_step for phase in curriculum.phases)}
        self._pace = collections.deque(maxlen=SMOOTHING_STEPS)  # (seconds, tokens, FLOP) of the last steps
        self._is_open = False

    def __enter__(self) -> MetricWriter:
        if self._is_writer:
            from tensorboardX import SummaryWriter

            path = self._workdir / METRICS_FILE
            _remove_replayed(path, first_step=self._first_step)
            self._file: TextIO = open(path, "a", encoding="utf-8")
            self._tensorboard = SummaryWriter(str(self._workdir / TENSORBOARD), purge_step=self._first_step)
            self._bar = StepBar(
                total=self._curriculum.num_steps, first_step=self._first_step, line_seconds=LINE_SECONDS
            )
            self._clock = self._training_seconds()
            self._last_step = self._first_step - 1
            self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

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
        self._last_step = step
        row = {
            "kind": "train",
            "step": step,
            "tokens": self._curriculum.tokens_seen(step),
            "seq_len": phase.seq_len,
            "learning_rate": learning_rate,
            **metrics,
            "tokens_per_second": phase.tokens_per_step / seconds,
            "mfu": flops / seconds / self._peak_flops,
            "seconds": seconds,
        }
        self._write(row)
        is_notable = step in self._notable
        if is_notable or step % self._log_every == 0:
            for name in row.keys() - {"kind", "step", "seconds"}:
                if math.isfinite(row[name]):  # TensorBoard cannot draw the others; metrics.jsonl has them
                    self._tensorboard.add_scalar(f"train/{name}", row[name], step)
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
        values = result.to_json()
        self._write({"kind": "eval", "step": step, "tokens": self._curriculum.tokens_seen(step), **values})
        self._tensorboard.add_scalar("heldout/all", values["loss"], step)
        parts = [f"step {step:,}/{self._curriculum.num_steps:,}", f"held-out loss {values['loss']:.4f}"]
        for name, source in values["sources"].items():
            self._tensorboard.add_scalar(f"heldout/{name}", source["loss"], step)
            self._tensorboard.add_scalar(f"heldout_bits_per_byte/{name}", source["bits_per_byte"], step)
            parts.append(f"{name} {source['loss']:.4f} ({source['bits_per_byte']:.4f} bits/byte)")
        print_line(" | ".join(parts))

    def event(self, step: int, message: str) -> None:
        """Record an event at `step`; no later start of the run removes it."""
        if not self._is_open:
            return
        self._write({"kind": "event", "step": step, "message": message})
        print_line(f"step {step:,}/{self._curriculum.num_steps:,} | {message}")

    def setting_changed(self, step: int, *, key: str, old: object, new: object) -> None:
        """Record as an event that a key of the config has another value from `step` on than in the checkpoint."""
        if self._is_open:
            message = f"{key} was {old!r}, is now {new!r}"
            self._write({"kind": "event", "step": step, "message": message, "setting": key, "old": old, "new": new})

    def finish(self) -> None:
        """Record the seconds by category, and close the files; after it nothing can be recorded."""
        if not self._is_open:
            return
        self._is_open = False
        self._write({"kind": "goodput", "step": self._last_step, "seconds": self._ledger.seconds()})
        self._bar.close()
        print_line(self._ledger.describe())
        self._file.close()
        self._tensorboard.close()

    def _write(self, row: dict) -> None:
        line = json.dumps(_with_strings(row), allow_nan=False) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._workdir / METRICS_FILE} cannot be written: {error.strerror}") from error

    def _training_seconds(self) -> float:
        seconds = self._ledger.seconds()
        return sum(seconds.get(name, 0.0) for name in TRAINING)

    def _fields(self, row: dict) -> dict[str, str]:
        seconds, tokens, flops = (sum(column) for column in zip(*self._pace, strict=True))
        eta = remaining_seconds(
            self._curriculum,
            flops_of_phase=self._flops_of_phase,
            step=row["step"],
            flops_rate=flops / seconds,
        )
        return {
            "len": f"{row['seq_len']:,}",
            "tokens": f"{row['tokens']:,}",
            "loss": f"{row['loss']:.4f}",
            "lr": f"{row['learning_rate']:.3g}",
            "gnorm": f"{row['grad_norm']:.3g}",
            "tok/s": f"{tokens / seconds:,.0f}",
            "MFU": f"{flops / seconds / self._peak_flops:.1%}",
            "ETA": f"{datetime.timedelta(seconds=round(eta))}",
        }


def _line(fields: dict[str, str]) -> str:
    return " | ".join(f"{text} {name}" if name == "tok/s" else f"{name} {text}" for name, text in fields.items())


def _remove_replayed(path: Path, *, first_step: int) -> None:
    """Rewrite the file without the train and eval lines from `first_step` on, and without lines that are damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    rows = ((line, _parsed(line)) for line in lines)
    remaining = [line for line, row in rows if row and not (row["kind"] in _REPLAYED and row["step"] >= first_step)]
    contents = b"".join(line + b"\n" for line in remaining)
    if contents != b"\n".join(lines):
        write_atomically(path, contents)


def _parsed(line: bytes) -> dict | None:
    """Return the JSON object of a line, or None if it is not one: the process was killed while it wrote the line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _with_strings(value):
    """Return the value with the floats that JSON does not have as strings."""
    if isinstance(value, dict):
        return {name: _with_strings(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_strings(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _with_floats(value):
    """Undo `_with_strings`."""
    if isinstance(value, dict):
        return {name: _with_floats(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
