"""Does the best learning rate stay where it is when the model grows? Over widths btlm and sp, over depths completep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from btlm_jax.recipe.config import TrainConfig
from btlm_jax.tune import lr_transfer
from btlm_jax.tune.lr_transfer import Sweep
from btlm_jax.tune.trials import Result
from experiments.study import Experiment, Measured, on_store, run

RATES = (-8.0, -7.0, -6.0, -5.0)  # log2; a curve whose least loss is at an end gets more there
LADDERS = {"widths": ("btlm", "sp"), "depths": ("btlm", "completep")}
HELP = """where is the best learning rate, over widths of btlm and sp, and over depths of btlm and completep?

Widths double from mup.base_d_model to model.d_model, depths from mup.base_num_layers to model.num_layers. The runs are
those of btlm tune lr-transfer, and so are optima and intervals.

example:  python -m experiments.lr_transfer --folder=/tmp/lr_transfer --data gutenberg_pd.jsonl us_presidents_pd.jsonl
"""


def sweeps_of(config: TrainConfig, *, num_seeds: int) -> dict[str, Sweep]:
    """Return the sweep of each ladder.

    Raises:
      ValueError: a largest size is no power of two times the base's.
    """
    mup = config.mup
    ladders = {
        "widths": _doubled(mup.base_d_model, config.model.d_model, "model.d_model"),
        "depths": _doubled(mup.base_num_layers, config.model.num_layers, "model.num_layers"),
    }
    return {
        ladder: Sweep(
            config=config, presets=presets, widths=ladders["widths"] if ladder == "widths" else ladders["widths"][:1],
            depths=ladders["depths"] if ladder == "depths" else ladders["depths"][:1], batches=(1.0,), tokens=(1.0,),
            log2_rates=RATES, num_seeds=num_seeds,
        )
        for ladder, presets in LADDERS.items()
    }  # fmt: skip


def _doubled(first: float, last: int, key: str) -> tuple[int, ...]:
    sizes = [int(first)]
    while sizes[-1] < last:
        sizes.append(2 * sizes[-1])
    if sizes[-1] != last or sizes[0] != first or len(sizes) < 2:
        raise ValueError(f"{key}={last} must be the base's {first:g} doubled once or more")
    return tuple(sizes)


def make_variants(config: TrainConfig, first: Measured, stores: Mapping[str, Path]) -> dict[str, TrainConfig]:
    """Return the runs, small models first; rates beyond the ends follow from the first seed's losses."""
    config = on_store(config, stores[""])
    results = _results_of([first])
    found = {}
    for sweep in sweeps_of(config, num_seeds=1).values():
        for curve in sorted(sweep.curves, key=lambda curve: curve.width * curve.depth):
            for rate in sweep.rates_of(curve, results):
                name = sweep.name_of(curve, rate=rate, seed=0).removesuffix("-s0")
                found[name] = sweep.config_of(curve, rate=rate, seed=0)
    return found


def report(config: TrainConfig, seeds: Sequence[Measured]) -> dict:
    """Return of each ladder the losses, optima with intervals, and what the first optimum costs at the last size."""
    results = _results_of(seeds)
    return {
        ladder: lr_transfer.report(_as_tried(sweep, seeds[0]), results)
        for ladder, sweep in sweeps_of(config, num_seeds=len(seeds)).items()
    }


def _results_of(seeds: Sequence[Measured]) -> dict[str, Result]:
    """Return what was measured as the sweep knows it; the loss of a run that diverged is infinite."""
    return {
        f"{name}-s{number}": Result(loss=math.inf if each["loss"] is None else each["loss"], seconds=0.0)
        for number, measured in enumerate(seeds)
        for name, each in measured.items()
    }


def _as_tried(sweep: Sweep, first: Measured) -> Sweep:
    """Return the sweep whose rates are those that the first seed had, of which later seeds make no more."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Tried(Sweep):
        def rates_of(self, curve, results):
            own = dataclasses.replace(sweep, num_seeds=1)
            return own.rates_of(curve, _results_of([first]))

    return Tried(**{field.name: getattr(sweep, field.name) for field in dataclasses.fields(sweep)})


def describe(values: dict) -> str:
    """Return a table of the optima, and how far they move."""
    lines = ["| curve | best log2 rate | 90 % | loss there |", "|---|---|---|---|"]
    moves = []
    for ladder in LADDERS:
        for each in values[ladder]["curves"]:
            optimum = each["optimum"]
            interval = "unknown" if optimum["low"] is None else f"{optimum['low']:.2f} to {optimum['high']:.2f}"
            note = "" if optimum["is_bracketed"] else ", at the end of the rates"
            name = f"{each['preset']}, width {each['width']}, {each['depth']} layers"
            lines.append(f"| {name} | {optimum['rate']:.2f}{note} | {interval} | {optimum['loss']:.4f} |")
        for each in values[ladder]["transfers"]:
            moves.append(
                f"- {each['preset']} over {ladder}: {each['range_of_optima']:.2f} octaves; the smallest one's optimum "
                f"at the largest {lr_transfer.describe_cost(each)}"
            )
    return "\n".join([*lines, "", *moves])


def plot(values: dict, path: Path) -> None:
    """Draw the loss against the learning rate, a panel for each ladder's presets."""
    curves = []
    for ladder, presets in LADDERS.items():
        for each in values[ladder]["curves"]:
            if each["preset"] in presets:
                curves.append({**each, "preset": f"{each['preset']} over {ladder}"})
    lr_transfer.plot({"curves": curves}, path)


EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    kind="lr_transfer",
    help_text=HELP,
    make_variants=make_variants,
    report=report,
    describe=describe,
    plot=plot,
    num_seeds=3,
    may_diverge=True,  # at a rate that is too high
)

if __name__ == "__main__":
    run(EXPERIMENT)
