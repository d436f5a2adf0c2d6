"""The report of a run: one HTML page made from the records in its workdir alone, of one run or of two together."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btlm_jax import __version__
from btlm_jax.data.store import MANIFEST_FILE, Manifest, read_manifest, read_tokenizer_info
from btlm_jax.display.html_chart import Axis, Mark, Series, line_chart, stacked_bar
from btlm_jax.recipe.config import with_later_keys
from btlm_jax.runs.metrics import Metrics, read_metrics_of
from btlm_jax.runs.page import details, page, table, text, tiles
from btlm_jax.runs.status import FINISHED, RUNNING, Status, count, duration, make_status, size
from btlm_jax.runs.wall_time import CATEGORIES, STEP, WallTime, wall_time
from btlm_jax.runs.workdir import Workdir, read_workdir
from btlm_jax.stopping import STACKS
from btlm_jax.storage.location import resolve_location
from btlm_jax.train import KEPT_TOKENIZER, METRICS_FILE
from btlm_jax.train.plots import smooth

_MOST_ROWS = 200  # of a table of events or starts: the first and the last
# The loss axis ends at this percentile of the losses after this share of the tokens: with the first all else is flat.
_ROBUST_PERCENTILE, _BEGINNING = 99.5, 0.08
_MOST_MARKS = 200  # restarts that are drawn
_MOST_STACKS, _STACK_BYTES = 8, 6000
_UNITS = ((2 * 60, 1, "s"), (2 * 3600, 60, "minutes"), (3 * 86400, 3600, "hours"), (math.inf, 86400, "days"))
_OTHER_TOKENS = "the losses are per token of different tokenizers, and are not comparable: compare bits per byte"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecords:
    """All that is read of one run."""

    workdir: Workdir
    status: Status
    metrics: Metrics
    times: WallTime
    manifest: Manifest | None
    name: str

    @property
    def is_wall(self) -> bool:
        """Return whether the records of the starts say when each step was trained."""
        return any(row.last_kept for row in self.times.starts)


def read_run(text: str) -> RunRecords:
    """Read what the report of a run in a workdir, a path or a URL, is made of; raises as `read_workdir`."""
    workdir = read_workdir(text)
    return RunRecords(
        workdir=workdir,
        status=make_status(workdir),
        metrics=read_metrics_of(workdir.metrics),
        times=wall_time(workdir.starts),
        manifest=_manifest(workdir),
        name=text.rstrip("/").rpartition("/")[2] if "://" in text else Path(text).resolve().name or text,
    )


def report_html(runs: Sequence[RunRecords], *, base: tuple[str, dict[str, Any]]) -> str:
    """Return the page of one run or of two; `base` is the config that the first one is compared with, and its name."""
    title = " and ".join(each.name for each in runs)
    sections = [
        ("Loss", _loss(runs)),
        ("Held-out loss by source", _heldout(runs)),
        ("Learning rate and norms", _norms(runs)),
        ("Speed", _speed(runs)),
        ("Where the time went", "".join(_each(runs, _time))),
        ("Notices and events", "".join(_each(runs, _events))),
        ("Checkpoints", "".join(_each(runs, _checkpoints))),
        ("Samples", "".join(_each(runs, _samples))),
        ("Evaluations", "".join(_each(runs, _evaluations))),
        ("Differences of the configs", _config_differences(runs) if len(runs) == 2 else ""),
        ("Config", "".join(_each(runs, lambda each: _config(each, base)))),
        ("What ran", "".join(_each(runs, _what_ran))),
    ]
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    footer = f"Made by btlm_jax {__version__} on {now} from {', '.join(each.workdir.name for each in runs)}."
    return page(title, sections, head=_head(runs), footer=footer)


def _each(runs: Sequence[RunRecords], section: Callable[[RunRecords], str]) -> Iterator[str]:
    """Yield a section of every run, with its name where there are two."""
    for run in runs:
        if body := section(run):
            yield (f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else "") + body


def _head(runs: Sequence[RunRecords]) -> str:
    parts = []
    for run in runs:
        status = run.status
        colour = {FINISHED: "good", RUNNING: "accent"}.get(
            status.state, "warn" if status.exit_code in (75, 77) else "bad"
        )
        said = f"{run.name}: " if len(runs) > 1 else ""
        parts.append(
            f'<p class="lead"><span class="pill {colour}">{text(status.state)}</span>{text(said + _lead(run))}'
            + (f"<br>{text(status.detail)}" if status.detail else "")
            + "</p>"
        )
        parts += [f'<p class="warn">{text(problem)}</p>' for problem in (*status.problems, *_about_metrics(run))]
    if len({known for run in runs if (known := _tokenizer(run))}) == 2:
        parts.append(f'<p class="warn">{text(_OTHER_TOKENS)}</p>')
    if len(runs) == 1:
        rows = [(value, ", ".join(filter(None, (name, detail))), "") for value, name, detail in _tiles_of(runs[0])]
    else:
        both = zip(*(_tiles_of(run) for run in runs), strict=True)
        rows = [(_with_detail(first), first[1], _with_detail(second)) for first, second in both]
    return "".join(parts) + tiles(rows)


def _with_detail(tile: tuple[str, str, str]) -> str:
    value, _, detail = tile
    return f"{value} ({detail})" if value and detail else value


def _about_metrics(run: RunRecords) -> Iterator[str]:
    metrics, name = run.metrics, f"{run.workdir.name}/{METRICS_FILE}"
    if metrics.num_damaged:
        yield f"{metrics.num_damaged:,} lines of {name} are damaged, and are left out"
    if metrics.stride > 1:
        yield f"of the {metrics.num_train:,} steps in {name} one in {metrics.stride:,} is drawn"


def _lead(run: RunRecords) -> str:
    config = run.workdir.config
    if config is None:
        return ""
    model, table_ = config.model, config.curriculum.table
    lengths = " → ".join(f"{phase.seq_len:,}" for phase in table_.phases)
    layers = f"{model.num_layers} layer{'s' * (model.num_layers != 1)}"
    return (
        f"{layers}, d_model {model.d_model:,}, {model.num_heads} heads, vocabulary "
        f"{model.vocab_size:,}; {table_.num_steps:,} steps of {table_.tokens_per_step:,} tokens, length {lengths}"
    )


def _tokenizer(run: RunRecords) -> str:
    """Return the hash of the tokenizer that a run keeps, or else of that of its store; "" where neither is there."""
    try:
        return read_tokenizer_info(run.workdir.path / KEPT_TOKENIZER).sha256
    except (ValueError, OSError):
        return run.manifest.tokenizer.sha256 if run.manifest else ""


def _tiles_of(run: RunRecords) -> list[tuple[str, str, str]]:
    """Return (value, its name, which steps, tokens or starts it is of)."""
    status = run.status
    held = status.heldout
    bits = held.get("bits_per_byte")
    steps = f"{status.step:,}" + (
        f" / {status.num_steps:,}" if status.num_steps and status.step < status.num_steps else ""
    )
    total, at_step = run.times.total, f"step {held.get('step', 0):,}"
    return [
        (steps, "steps", f"{count(status.tokens or 0)} tokens"),
        ("" if status.loss is None else f"{status.loss:.4f}", "training loss, nats/token, last 20 steps", ""),
        (f"{held['loss']:.4f}" if held else "", "held-out loss, nats/token", at_step),
        (f"{bits:.4f}" if isinstance(bits, (int, float)) else "", "held-out bits/byte", at_step),
        ("" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}", "tokens/s, last 50 steps", ""),
        ("" if status.mfu is None else f"{status.mfu:.1%}", "MFU", ""),
        (duration(total) if total else "", "wall time", f"{status.num_starts:,} start{'s' * (status.num_starts != 1)}"),
        ("" if status.goodput is None else f"{status.goodput:.1%}", "goodput: steps that count", ""),
        ("" if status.eta is None else duration(status.eta), "left, before the end report", ""),
    ]


def _tokens_axis() -> Axis:
    return Axis(title="tokens", text=_compact, begins_at_zero=True)


def _compact(value: float) -> str:
    return f"{value / 1e3:g} k" if 1e3 <= value < 1e6 else count(value)


def _marks(run: RunRecords, *, to_x: Callable[[int], float]) -> list[Mark]:
    """Return the switches of phases, and the starts after the first one, at steps."""
    if run.workdir.config is None:
        return []
    phases = run.workdir.config.curriculum.table.phases
    marks = [
        Mark(x=to_x(phase.first_step), label=f"length {phase.seq_len:,}")
        for phase in phases[1:]
        if phase.first_step <= run.status.step
    ]
    steps = [row.start.first_step - 1 for row in run.times.starts[1:] if row.start.first_step]
    return marks + [Mark(x=to_x(step)) for step in steps[:: max(1, len(steps) // _MOST_MARKS)]]


def _loss(runs: Sequence[RunRecords]) -> str:
    by_tokens, by_time = [], []
    is_wall = all(run.is_wall for run in runs)
    seconds_of = [_seconds_of(run, is_wall=is_wall) for run in runs]
    unit, unit_name = _unit(max(float(seconds[-1]) if len(seconds) else 0.0 for seconds in seconds_of))
    for number, run in enumerate(runs):
        train, seconds = run.metrics.train, seconds_of[number]
        if "loss" not in train:
            continue
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        evals = run.metrics.kind("eval")
        held_tokens, held_loss = _column(evals, "tokens"), _column(evals, "loss")
        colours = (2 * number, 2 * number + 1)
        breaks = tuple(row.at / unit for row in run.times.starts[1:] if is_wall)
        held = {"label": f"{prefix}held-out", "y": held_loss, "colour": colours[1], "has_points": True}
        label = f"{prefix}training"
        by_tokens += [*_with_mean(label, train["tokens"], train["loss"], colours[0]), Series(x=held_tokens, **held)]
        at = np.interp(held_tokens, train["tokens"], seconds) if len(seconds) else held_tokens * math.nan
        by_time += _with_mean(label, seconds / unit, train["loss"], colours[0], breaks=breaks)
        by_time.append(Series(x=at / unit, breaks=breaks, **held))
    if not by_tokens:
        return ""
    limits, note = _loss_limits(by_tokens)
    y = Axis(title="loss (nats per token)", text="{:.3g}".format, limits=limits)
    first = runs[0]
    per_step = first.workdir.config.curriculum.table.tokens_per_step if first.workdir.config else 1
    token_marks = _marks(first, to_x=lambda step: float(step * per_step)) if len(runs) == 1 else []
    time_marks = [
        Mark(x=row.at / unit) for row in first.times.starts[1:]
    ][:_MOST_MARKS] if len(runs) == 1 and is_wall else []  # fmt: skip
    what = "wall time since the first start" if is_wall else "time of training steps"
    charts = line_chart(by_tokens, x=_tokens_axis(), y=y, marks=token_marks, note=note)
    charts += line_chart(
        by_time, x=Axis(title=f"{what} ({unit_name})", text="{:g}".format, begins_at_zero=True), y=y, marks=time_marks
    )
    legend = (
        '<p class="none">Dashed lines: a new sequence length; dotted: a new start of the run.</p>'
        if token_marks
        else ""
    )
    return f'<div class="wide">{charts}</div>{legend}'


def _with_mean(
    label: str, x: np.ndarray, y: np.ndarray, colour: int, *, breaks: tuple[float, ...] = ()
) -> list[Series]:
    """Return a faint line of all values, and one of their moving mean."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    every = Series(label=f"{label}, each step", x=x, y=y, colour=colour, has_band=True, is_faint=True, breaks=breaks)
    return [every, Series(label=label, x=x, y=smooth(y), colour=colour, breaks=breaks)] if len(x) else []


