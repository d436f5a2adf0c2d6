"""What is printed and drawn of a scaling law and its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from btlm_jax.display.plotting import new_figure, write_figure
from btlm_jax.tune.scaling import CHINCHILLA, LEVEL, Law, Outcome, Prediction, loss_of

_FORMULAS = {CHINCHILLA: "L = E + A / N^alpha + B / D^beta", "power": "L = E + (C / C0)^-gamma"}


def describe_law(law: Law) -> str:
    """Return the law, its coefficients with intervals, and each run beside what it says of it."""
    percent = f"{LEVEL:.0%}"
    lines = [f"{law.form}: {_FORMULAS[law.form]}, fitted to {len(law.points)} runs; {percent} intervals of a bootstrap"]
    lines += [
        f"  {name:<6} {value:>11.4g}   {low:.4g} to {high:.4g}" for name, (value, low, high) in law.named().items()
    ]
    lines.append(f"  {'parameters':>12} {'tokens':>12} {'FLOPs':>10} {'loss':>8} {'law':>8} {'error':>7}")
    for point in law.points:
        said = loss_of(law, point)
        lines.append(
            f"  {point.num_parameters:>12,.0f} {point.num_tokens:>12,.0f} {point.flops:>10.3g} {point.loss:>8.4f} "
            f"{said:>8.4f} {said / point.loss - 1:>+7.2%}  {point.name}"
        )
    return "\n".join(lines)


def describe_prediction(prediction: Prediction) -> str:
    """Return a prediction as one line."""
    return (
        f"{prediction.num_parameters:,.0f} parameters, {prediction.num_tokens:,.0f} tokens, {prediction.flops:.3g} "
        f"FLOPs: loss {prediction.loss:.4f} nats a token, {LEVEL:.0%} of runs from {prediction.low:.4f} to "
        f"{prediction.high:.4f}"
    )


def describe_outcome(outcome: Outcome) -> str:
    """Return how a prediction has held."""
    when = {
        True: "before the run ended",
        False: "after the run had ended, so it is no prediction",
        None: "and no record of a start in its workdir says when the run ended",
    }[outcome.was_before]
    inside = "inside" if outcome.is_inside else "outside"
    return (
        f"predicted {outcome.prediction.loss:.4f}, measured {outcome.loss:.4f}: {outcome.error:+.2%}, {inside} the "
        f"interval of {outcome.prediction.low:.4f} to {outcome.prediction.high:.4f}; made {outcome.prediction.made}, "
        f"{when} (law {outcome.prediction.law_sha256[:12]}, prediction {outcome.sha256[:12]})"
    )


def plot_law(
    law: Law,
    path: Path,
    *,
    predictions: Sequence[Prediction] = (),
    measured: Sequence[tuple[float, float]] = (),
) -> None:
    """Draw the loss of each run against its compute, what the law says of it, and predictions with their intervals.

    `measured` are (FLOPs, loss) of runs that were predicted.
    """
    figure, axes = new_figure(size=(7.0, 4.5), dpi=110)
    points = sorted(law.points, key=lambda point: point.flops)
    flops = [point.flops for point in points]
    axes.plot(flops, [point.loss for point in points], "o", label="runs")
    axes.plot(flops, [loss_of(law, point) for point in points], "x-", linewidth=0.8, label=f"{law.form} law")
    if predictions:
        losses = np.array([each.loss for each in predictions])
        ends = np.array([[each.loss - each.low, each.high - each.loss] for each in predictions]).T
        axes.errorbar([each.flops for each in predictions], losses, yerr=ends, fmt="s", capsize=3, label="predicted")
    if measured:
        axes.plot(*zip(*measured, strict=True), "r*", label="measured afterwards")
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("held-out loss, nats a token")
    axes.legend()
    write_figure(figure, path)
