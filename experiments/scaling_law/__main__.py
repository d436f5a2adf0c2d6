"""A law of the loss is fitted to small runs, predicts a larger one before it is made, and is held against it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from btlm_jax.recipe.config import TrainConfig, config_from
from btlm_jax.tune import scaling, scaling_report
from btlm_jax.tune.scaling import POWER, Law, Point, Prediction
from experiments.scaling_law.family import fitted_sizes
from experiments.study import Experiment, Measured, on_store, run

TARGET = "target"
RECORD = "predictions.jsonl"  # in the folder of the runs
HELP = """a law of the loss is fitted to small runs, and predicts a larger one before that is made.

The config is the larger run, the target. Eight runs of a quarter of its parameters and less, with as many tokens a
parameter and twice as many, come first. Then both laws are fitted to the first seed, their predictions are recorded
with date and hash in --folder, and only then the target is trained.

example:  python -m experiments.scaling_law --folder=/tmp/scaling --data gutenberg_pd.jsonl us_presidents_pd.jsonl
"""


def make_variants(config: TrainConfig, first: Measured, stores: Mapping[str, Path]) -> dict[str, TrainConfig]:
    """Return the fitted runs, and once they are measured the target, whose prediction is recorded first."""
    config = on_store(config, stores[""])
    found = fitted_sizes(config)
    if found.keys() <= first.keys():
        record_predictions(config, first, stores[""].parent / RECORD)
        found[TARGET] = config
    return found


def points_of(config: TrainConfig, measured: Measured) -> list[Point]:
    """Return the points of the fitted runs of a seed."""
    return [
        scaling.point_of_config(each, name=name, loss=measured[name]["loss"])
        for name, each in fitted_sizes(config).items()
    ]


def laws_of(config: TrainConfig, measured: Measured) -> dict[str, Law]:
    """Return the laws of both forms."""
    return {form: law_of(form, config, measured) for form in scaling.FORMS}


def law_of(form: str, config: TrainConfig, measured: Measured) -> Law:
    """Return the law of a form."""
    return scaling.fit(points_of(config, measured), form=form, vocab_size=config.model.vocab_size)


def record_predictions(config: TrainConfig, first: Measured, path: Path) -> None:
    """Record what the law of each form says of the target, once."""
    recorded = {line["form"] for line in scaling.recorded_predictions(path)}
    for form in scaling.FORMS:
        if form not in recorded:
            predicted = scaling.predict_config(law_of(form, config, first), config)
            scaling.record(path, {"form": form, "predicted": dataclasses.asdict(predicted)})


def measure(config: TrainConfig, workdir: Path) -> dict:
    """Return when a run ended, and what had been predicted by then."""
    lines = scaling.recorded_predictions(workdir.parents[1] / RECORD)
    return {"ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "predictions": lines}


def report(config: TrainConfig, seeds: Sequence[Measured]) -> dict:
    """Return the fitted laws, the recorded predictions, and how far they are from the target."""
    laws = laws_of(config, seeds[0])
    target = scaling.point_of_config(config, name=TARGET, loss=1.0)
    losses = [measured[TARGET]["loss"] for measured in seeds]
    outcomes = {}
    for line in seeds[0][TARGET]["predictions"]:
        said = config_from(Prediction, line["predicted"], path="prediction")
        outcomes[line["form"]] = {
            **line,
            "errors": [said.loss / loss - 1 for loss in losses],
            "is_inside": [said.low <= loss <= said.high for loss in losses],
            "was_before": said.made < seeds[0][TARGET]["ended"],
        }
    largest = max(point.flops for point in laws[POWER].points)
    return {
        "points": [dataclasses.asdict(point) for point in laws[POWER].points],
        "coefficients": {form: law.named() for form, law in laws.items()},
        "fit_errors": {
            form: [scaling.loss_of(law, point) / point.loss - 1 for point in law.points] for form, law in laws.items()
        },
        "target": {
            "num_parameters": target.num_parameters,
            "num_tokens": target.num_tokens,
            "flops": target.flops,
            "flops_to_largest_fitted": target.flops / largest,
            "losses": losses,
        },
        "outcomes": outcomes,
    }


def describe(values: dict) -> str:
    """Return a table of the predictions and of what came."""
    target = values["target"]
    lines = [
        f"Target: {target['num_parameters']:,.0f} parameters, {target['num_tokens']:,.0f} tokens, "
        f"{target['flops_to_largest_fitted']:.1f} times the FLOPs of the largest fitted run.",
        "",
        "| law | predicted | 90 % | measured | error | recorded, UTC | hash |",
        "|---|---|---|---|---|---|---|",
    ]
    for form, each in values["outcomes"].items():
        said = each["predicted"]
        lines.append(
            f"| {form} | {said['loss']:.4f} | {said['low']:.4f} to {said['high']:.4f} | "
            f"{', '.join(f'{loss:.4f}' for loss in target['losses'])} | "
            f"{', '.join(f'{error:+.2%}' for error in each['errors'])} | {said['made']} | {each['sha256'][:12]} |"
        )
    for form, errors in values["fit_errors"].items():
        lines.append(f"\nThe {form} form misses its own runs by {max(map(abs, errors)):.2%} at most.")
    return "\n".join(lines)


def plot(values: dict, path: Path) -> None:
    """Draw the loss of all runs against compute, and the predictions with their intervals."""
    points = [Point(**each) for each in values["points"]]
    law = scaling.fit(points, form=POWER)
    predictions = [config_from(Prediction, each["predicted"], path="") for each in values["outcomes"].values()]
    target = values["target"]
    measured = [(target["flops"], loss) for loss in target["losses"]]
    scaling_report.plot_law(law, path, predictions=predictions, measured=measured)


EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    kind="scaling_law",
    help_text=HELP,
    make_variants=make_variants,
    measure=measure,
    report=report,
    describe=describe,
    plot=plot,
    num_seeds=1,
)

if __name__ == "__main__":
    run(EXPERIMENT)
