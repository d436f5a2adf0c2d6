"""ALiBi beyond the trained length: slopes as trained, divided by a fixed factor, and divided as the window grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.evaluate.positions import DYNAMIC, FIXED, PLAIN
from btlm_jax.recipe.config import TrainConfig
from experiments.curriculum.__main__ import KIND, LONG, MIXED, SHORT
from experiments.curriculum.__main__ import make_variants as make_all
from experiments.curriculum.positions import (
    BEYOND,
    FACTORS,
    find_curve,
    loss_between,
    measure_positions_of,
    own_lengths,
)
from experiments.study import Experiment, Measured, difference_and_interval, mean_and_interval, run, shown

VARIANTS = (SHORT, LONG, MIXED)
HELP = """loss to 8 times the trained length, with ALiBi's slopes as trained, fixed and dynamic interpolation.

The runs are those of experiments.curriculum at equal tokens: in its folder nothing is trained again.

example:  python -m experiments.alibi --folder=/tmp/curriculum --data gutenberg_pd.jsonl us_presidents_pd.jsonl
"""


def make_variants(config: TrainConfig, first: Measured, stores: Mapping[str, Path]) -> dict[str, TrainConfig]:
    """Return the runs of the curriculum experiment at equal tokens."""
    made = make_all(config, {}, stores)
    return {name: made[name] for name in VARIANTS}


def report(config: TrainConfig, seeds: Sequence[Measured]) -> dict:
    """Return the losses of each run within and beyond its trained length, and what dividing the slopes adds there."""
    variants = {}
    for name in VARIANTS:
        trained = seeds[0][name]["trained_length"]
        of_seeds = [measured[name]["curves"] for measured in seeds]
        bands = {f"{times}x": (trained * times // 2 + 1, trained * times) for times in (2, 4, 8)}
        bands = {"1x": (1, trained), **bands}
        at_most = BEYOND * trained
        curves = {"plain": [find_curve(curves, PLAIN, length=at_most) for curves in of_seeds]}
        for factor in FACTORS:
            curves[f"fixed {factor:g}"] = [
                find_curve(curves, FIXED, length=at_most, factor=factor) for curves in of_seeds
            ]
        losses = {
            setting: {
                band: mean_and_interval([loss_between(curve, *ends) for curve in each]) for band, ends in bands.items()
            }
            for setting, each in curves.items()
        }
        variants[name] = {
            "trained_length": trained,
            "losses": losses,
            "first_rise": {setting: [curve["first_rise"] for curve in each] for setting, each in curves.items()},
            "minus_plain": {
                setting: {
                    band: difference_and_interval(losses[setting][band]["values"], losses["plain"][band]["values"])
                    for band in bands
                }
                for setting in list(losses)[1:]
            },
            "dynamic_minus_plain": {  # of whole windows, all of whose positions see the slopes divided
                str(length): mean_and_interval(
                    [
                        _dynamic(curves, length, trained) - find_curve(curves, PLAIN, length=length)["loss"]
                        for curves in of_seeds
                    ]
                )
                for length in own_lengths(trained)
            },
            "curves": {
                setting: {
                    "position": [
                        (a * b) ** 0.5 for a, b in zip(each[0]["bins"]["first"], each[0]["bins"]["last"], strict=True)
                    ],
                    "loss": [sum(x) / len(x) for x in zip(*(curve["bins"]["loss"] for curve in each), strict=True)],
                }
                for setting, each in curves.items()
            },
        }
    return {"variants": variants}


def describe(values: dict) -> str:
    """Return a table of the loss in octaves beyond the trained length, and of what dynamic interpolation adds."""
    lines = ["| run | slopes | 1x | 2x | 4x | 8x |", "|---|---|---|---|---|---|"]
    for name, each in values["variants"].items():
        for setting, losses in each["losses"].items():
            row = " | ".join(f"{losses[band]['mean']:.4f}" for band in ("1x", "2x", "4x", "8x"))
            lines.append(f"| {name}, {each['trained_length']:,} | {setting} | {row} |")
    lines.append("")
    for name, each in values["variants"].items():
        for length, difference in each["dynamic_minus_plain"].items():
            lines.append(f"- {name}: dynamic in windows of {int(length):,} minus plain {shown(difference, sign='+')}")
    return "\n".join(lines)


def plot(values: dict, path: Path) -> None:
    """Draw by position what dividing the slopes adds to the loss: a panel a run, a line for each factor."""
    figure, panels = new_panels(size=(13.0, 4.2), dpi=110, columns=len(VARIANTS))
    for panel, (name, each) in zip(panels, values["variants"].items(), strict=True):
        plain = each["curves"]["plain"]["loss"]
        for setting, curve in each["curves"].items():
            difference = [a - b for a, b in zip(curve["loss"], plain, strict=True)]
            panel.plot(curve["position"], difference, marker="o", markersize=2, label=setting)
        panel.axvline(each["trained_length"], color="#888888", linestyle=":", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{name}: trained to {each['trained_length']:,} (dotted)")
        panel.set_xlabel("tokens of context")
        panel.legend(fontsize=8)
    panels[0].set_ylabel("loss minus that of plain slopes, nats a token")
    write_figure(figure, path)


def _dynamic(curves: Sequence[dict], length: int, trained: int) -> float:
    """Return the loss of whole windows under DYNAMIC, which is FIXED where FACTORS has its factor."""
    factor = length / trained
    if length == BEYOND * trained:
        return find_curve(curves, FIXED, length=length, factor=factor)["loss"]
    return find_curve(curves, DYNAMIC, length=length)["loss"]


EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    kind=KIND,
    help_text=HELP,
    make_variants=make_variants,
    measure=measure_positions_of,
    report=report,
    describe=describe,
    plot=plot,
)

if __name__ == "__main__":
    run(EXPERIMENT)