def _loss_limits(series: Sequence[Series]) -> tuple[tuple[float, float] | None, str]:
    """Return limits that leave the first, great losses out, and a note on them."""
    finite = [(each.x[keep], each.y[keep]) for each in series if (keep := np.isfinite(each.y)).any()]
    if not finite:
        return None, ""
    low, greatest = min(float(y.min()) for _, y in finite), max(float(y.max()) for _, y in finite)
    begun = _BEGINNING * max(x[-1] for x, _ in finite)
    later = [y[x >= begun] for x, y in finite]
    high = max(
        *(float(np.percentile(y, _ROBUST_PERCENTILE)) for y in later if len(y)), *(y[-1] for _, y in finite), low
    )
    margin = 0.06 * max(high - low, 0.1)
    note = f"losses up to {greatest:.3g} are above the top" if greatest > high + margin else ""
    return (low - margin, high + margin), note


def _seconds_of(run: RunRecords, *, is_wall: bool) -> np.ndarray:
    """Return of each train line when it was trained, in seconds from the first start on, as the starts' records tell.

    Without `is_wall` it is the time of the steps alone.
    """
    steps = run.metrics.train.get("step", np.zeros(0))
    if not is_wall:
        seconds = np.nan_to_num(run.metrics.train.get("seconds", np.zeros(len(steps))))
        return np.cumsum(seconds) * (run.metrics.num_train / max(1, len(steps)))
    at = np.full(len(steps), math.nan)
    for row in run.times.starts:
        first, start = row.start.first_step, row.start
        if first is None or row.last_kept is None:
            continue
        # What was recorded after the last write of the record has the time of that write.
        marks = dict([*start.marks, (start.step or 0, start.seconds)])
        totals = [seconds["total"] for seconds in marks.values()]
        own = steps >= first
        at[own] = row.at + np.interp(steps[own], list(marks), totals)
    return at


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit, name) for most, unit, name in _UNITS if not seconds > most)


