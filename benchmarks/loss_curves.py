"""Bits per byte against seconds: what a run of time_to_loss.py is measured by, and the table and figure of its runs.

Of a trainer there are lists of results of runs: "trials", "short" and "seeds", a result being what a run left as JSON,
with "curve" (a list of "seconds" and "bits_per_byte") and "spec"; one that diverged says so under "diverged".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LEVELS = (2.40, 2.20)  # bits per byte
HIGHEST = 3.5  # bits per byte in the figure
PARTS = ("start", "compile", "data", "train", "save")  # of counted seconds


def piece_bytes(contents: bytes) -> np.ndarray:
    """Return how many bytes of UTF-8 each id of a SentencePiece model stands for; control pieces stand for none."""
    from btlm_jax.tokenizers.sentencepiece_proto import BYTE, CONTROL, SPACE_MARK, UNKNOWN, parse_model

    model = parse_model(contents)
    lengths = [len(piece.replace(SPACE_MARK, " ").encode()) for piece in model.pieces]
    for kind, length in ((BYTE, 1), (CONTROL, 0), (UNKNOWN, 0)):
        for number in model.ids_of_type(kind):
            lengths[number] = length
    return np.array(lengths)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return the bits per byte of a loss in nats, summed over the targets that stand for so many bytes."""
    return nats / math.log(2) / num_bytes


Curve = Sequence[tuple[float, float]]  # (seconds, bits per byte)


def seconds_to(level: float, curve: Curve) -> float | None:
    """Return when a curve first reaches a level, on the line between two evaluations, or None."""
    for (before, high), (after, low) in zip(curve, curve[1:], strict=False):
        if low <= level < high:
            return before + (after - before) * (high - level) / (high - low)
    return curve[0][0] if curve and curve[0][1] <= level else None


def value_after(seconds: float, curve: Curve) -> float:
    """Return a curve's last value, or where it goes on beyond so many seconds the line's there."""
    for (before, high), (after, low) in zip(curve, curve[1:], strict=False):
        if before <= seconds < after:
            return high + (low - high) * (seconds - before) / (after - before)
    return curve[-1][1]


def end_of(result: dict) -> float:
    """Return the bits per byte of a run at the end of its budget, infinity for one that diverged."""
    return result.get("bits_per_byte", math.inf)


def best_of(runs: dict) -> dict:
    """Return the result of the best trial of a trainer."""
    return min(runs["trials"], key=end_of)


def curve_of(result: dict) -> Curve:
    """Return the evaluations of a run."""
    return [(row["seconds"], row["bits_per_byte"]) for row in result["curve"]]


def row_of(trainer: str, runs: dict, *, seconds: float) -> dict:
    """Return what the table says of a trainer."""
    best = best_of(runs)
    ends = [value_after(seconds, curve_of(result)) for result in (best, *runs["seeds"])]
    curves = [curve_of(result) for result in (best, *runs["short"])]
    times = {level: [time for curve in curves if (time := seconds_to(level, curve)) is not None] for level in LEVELS}
    return {
        "trainer": trainer,
        "runs": len(runs["trials"]),
        "setting": best["spec"]["setting"],
        "form": best["spec"].get("form", ""),
        "parameters": best["parameters"],
        "seconds_to": {f"{level:.2f}": min(each, default=None) for level, each in times.items()},
        "bits_per_byte": ends,
        "ended": curve_of(best)[-1][0],
        "tokens_per_second": best["tokens"] / best["parts"]["train"],
        "tokens": best["tokens"],
        "parts": best["parts"],
        "evaluating": best["evaluating"],
    }


