"""The state of a run: what it does or how it ended, how far it is, how fast, and what it keeps."""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btlm_jax.display.progress import printable
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.curriculum import Curriculum
from btlm_jax.runs.metrics import last_of_kind, last_rows
from btlm_jax.runs.wall_time import STEP, WallTime, wall_time
from btlm_jax.runs.workdir import RUNNING, UNKNOWN, Workdir, read_workdir
from btlm_jax.stopping import PEER_GONE, PREEMPTED
from btlm_jax.train import EVIDENCE
from btlm_jax.train.starts import Start

FINISHED, STOPPED, KILLED = "finished", "stopped", "killed"
RECENT_STEPS = 50  # speed is the median over so many
LOSS_STEPS = 20  # the loss shown is the mean over so many
_MEANING = {  # of exit codes, as docs/troubleshooting.md has them
    0: "done",
    1: "an error",
    2: "a wrong command line",
    70: "a fault of btlm",
    PREEMPTED: "preempted and saved; the same command goes on",
    76: "bad numbers; the same command would stop there again",
    PEER_GONE: "another process is gone, or the run stood still; the same command goes on",
    130: "interrupted; the same command goes on",
    141: "whoever read its output has left",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """What is to be said of a run; None: not known. Times are seconds, points in time of the Unix epoch."""

    workdir: str
    state: str  # RUNNING, FINISHED, STOPPED, KILLED or UNKNOWN
    detail: str  # who runs it, or why it does not run
    exit_code: int | None
    doing: str  # of a run that is running: the category of its time
    step: int
    num_steps: int | None
    tokens: int | None
    num_tokens: int | None
    phase: int | None  # from 1
    num_phases: int | None
    seq_len: int | None
    loss: float | None  # nats a token, mean of the last steps
    heldout: dict[str, Any]  # step, loss, bits_per_byte, and both by source
    tokens_per_second: float | None
    mfu: float | None
    last_step_age: float | None
    eta: float | None  # seconds of training that are left
    checkpoint: dict[str, Any]  # step, age, bytes
    next_save_step: int | None
    next_save: float | None  # seconds until then
    steps_at_risk: int  # trained after the last checkpoint
    num_starts: int
    wall_time: dict[str, float]  # seconds by category
    goodput: float | None
    lost_steps: int
    notices: dict[str, int]  # of all starts
    bad_numbers: dict[str, Any]  # steps whose updates were not made, times that the run went back, evidence
    events: tuple[str, ...]  # the last ones
    free_bytes: int | None
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it with null for what is not finite."""
        return _jsonable(dataclasses.asdict(self))


def status_of(text: str) -> Status:
    """Return the state of the run in a workdir, a path or a URL; raises as `read_workdir`."""
    return make_status(read_workdir(text))


def make_status(workdir: Workdir) -> Status:
    """Return the state of a run whose workdir is read."""
    now = time.time()
    rows = last_rows(workdir.metrics)
    train = [row for row in rows if row["kind"] == "train"] or last_of_kind(workdir.metrics, "train")
    curriculum = workdir.config.curriculum.table if workdir.config else None
    start = workdir.starts[-1] if workdir.starts else None
    is_running = workdir.life == RUNNING
    saved = workdir.checkpoints[-1] if workdir.checkpoints else None
    step = max(train[-1]["step"] if train else 0, saved.step if saved else 0)
    pace = _seconds_per_step(train)
    times = wall_time(workdir.starts)
    state, detail, code = _state(workdir, start, now=now)
    phase = curriculum.phase_at(step) if curriculum else None
    every = workdir.config.checkpoint.every_steps if workdir.config else None
    next_save = min((step // every + 1) * every, curriculum.num_steps) if every and curriculum else None
    is_done = curriculum is not None and step >= curriculum.num_steps
    counts = _sums(each.notices for each in workdir.starts)
    return Status(
        workdir=workdir.name,
        state=state,
        detail=detail,
        exit_code=code,
        doing=(start.running or ("set-up" if start.step is None else "")) if is_running and start else "",
        step=step,
        num_steps=curriculum.num_steps if curriculum else None,
        tokens=curriculum.tokens_seen(step) if curriculum else (train[-1]["tokens"] if train else None),
        num_tokens=curriculum.num_tokens if curriculum else None,
        phase=phase.index + 1 if phase else None,
        num_phases=len(curriculum.phases) if curriculum else None,
        seq_len=phase.seq_len if phase else None,
        loss=_mean_loss(train[-LOSS_STEPS:]),
        heldout=_heldout(workdir),
        tokens_per_second=curriculum.tokens_per_step / pace if curriculum and pace else None,
        mfu=statistics.median(shares) if (shares := numbers(train[-RECENT_STEPS:], "mfu")) else None,
        last_step_age=now - workdir.metrics.stat().st_mtime if train else None,
        eta=_eta(workdir.config, step=step, pace=pace, times=times)
        if workdir.config and pace and not is_done
        else None,
        checkpoint={"step": saved.step, "age": now - saved.time, "bytes": saved.num_bytes()} if saved else {},
        next_save_step=None if is_done else next_save,
        next_save=(next_save - step) * pace if next_save and pace and not is_done else None,
        steps_at_risk=0 if state == FINISHED else step - (saved.step if saved else 0),
        num_starts=len(times.starts),
        wall_time=times.seconds if workdir.starts else {},
        goodput=times.goodput if workdir.starts else None,
        lost_steps=times.lost_steps,
        notices=counts,
        bad_numbers=_bad_numbers(workdir.path, counts),
        events=tuple(f"step {row['step']:,}: {row.get('message')}" for row in _events(workdir)),
        free_bytes=None if "://" in workdir.name else shutil.disk_usage(workdir.path).free,
        problems=workdir.problems,
    )


def _state(workdir: Workdir, start: Start | None, *, now: float) -> tuple[str, str, int | None]:
    """Return the state, why, and the exit code of the last start, if it has one."""
    owner = workdir.owner
    if owner is not None and workdir.life == RUNNING:
        return RUNNING, str(owner), None
    if owner is not None and workdir.life == UNKNOWN:
        return UNKNOWN, f"{owner} has not written for a while: it is dead, or cut off from this folder", None
    code = start.code if start else None
    if workdir.is_finished:
        return FINISHED, "", 0
    if start is not None and code is not None:
        why = f": {start.reason}" if start.reason else ""
        return STOPPED, f"exit code {code} ({_MEANING.get(code, 'of another version')}){why}", code
    if start is not None:
        ago = duration(now - start.written)
        during = f", in {start.running!r}" if start.running else ", before its first step" if start.step is None else ""
        return KILLED, f"without a word; last heard of {ago} ago{during}: process {start.pid} on {start.host}", None
    if owner is not None:
        return KILLED, f"without a word: {owner}", None
    return STOPPED, "it has no record of its starts, so that how it ended is not known", None


def _seconds_per_step(train: Sequence[dict]) -> float | None:
    """Return the median of the last steps of the same length."""
    recent = [row for row in train[-RECENT_STEPS:] if row.get("seq_len") == train[-1].get("seq_len")]
    seconds = numbers(recent, "seconds")
    return statistics.median(seconds) or None if seconds else None


def numbers(rows: Sequence[dict], name: str) -> list[float]:
    """Return the finite numbers that lines have by a name."""
    values = (row.get(name) for row in rows)
    return [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]


def _eta(config: TrainConfig, *, step: int, pace: float, times: WallTime) -> float:
    """Return the seconds of the steps that are left, with what stood beside them so far: evaluations, saves, waiting.

    A later phase's step is taken to be slower by its FLOPs. The end, with the loss on all held-out text, is not in it.
    """
    beside = sum(times.seconds.get(name, 0.0) for name in ("evaluation", "checkpoint"))
    steps = times.seconds.get(STEP, 0.0) + times.seconds.get("data wait", 0.0)
    return _step_seconds_left(config, config.curriculum.table, step=step, pace=pace) * (
        1 + beside / steps if steps else 1
    )


def _step_seconds_left(config: TrainConfig, curriculum: Curriculum, *, step: int, pace: float) -> float:
    # The pace is of the last step that was trained, which at a switch of phases is of the phase before.
    current = curriculum.phase_at(max(step - 1, 0))
    later = [phase for phase in curriculum.phases if phase.index > current.index]
    seconds = max(current.end_step - step, 0) * pace
    if later:
        from btlm_jax.train.flops import flops_per_token  # imports JAX

        own = flops_per_token(config.model, seq_len=current.seq_len)
        seconds += sum(
            phase.num_steps * pace * flops_per_token(config.model, seq_len=phase.seq_len) / own for phase in later
        )
    return seconds


def _heldout(workdir: Workdir) -> dict[str, Any]:
    rows = last_of_kind(workdir.metrics, "eval")
    if not rows:
        return {}
    sources = {
        name: {"loss": source.get("loss"), "bits_per_byte": source.get("bits_per_byte")}
        for name, source in rows[-1]["sources"].items()
    }
    return {
        "step": rows[-1]["step"],
        "loss": rows[-1]["loss"],
        "bits_per_byte": rows[-1].get("bits_per_byte"),
        "sources": sources,
    }


def _events(workdir: Workdir) -> list[dict[str, Any]]:
    return last_of_kind(workdir.metrics, "event", number=3)


def _bad_numbers(path: Path, counts: dict[str, int]) -> dict[str, Any]:
    folder = path / EVIDENCE
    evidence = sorted(str(each) for each in folder.iterdir()) if folder.is_dir() else []
    return {"skipped": counts.get("step-skipped", 0), "went_back": counts.get("went-back", 0), "evidence": evidence}


def _sums(counts) -> dict[str, int]:
    sums: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            sums[name] = sums.get(name, 0) + count
    return dict(sorted(sums.items()))


def _mean_loss(train: Sequence[dict]) -> float | None:
    """Return the mean of the finite ones: a batch of padding alone has none."""
    losses = numbers(train, "loss")
    return sum(losses) / len(losses) if losses else math.nan if train else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """Return a time in its two largest units: "2 h 14 min"."""
    seconds = max(0, round(seconds))
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            rest = seconds % length // part
            return f"{seconds // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"


def size(num_bytes: float) -> str:
    """Return bytes as text: "12.4 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def count(number: float) -> str:
    """Return a large number as text: "24.5 M"."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,.0f}"


def status_text(status: Status, *, now: float | None = None) -> str:
    """Return a paragraph for a terminal."""
    now = time.time() if now is None else now
    head = f"{status.workdir}: {status.state}" + (f", {status.detail}" if status.detail else "")
    lines = [head] + [f"  {name:<9} {text}" for name, text in _lines(status, now=now) if text]
    return printable("\n".join(lines))


def _lines(status: Status, *, now: float) -> list[tuple[str, str]]:
    counts = {"num_starts": status.num_starts, "lost_steps": status.lost_steps}
    return [
        ("doing", status.doing if status.doing != STEP else ""),
        ("step", _step_text(status)),
        ("loss", _loss_text(status)),
        ("speed", _speed_text(status)),
        ("left", _eta_text(status, now=now)),
        ("saved", _saved_text(status)),
        ("time", time_text(status.wall_time, **counts, goodput=status.goodput)),
        ("notices", ", ".join(f"{number:,} {name}" for name, number in status.notices.items())),
        ("bad", _bad_text(status)),
        *(("event", event) for event in status.events),
        ("disk", _disk_text(status)),
        *(("problem", problem) for problem in status.problems),
    ]


def _step_text(status: Status) -> str:
    if status.num_steps is None:
        return f"{status.step:,}" if status.step else "none yet"
    text = f"{status.step:,} of {status.num_steps:,} ({status.step / status.num_steps:.1%})"
    if (status.num_phases or 1) > 1:
        text += f", phase {status.phase} of {status.num_phases}"
    return f"{text}, length {status.seq_len:,}; {count(status.tokens or 0)} of {count(status.num_tokens or 0)} tokens"


def _loss_text(status: Status) -> str:
    parts = []
    if status.loss is not None:
        parts.append(f"{status.loss:.4f} nats/token, mean of the last {LOSS_STEPS} steps")
    if status.heldout:
        held = status.heldout
        text = f"held-out at step {held['step']:,}: {held['loss']:.4f}"
        if isinstance(held["bits_per_byte"], (int, float)):
            text += f", {held['bits_per_byte']:.4f} bits/byte"
        parts.append(text)
    return "; ".join(parts)


def _speed_text(status: Status) -> str:
    if status.tokens_per_second is None:
        return ""
    mfu = f", MFU {status.mfu:.1%}" if status.mfu is not None else ""
    text = f"{status.tokens_per_second:,.0f} tokens/s{mfu}, median of the last {RECENT_STEPS} steps"
    return text + (f"; last step {duration(status.last_step_age or 0)} ago" if status.state != FINISHED else "")


def _eta_text(status: Status, *, now: float) -> str:
    if status.eta is None:
        return ""
    text = f"{duration(status.eta)} of steps, evaluations and saves, then the end report"
    if status.state != RUNNING:
        return f"{text}, once it goes on"
    end = datetime.datetime.fromtimestamp(now + status.eta)
    return f"{text}; until {end:%Y-%m-%d %H:%M}"


def _saved_text(status: Status) -> str:
    if not status.checkpoint:
        text = "no checkpoint any more" if status.state == FINISHED else "no checkpoint yet"
    else:
        saved = status.checkpoint
        text = f"step {saved['step']:,}, {duration(saved['age'])} ago, {size(saved['bytes'])}"
    if status.next_save_step and status.state == RUNNING:
        wait = f", in {duration(status.next_save)}" if status.next_save is not None else ""
        text += f"; next at step {status.next_save_step:,}{wait}"
    if status.steps_at_risk and status.state != RUNNING:
        where = " after it" if status.checkpoint else ""
        text += f"; {status.steps_at_risk:,} steps{where} will be trained again"
    return text


def time_text(seconds: dict[str, float], *, num_starts: int, goodput: float | None, lost_steps: int) -> str:
    """Return one line on the wall time of a run, by category; "" if none is known."""
    total = sum(seconds.values())
    if not total:
        return ""
    shares = sorted(seconds.items(), key=lambda item: -item[1])
    parts = [f"{name} {value / total:.1%}" for name, value in shares if value / total >= 0.0005]
    starts = f"{num_starts:,} start{'s' * (num_starts != 1)}"
    lost = f"; {lost_steps:,} steps were trained again" if lost_steps else ""
    return f"{duration(total)} in {starts}, goodput {goodput or 0:.1%}: {', '.join(parts)}{lost}"


def _bad_text(status: Status) -> str:
    bad = status.bad_numbers
    parts = [f"{bad['skipped']:,} updates not made"] if bad["skipped"] else []
    parts += [f"went back {bad['went_back']:,} times"] if bad["went_back"] else []
    parts += [f"see {bad['evidence'][-1]}"] if bad["evidence"] else []
    return ", ".join(parts)


def _disk_text(status: Status) -> str:
    if status.free_bytes is None:
        return ""
    text = f"{size(status.free_bytes)} free"
    if status.checkpoint.get("bytes") and status.free_bytes < 2 * status.checkpoint["bytes"]:
        text += ": too little for two more checkpoints"
    return text


def status_row(status: Status) -> tuple[str, ...]:
    """Return the cells of one line of a table of runs."""
    done = f"{status.step:,} / {status.num_steps:,}" if status.num_steps else f"{status.step:,}"
    held = status.heldout.get("bits_per_byte")
    return (
        status.workdir,
        status.state if status.exit_code in (None, 0) else f"{status.state} {status.exit_code}",
        done,
        "" if status.loss is None else f"{status.loss:.4f}",
        f"{held:.4f}" if isinstance(held, (int, float)) else "",
        "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
        "" if status.eta is None else duration(status.eta),
        duration(status.checkpoint["age"]) + " ago" if status.checkpoint else "",
        "" if status.goodput is None else f"{status.goodput:.1%}",
    )


ROW_TITLES = ("workdir", "state", "step", "loss", "bits/byte", "tokens/s", "left", "saved", "goodput")


def table_text(rows: Sequence[tuple[str, ...]]) -> str:
    """Return lines of a table, the first two columns at the left, the others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return printable("\n".join("  ".join(cells).rstrip() for cells in aligned))