def _heldout(runs: Sequence[RunRecords]) -> str:
    series, rows = [], []
    for number, run in enumerate(runs):
        evals = run.metrics.kind("eval")
        names = sorted({name for row in evals for name in row["sources"]})
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for index, name in enumerate(names):
            of_source = [row for row in evals if name in row["sources"]]
            series.append(
                Series(
                    label=f"{prefix}{name}",
                    x=_column(of_source, "tokens"),
                    y=np.array([_float(row["sources"][name].get("bits_per_byte")) for row in of_source]),
                    colour=index,
                    has_points=True,
                    is_dashed=number == 1,
                )
            )
            rows.append(_heldout_row(f"{prefix}{name}", of_source[-1]["step"], of_source[-1]["sources"][name]))
        if evals:
            last = evals[-1]
            rows.append(_heldout_row(f"{prefix}all", last["step"], last | {"tokens": last.get("heldout_tokens")}))
    if not rows:
        return ""
    y = Axis(title="held-out loss (bits per byte)", text="{:.3g}".format, limits=_loss_limits(series)[0])
    chart = line_chart(series, x=_tokens_axis(), y=y)
    header = ("source", "step", "nats/token", "perplexity", "bits/byte", "tokens")
    body = table(header, rows, right=(1, 2, 3, 4, 5))
    return f'<div class="two"><div>{chart}</div><div>{_positions(runs)}</div></div>{body}'