def table_of(rows: Sequence[dict], *, seconds: float, reference: str) -> str:
    """Return the table in Markdown; in brackets a time over that of the trainer `reference`."""
    levels = [f"{level:.2f}" for level in LEVELS]
    titles = ["trainer", "chosen, of trials", "parameters", *(f"to {level}, s (over ours)" for level in levels)]
    titles += [f"bits/byte after {seconds:g} s", "trained until, s", "tokens", "tokens/s of steps"]
    titles += [f"{' + '.join(PARTS)}, s", "evaluations, not counted, s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    first = next((row["seconds_to"] for row in rows if row["trainer"] == reference), {})
    for row in rows:
        setting = ", ".join(f"{key} {value}" for key, value in (row["setting"] or {}).items())
        chosen = "; ".join(filter(None, (row["form"], setting))) or "as it is"
        times = [_time_cell(row["seconds_to"][level], first.get(level)) for level in levels]
        parts = " + ".join(f"{row['parts'].get(part, 0.0):.0f}" for part in PARTS)
        ends = row["bits_per_byte"]
        spread = f" (seeds {', '.join(f'{end:.4f}' for end in ends)})" if len(ends) > 1 else ""
        lines.append(
            f"| {row['trainer']} | {chosen}, of {row['runs']} | {row['parameters'] / 1e6:.2f} M | "
            f"{' | '.join(times)} | {statistics.fmean(ends):.4f}{spread} | {row['ended']:.0f} | "
            f"{row['tokens'] / 1e6:.2f} M | {row['tokens_per_second']:,.0f} | {parts} | {row['evaluating']:.0f} |"
        )
    return "\n".join(lines)


def _time_cell(value: float | None, reference: float | None) -> str:
    if value is None:
        return "not reached"
    return f"{value:.0f} ({value / reference:.2f})" if reference else f"{value:.0f}"


def trials_table(found: dict) -> str:
    """Return a table of all trials in Markdown."""
    lines = ["| trainer | trial | setting | bits/byte at the end | steps |", "|---|---|---|---|---|"]
    for trainer, runs in found.items():
        for number, result in enumerate(runs["trials"]):
            setting = ", ".join(f"{key} {value}" for key, value in (result["spec"]["setting"] or {}).items())
            bits = result.get("diverged") or f"{end_of(result):.4f}"
            lines.append(
                f"| {trainer} | {number + 1} | {setting or 'as it is'} | {bits} | {result.get('steps', 0):,} |"
            )
    return "\n".join(lines)


def draw(found: dict, path: Path, *, seconds: float) -> None:
    """Draw bits per byte against counted seconds, a curve a trainer; the runs of --short are dashed."""
    from btlm_jax.display.plotting import new_figure, write_figure

    figure, axes = new_figure(size=(7.0, 4.5), dpi=150)
    for number, (trainer, runs) in enumerate(found.items()):
        for results, style in ((runs["trials"] and [best_of(runs)], "-"), (runs["short"], "--")):
            for result in results:
                curve = [point for point in curve_of(result) if point[1] < HIGHEST]
                times, bits = [point[0] for point in curve], [point[1] for point in curve]
                label = trainer if style == "-" else None
                axes.plot(times, bits, style, color=f"C{number}", marker=".", label=label)
    for level in LEVELS:
        axes.axhline(level, color="gray", linewidth=0.8)
    axes.set_xlim(0, 1.02 * seconds)
    axes.set_xlabel("seconds from the start of the process, evaluations not counted")
    axes.set_ylabel("bits per byte of held-out text")
    axes.legend()
    write_figure(figure, path)


def facts_of(result: dict) -> dict:
    """Return what of a run is kept: no paths, numbers short."""
    names = ("parts", "steps", "tokens", "parameters", "step_seconds", "evaluating", "bits_per_byte", "diverged")
    facts = {name: result["spec"].get(name) for name in ("setting", "form", "seconds", "seed")}
    facts |= {name: result[name] for name in names if name in result}
    return facts | {"curve": [[round(seconds, 2), round(bits, 5)] for seconds, bits in curve_of(result)]}


def has_result(runs: dict) -> bool:
    """Return whether a trainer has a trial that did not diverge."""
    return any("diverged" not in result for result in runs["trials"])
