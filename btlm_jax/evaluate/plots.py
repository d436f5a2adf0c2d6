"""The plots of an evaluation: loss by position, and retrieval by length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btlm_jax.display.plotting import new_figure, new_panels, write_figure
from btlm_jax.evaluate.positions import FEWEST_TOKENS
from btlm_jax.evaluate.retrieval import CHANCE_NATS
from btlm_jax.evaluate.retrieval_cases import Task

SIZE, DPI = (9.0, 5.0), 120
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2")
_STYLES = {"none": "-", "fixed": "--", "dynamic": ":"}
_NAMES = {"none": "", "fixed": ", ALiBi / {factor:g}", "dynamic": ", ALiBi dynamic"}
_SHOWN_FROM = 16  # positions before it are the same at every length, and their loss would flatten the others'


def plot_positions(curves: Sequence[dict], path: Path, *, trained_length: int, title: str) -> None:
    """Draw loss against position: a curve for each length of windows and each division of ALiBi's slopes."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = new_figure(size=SIZE, dpi=DPI)
    lengths = sorted({curve["length"] for curve in curves})
    lows, highs, drawn = [], [], []
    for curve in curves:
        bins = curve["bins"]
        shown = [number for number, first in enumerate(bins["first"]) if first >= min(_SHOWN_FROM, lengths[0] // 2)]
        shown = [number for number in shown if bins["num_tokens"][number] >= FEWEST_TOKENS] or shown
        centres = [(bins["first"][number] * bins["last"][number]) ** 0.5 for number in shown]
        losses = [bins["loss"][number] for number in shown]
        errors = [2 * bins["standard_error"][number] for number in shown]
        line = axes.errorbar(
            centres, losses, yerr=errors, color=_COLOURS[lengths.index(curve["length"]) % len(_COLOURS)],
            linestyle=_STYLES[curve["alibi"]], linewidth=1.4, elinewidth=0.6, marker="o", markersize=2.5,
            label=f"{curve['length']:,}" + _NAMES[curve["alibi"]].format(factor=curve["factor"]),
        )  # fmt: skip
        drawn.append((line, min(losses)))
        if curve["alibi"] == "none":
            lows.append(min(losses))
            highs.append(max(losses))
    margin = 0.1 * max(max(highs) - min(lows), 0.1)
    axes.set_ylim(min(lows) - 2 * margin, max(highs) + 2 * margin)
    for line, lowest in drawn:
        if lowest > axes.get_ylim()[1]:
            line.set_label(f"{line.get_label()} (higher)")
    axes.axvline(trained_length, color="#888888", linestyle="--", linewidth=1)
    axes.annotate(
        f"trained at {trained_length:,}", (trained_length, 0.98), xycoords=axes.get_xaxis_transform(),
        xytext=(-2, 0), textcoords="offset points", rotation=90, ha="right", va="top", fontsize=8, color="#888888",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position in the window (tokens of context)")
    axes.set_ylabel("loss (nats per token), 2 std. errors")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    write_figure(figure, path)


def plot_retrieval(groups: Sequence[dict], path: Path, *, trained_length: int, title: str) -> None:
    """Draw, for each task, accuracy and the answer's loss by length, and the loss at each depth."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    tasks = list(dict.fromkeys(group["task"] for group in groups))
    figure, panels = new_panels(size=(4.2 * len(tasks), 4.2), dpi=DPI, columns=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        own = [group for group in groups if group["task"] == task]
        lengths = [group["length"] for group in own]
        right = axes.twinx()
        right.plot(lengths, [100 * group["accuracy"] for group in own], color="#000000", marker="s", label="accuracy")
        right.set_ylim(-3, 103)
        depths = [part["depth"] for part in own[0]["depths"]]
        for number, depth in enumerate(depths):
            losses = [group["depths"][number]["answer_nats"] for group in own]
            axes.plot(
                lengths, losses, color=_COLOURS[number], marker="o", markersize=3, linewidth=1,
                label=f"loss at depth {depth:g}",
            )  # fmt: skip
        if task != Task.TOPICS:
            axes.axhline(CHANCE_NATS, color="#888888", linestyle=":", linewidth=1)
            axes.annotate(
                "random number", (0.02, CHANCE_NATS), xycoords=axes.get_yaxis_transform(), xytext=(0, 2),
                textcoords="offset points", fontsize=8, color="#888888",
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.axvline(trained_length, color="#888888", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("loss of the answer (nats)")
    right.set_ylabel("accuracy (%), black")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False, title=title)
    write_figure(figure, path)