def _heldout_row(name: str, step: int, losses: dict[str, Any]) -> tuple[str, ...]:
    tokens = losses.get("tokens")
    return (
        name,
        f"{step:,}",
        _digits(losses.get("loss")),
        _digits(losses.get("perplexity"), 2),
        _digits(losses.get("bits_per_byte")),
        f"{tokens:,.0f}" if isinstance(tokens, (int, float)) else "",
    )


def _positions(runs: Sequence[RunRecords]) -> str:
    """Return the chart of the last evaluations' loss by position."""
    series = []
    for number, run in enumerate(runs):
        for row in reversed(run.metrics.kind("eval")):
            match row.get("positions"):
                case {"first": list(first), "last": list(last), "loss": list(loss)} if (
                    len(first) == len(last) == len(loss)
                ):
                    ends = np.array([[_float(a), _float(b)] for a, b in zip(first, last, strict=True)]).reshape(-1, 2)
                    series.append(
                        Series(
                            label=run.name if len(runs) > 1 else f"step {row['step']:,}",
                            x=np.log2(np.sqrt(np.maximum(ends.prod(axis=1), 1.0))),
                            y=np.array([_float(value) for value in loss]),
                            colour=2 * number,
                            has_points=True,
                        )
                    )
                    break
    x = Axis(title="position in the sequence (tokens of context)", text=lambda value: f"{2**value:,.0f}")
    return line_chart(series, x=x, y=Axis(title="held-out loss by position (nats per token)", text="{:.3g}".format))


