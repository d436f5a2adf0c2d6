"""The two plots of a run: loss over training, and loss by position. Matplotlib is imported when a plot is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from btlm_jax.display.plotting import new_figure, write_figure
from btlm_jax.recipe.curriculum import Curriculum

if TYPE_CHECKING:
    from btlm_jax.train.heldout import HeldoutResult

SIZE = (9.0, 5.0)  # inches
DPI = 120
TRAIN, RATE, MARK, OVERALL = "#1f77b4", "#2ca02c", "#888888", "#000000"
SOURCE_COLOURS = ("#d62728", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
SMOOTHING = 50  # the smoothed curve averages over 1/50 of the points
ROBUST_PERCENTILE = 95.0  # the loss axis ends here, because with the first steps on it the others would look flat


def plot_loss(metrics: list[dict], curriculum: Curriculum, path: Path) -> None:
    """Draw training and held-out loss and the learning rate against tokens, with the curriculum's switches.

    metrics: {"kind": "train", "tokens", "loss", "learning_rate"} and
    {"kind": "eval", "tokens", "loss", "sources": {name: {"loss"}}}; other kinds are ignored, and losses that are not
    finite, which trained nothing.
    """
    from matplotlib.ticker import EngFormatter

    train = [row for row in metrics if row["kind"] == "train" and math.isfinite(row["loss"])]
    evaluations = [row for row in metrics if row["kind"] == "eval"]
    figure, axes = new_figure(size=SIZE, dpi=DPI)
    rate_axes = axes.twinx()
    tokens, losses = _column(train, "tokens"), _column(train, "loss")
    rate_axes.plot(tokens, _column(train, "learning_rate"), color=RATE, linewidth=0.8, alpha=0.7)
    rate_axes.set_ylabel("learning rate", color=RATE)
    rate_axes.tick_params(axis="y", colors=RATE)
    rate_axes.set_ylim(bottom=0)
    axes.plot(tokens, losses, color=TRAIN, linewidth=0.8, alpha=0.35, label="train")
    axes.plot(tokens, smooth(losses), color=TRAIN, linewidth=1.8, label="train, smoothed")
    _draw_evaluations(axes, evaluations)
    _mark_switches(axes, curriculum)
    note = _limit_loss(axes, losses, evaluations)
    axes.set_xlabel("tokens" + note)
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(0, 1.02 * curriculum.num_tokens)  # so that the last marker is drawn whole
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_zorder(rate_axes.get_zorder() + 1)  # losses in front of the learning rate
    axes.patch.set_visible(False)
    _write(figure, path)


def plot_position(result: HeldoutResult, path: Path, *, seq_lens: tuple[int, ...], document_mask: bool) -> None:
    """Draw held-out loss against position, in bins of doubling width, and mark the training lengths.

    With data.document_mask a position counts from where its document begins, otherwise from the sequence's beginning.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = new_figure(size=SIZE, dpi=DPI)
    bins = result.bins
    edges = [bins[0].first - 0.5, *(bin_.last + 0.5 for bin_ in bins)]
    losses = [bin_.loss for bin_ in bins]
    axes.stairs(losses, edges, baseline=None, color=TRAIN, linewidth=1.2, alpha=0.6)
    centres = [(bin_.first * bin_.last) ** 0.5 for bin_ in bins]
    errors = [2 * bin_.standard_error for bin_ in bins]
    axes.errorbar(centres, losses, yerr=errors, fmt="o", markersize=4, color=TRAIN, label="mean of bin, 2 std. errors")
    for seq_len in sorted(set(seq_lens)):
        axes.axvline(seq_len, color=MARK, linestyle="--", linewidth=1)
        _label_mark(axes, seq_len, f"trained at {seq_len:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    where = "in its document, which data.document_mask keeps apart" if document_mask else "in the sequence"
    axes.set_xlabel(f"position {where} (tokens of context)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(_rise_text(result), fontsize=10)
    _write(figure, path)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred moving mean over 1/50 of the values.

    At the start the window is smaller, so that the fast fall stays sharp; at the end it stays whole and ends with the
    last value, so that the last point is not the loss of a single batch.
    """
    half = len(values) // SMOOTHING // 2
    index = np.arange(len(values))
    first = np.minimum(np.maximum(index - half, 0), len(values) - 1 - 2 * half)
    last = np.minimum(np.minimum(index + half, 2 * index), len(values) - 1)
    # Each window by itself: a running sum would lose the digits of all that follows a loss of 1e30.
    windows = np.stack([first, last + 1], axis=1).ravel()
    return np.add.reduceat(np.append(values, 0.0), windows)[::2] / (last + 1 - first)


def _draw_evaluations(axes, evaluations: list[dict]) -> None:
    names = sorted({name for row in evaluations for name in row["sources"]})
    for number, name in enumerate(names):
        rows = [row for row in evaluations if name in row["sources"]]
        axes.plot(
            [row["tokens"] for row in rows],
            [row["sources"][name]["loss"] for row in rows],
            color=SOURCE_COLOURS[number % len(SOURCE_COLOURS)],
            marker="o",
            markersize=3,
            linewidth=0.8,
            label=f"held-out {name}",
        )
    axes.plot(
        _column(evaluations, "tokens"),
        _column(evaluations, "loss"),
        color=OVERALL,
        marker="s",
        markersize=4,
        linewidth=1,
        label="held-out, all",
    )


def _mark_switches(axes, curriculum: Curriculum) -> None:
    for before, after in zip(curriculum.phases, curriculum.phases[1:], strict=False):
        tokens = curriculum.tokens_seen(after.first_step)
        axes.axvline(tokens, color=MARK, linestyle="--", linewidth=1)
        _label_mark(axes, tokens, f"length {before.seq_len:,} \u2192 {after.seq_len:,}")


def _limit_loss(axes, losses: np.ndarray, evaluations: list[dict]) -> str:
    """Limit the loss axis to most points and all of the last evaluation; return a note of what is outside, or ""."""
    heldout: list[list[float]] = [
        [row["loss"], *(source["loss"] for source in row["sources"].values())] for row in evaluations
    ]
    seen = np.concatenate([losses, *heldout])
    if not len(seen):
        return ""
    bottom = float(seen.min())
    robust = max(float(np.percentile(seen, ROBUST_PERCENTILE)), *(heldout[-1] if heldout else [bottom]))
    margin = 0.08 * max(robust - bottom, 0.1)
    top = robust + margin
    axes.set_ylim(bottom - margin, top)
    return f"   (losses above {top:.1f} are off the top, up to {seen.max():.1f})" if seen.max() > top else ""


def _label_mark(axes, x: float, text: str) -> None:
    """Write `text` upwards at the left of the vertical line at `x`: labels of lines close together do not overlap."""
    axes.annotate(
        text,
        (x, 0.98),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-2, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        fontsize=8,
        color=MARK,
    )


def _rise_text(result: HeldoutResult) -> str:
    lowest = min(result.bins, key=lambda bin_: bin_.loss)
    rise = f"rises at position {result.first_rise:,}" if result.first_rise else "does not rise after it"
    return f"lowest {lowest.loss:.3f} at positions {lowest.first:,}\u2013{lowest.last:,}; " + rise


def _column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def _write(figure, path: Path) -> None:
    """Write the figure as PNG, the legend above it."""
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    write_figure(figure, path)