def _norms(runs: Sequence[RunRecords]) -> str:
    charts = []
    for title, name in (("learning rate", "learning_rate"), ("gradient norm before clipping", "grad_norm")):
        series = [
            Series(
                label=run.name if len(runs) > 1 else title,
                x=run.metrics.train["tokens"],
                y=run.metrics.train[name],
                colour=2 * number,
                has_band=True,
            )
            for number, run in enumerate(runs)
            if name in run.metrics.train
        ]
        charts.append(
            line_chart(series, x=_tokens_axis(), y=Axis(title=title, text=_short, is_log=name == "grad_norm"))
        )
    for title, prefix in (("gradient norm by class", "grad_norm/"), ("update norm by class", "update_norm/")):
        series_of = [
            [
                Series(
                    label=name.removeprefix(prefix).replace("_", " "),
                    x=run.metrics.train["tokens"],
                    y=run.metrics.train[name],
                    colour=index,
                )
                for index, name in enumerate(sorted(each for each in run.metrics.train if each.startswith(prefix)))
            ]
            for run in runs
        ]
        limits = _log_limits([each for series in series_of for each in series])
        for run, series in zip(runs, series_of, strict=True):
            named = title + (f", {run.name}" if len(runs) > 1 else "")
            charts.append(
                line_chart(series, x=_tokens_axis(), y=Axis(title=named, text=_short, is_log=True, limits=limits))
            )
    return f'<div class="two">{"".join(charts)}</div>'


def _log_limits(series: Sequence[Series]) -> tuple[float, float] | None:
    """Return limits that leave out norms far below the others, which are rounding errors of what is 0."""
    values = [each.y[np.isfinite(each.y) & (each.y > 0)] for each in series]
    greatest = max((float(np.max(each)) for each in values if len(each)), default=0.0)
    medians = [median for each in values if len(each) and (median := float(np.median(each))) > 1e-5 * greatest]
    if not medians:
        return None
    low = min(float(np.min(each)) for each in values if len(each) and float(np.median(each)) > 1e-5 * greatest)
    return max(low, 1e-2 * min(medians)) / 1.3, greatest * 1.3


def _speed(runs: Sequence[RunRecords]) -> str:
    charts = []
    for title, name, form in (
        (
            "tokens per second of steps",
            "tokens_per_second",
            lambda value: count(value) if value >= 1e4 else f"{value:,.0f}",
        ),
        ("MFU (%)", "mfu", "{:.3g}".format),
    ):
        scale = 100.0 if name == "mfu" else 1.0
        series = [
            line
            for number, run in enumerate(runs)
            if name in run.metrics.train
            for line in _with_mean(
                run.name if len(runs) > 1 else title,
                run.metrics.train["tokens"],
                scale * run.metrics.train[name],
                2 * number,
            )
        ]
        top = max((float(np.nanpercentile(each.y, 99.5)) for each in series if np.isfinite(each.y).any()), default=1.0)
        charts.append(
            line_chart(series, x=_tokens_axis(), y=Axis(title=title, text=form, limits=(0.0, 1.08 * top or 1.0)))
        )
    return f'<div class="two">{"".join(charts)}</div>'


def _time(run: RunRecords) -> str:
    if not run.times.starts:
        seconds = next((row.get("seconds") for row in reversed(run.metrics.kind("goodput"))), None)
        if not isinstance(seconds, dict):
            return '<p class="none">This version of the run kept no record of its starts.</p>'
        parts = [(str(name), _float(value)) for name, value in seconds.items() if name != "total"]
        parts = _bar([(name, value) for name, value in parts if value > 0])
        return '<p class="none">Of the last start that ended by itself:</p>' + stacked_bar(parts)
    parts = _bar(list(run.times.seconds.items()))
    lost = run.times.lost_steps
    said = (
        f"{duration(run.times.total)} from the first start on; goodput, the share of steps that count, is "
        f"{run.times.goodput:.1%}." + (f" {lost:,} steps were trained again by a later start." if lost else "")
    )
    rows = []
    for row in run.times.starts:
        start = row.start
        steps = "" if start.first_step is None else f"{start.first_step:,} – {start.step or 0:,}"
        ended = f"{start.code}" if start.code is not None else "running" if _is_running(run, start) else "killed"
        useful = row.seconds.get(STEP, 0.0) / row.total if row.total else 0.0
        lost_steps, gap = (
            (f"{row.lost_steps:,}" if row.lost_steps else ""),
            (duration(row.before) if row.before else ""),
        )
        where = (_date(start.began), start.host, steps)
        rows.append((*where, duration(row.total), f"{useful:.1%}", lost_steps, gap, ended, start.reason[:200]))
    header = ("start", "host", "steps", "time", "in steps", "lost steps", "gap before", "exit code", "reason")
    return f"<p>{text(said)}</p>{stacked_bar(parts)}" + _shortened(header, rows, right=(3, 4, 5, 6, 7))


def _bar(seconds: Sequence[tuple[str, float]]) -> list[tuple[str, float, str, int]]:
    """Return the parts of a bar in the order of the categories, each of which has the same colour in every bar."""
    places = {name: place for place, name in enumerate(CATEGORIES)}
    parts = [(name, value, duration(value), places.get(name, len(CATEGORIES))) for name, value in seconds]
    return sorted(parts, key=lambda part: part[3])


def _is_running(run: RunRecords, start: object) -> bool:
    return run.status.state == RUNNING and start is run.times.starts[-1].start


def _shortened(header: Sequence[str], rows: list[tuple[str, ...]], *, right: Sequence[int]) -> str:
    """Return a table of the first and last rows; the others behind a click would make the page too large."""
    if len(rows) <= _MOST_ROWS:
        return table(header, rows, right=right)
    half = _MOST_ROWS // 2
    left_out = f"… {len(rows) - 2 * half:,} more"
    return table(header, [*rows[:half], (left_out, *[""] * (len(header) - 1)), *rows[-half:]], right=right)


def _events(run: RunRecords) -> str:
    rows = [(f"{row['step']:,}", str(row.get("message"))) for row in run.metrics.kind("event")]
    counted = [(name, f"{number:,}") for name, number in run.status.notices.items()]
    bad = run.status.bad_numbers
    said = f'<p class="bad">Evidence of bad numbers: {text(", ".join(bad["evidence"]))}</p>' if bad["evidence"] else ""
    said += table(("notice", "times, in all starts"), counted, right=(1,)) + _stacks(run.workdir.path / STACKS)
    return said + _shortened(("step", "event"), rows, right=(0,)) or '<p class="none">None.</p>'


def _stacks(folder: Path) -> str:
    """Return the ends of the files of stacks that processes wrote which stood still."""
    parts = []
    for file in sorted(folder.glob("*.txt")) if folder.is_dir() else ():
        lines = file.read_bytes()[-_STACK_BYTES:].decode("utf-8", "replace").splitlines()
        parts.append(details(f"{folder.name}/{file.name}, its end", f"<pre>{text(chr(10).join(lines))}</pre>"))
    return "".join(parts[:_MOST_STACKS])


def _checkpoints(run: RunRecords) -> str:
    rows = [
        (f"{saved.step:,}", _date(saved.time), size(saved.num_bytes()))
        for saved in run.workdir.checkpoints
    ]  # fmt: skip
    return _shortened(("step", "complete", "size"), rows, right=(0, 2)) or '<p class="none">None yet.</p>'


def _samples(run: RunRecords) -> str:
    rows = [row for row in run.metrics.kind("sample")][-5:]
    return "".join(
        f'<p class="none">step {row["step"]:,}</p><blockquote><em>{text(row.get("prompt"))}</em>'
        f"{text(row.get('continuation'))}</blockquote>"
        for row in rows
    )


def _evaluations(run: RunRecords) -> str:
    """Return the tables of what btlm evaluate left in the workdir."""
    folder = run.workdir.path / "evaluation"
    files = sorted(folder.glob("**/evaluation.json"), key=lambda file: (len(file.parent.name), file.parent.name))
    parts = [f'<p class="none">the last 3 of {len(files)}</p>'] if len(files) > 3 else []
    for file in files[-3:]:
        from btlm_jax.evaluate.report import tables_of  # imports JAX
        from btlm_jax.hub.evaluation_card import read_report

        try:
            report = read_report(file)
        except (ValueError, OSError) as error:
            parts.append(f'<p class="warn">{text(error)}</p>')
            continue
        parts.append(f"<p><code>{text(file.parent.relative_to(run.workdir.path))}</code></p>")
        for each in tables_of(report):
            header, *rows = each.rows
            parts.append(f"<p><b>{text(each.title)}</b></p>" + table(header, rows, right=range(1, len(header))))
            parts.append(f'<p class="none">{text(each.note)}</p>' if each.note else "")
    return "".join(parts)


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Return a config's values, of a file or of JSON, as section.key -> text."""
    flat = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": _shown(value)}
    return flat


def _config_differences(runs: Sequence[RunRecords]) -> str:
    first, second = (_flat(with_later_keys(run.workdir.values)) for run in runs)
    names = [*first, *(name for name in second if name not in first)]
    rows = [(name, first.get(name, ""), second.get(name, "")) for name in names if first.get(name) != second.get(name)]
    if not rows:
        return '<p class="none">None: the configs are equal.</p>'
    said = f"<p>{len(rows):,} keys differ; the first is <code>{text(rows[0][0])}</code>.</p>"
    return said + table(("key", *(run.name for run in runs)), rows, code=(0, 1, 2), marked=0)


def _config(run: RunRecords, base: tuple[str, dict[str, Any]]) -> str:
    name, values = base
    own, default = _flat(with_later_keys(run.workdir.values)), _flat(with_later_keys(values))
    if not run.workdir.values:
        return '<p class="none">There is no config.json that can be read.</p>'
    differing = [(key, value, default[key]) for key, value in own.items() if default.get(key, value) != value]
    said = f"<p>Keys that are not as in <code>{text(name)}</code>:</p>" if differing else (
        f"<p>All keys are as in <code>{text(name)}</code>.</p>"
    )  # fmt: skip
    every = table(("key", "value"), list(own.items()), code=(0, 1))
    return said + table(("key", "this run", name), differing, code=(0, 1, 2)) + details(f"All {len(own)} keys", every)


def _what_ran(run: RunRecords) -> str:
    if not run.times.starts:
        facts: list[tuple[str, str]] = []
    else:
        start = run.times.starts[-1].start
        facts = [("command", " ".join(start.command)), ("host", f"{start.host}, process {start.pid}")]
        facts += list(start.facts.items())
    changed = _changed_facts(run)
    body = table(("of the last start", ""), facts, code=(1,))
    if changed:
        body += "<p>Starts differ in these:</p>" + table(("fact", "values, in order"), changed, code=(1,))
    return body + _data(run)


def _changed_facts(run: RunRecords) -> list[tuple[str, str]]:
    """Return the facts that are not the same in all starts."""
    rows = []
    for name in sorted({name for row in run.times.starts for name in row.start.facts}):
        values = [row.start.facts[name] for row in run.times.starts if name in row.start.facts]
        if len(unique := list(dict.fromkeys(values))) > 1:
            rows.append((name, " → ".join(unique[:10])))
    return rows


def _data(run: RunRecords) -> str:
    manifest = run.manifest
    if manifest is None:
        return '<p class="none">The token store is not there to be read.</p>'
    rows = [
        (
            split,
            name,
            f"{source.num_documents:,}",
            f"{source.num_blocks:,}",
            count(source.num_blocks * manifest.block_len),
        )
        for split, each in manifest.splits.items()
        for name, source in each.sources.items()
    ]
    facts = [
        ("fingerprint of the store", manifest.fingerprint),
        ("tokenizer", f"{manifest.tokenizer.file}, {manifest.tokenizer.vocab_size:,} ids"),
        ("hash of the tokenizer", manifest.tokenizer.sha256),
        ("block", f"{manifest.block_len:,} tokens, {manifest.dtype}"),
    ]
    header = ("split", "source", "documents", "blocks", "tokens")
    return "<h3>Data</h3>" + table(("", ""), facts, code=(1,)) + table(header, rows, right=(2, 3, 4))


def _manifest(workdir: Workdir) -> Manifest | None:
    """Return the manifest of the run's token store, if that is on this machine and can be read."""
    if workdir.config is None:
        return None
    location = resolve_location(workdir.path, workdir.config.data.store)
    if not isinstance(location, Path) or not (location / MANIFEST_FILE).is_file():
        return None
    try:
        return read_manifest(location)
    except (ValueError, OSError):
        return None


def _column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([_float(row.get(name)) for row in rows])


def _float(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _digits(value: object, digits: int = 4) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) else ""


def _short(value: float) -> str:
    return (
        f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
        if value and not 1e-3 <= abs(value) < 1e4
        else f"{value:g}"
    )


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_shown, value))})"
    return repr(value) if isinstance(value, str) else str(value)


def _date(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
