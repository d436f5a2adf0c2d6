"""SwiGLU against GELU, with as many parameters, which are as many FLOPs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from btlm_jax.display.plotting import new_figure, write_figure
from btlm_jax.recipe.config import ModelConfig, TrainConfig
from experiments.study import (
    Experiment,
    Measured,
    difference_and_interval,
    mean_and_interval,
    on_store,
    run,
    shown,
    with_peak,
)

SWIGLU, GELU = "swiglu", "gelu"
PEAKS = (0.5, 1.0, 2.0)  # times the config's
HELP = """SwiGLU against the feed-forward layer of GPT-2, down(gelu(up(x))), with as many parameters.

SwiGLU has three matrices and GELU two, which are 3/2 as wide here: the same parameters, and the same FLOPs of matrix
products. Each at the config's peak rate, at half and at twice that, and compared at its best one.

example:  python -m experiments.activation --folder=/tmp/activation --data gutenberg_pd.jsonl us_presidents_pd.jsonl
"""


def name_of(layer: str, peak: float) -> str:
    """Return the name of a run."""
    return f"{layer}-peak{peak:g}"


def make_variants(config: TrainConfig, first: Measured, stores: Mapping[str, Path]) -> dict[str, TrainConfig]:
    """Return the runs.

    Raises:
      ValueError: d_ff is odd, so that 3/2 of it are no whole number.
    """
    if config.model.d_ff % 2:
        raise ValueError(f"model.d_ff={config.model.d_ff} must be even: the other layer is 3/2 as wide")
    config = on_store(config, stores[""])
    wide = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, d_ff=config.model.d_ff * 3 // 2),
        mup=dataclasses.replace(config.mup, base_d_ff=config.mup.base_d_ff * 3 / 2),
    )
    return {
        name_of(layer, peak): with_peak(of_layer, peak)
        for peak in PEAKS
        for layer, of_layer in ((SWIGLU, config), (GELU, wide))
    }


def parameters_of(model: ModelConfig, layer: str) -> int:
    """Return how many parameters the feed-forward layers have."""
    D, F = model.d_model, model.d_ff
    return model.num_layers * (3 * D * F + 2 * F + D if layer == SWIGLU else 2 * D * F + F + D)


def surround(variant: str) -> contextlib.AbstractContextManager[None]:
    """Return the context that the run of a variant is made in."""
    from experiments.activation.gelu import gelu_in_place_of_swiglu

    return gelu_in_place_of_swiglu() if variant.startswith(GELU) else contextlib.nullcontext()


def report(config: TrainConfig, seeds: Sequence[Measured]) -> dict:
    """Return the losses at each peak, and the difference of the layers at their best ones."""
    runs = make_variants(config, {}, {"": Path("store")})
    layers = {}
    for layer in (SWIGLU, GELU):
        losses = {peak: [measured[name_of(layer, peak)]["loss"] for measured in seeds] for peak in PEAKS}
        seconds = [
            next(iter(measured[name_of(layer, peak)]["step_seconds"].values())) for measured in seeds for peak in PEAKS
        ]
        best = min(PEAKS, key=lambda peak, losses=losses: sum(losses[peak]))
        layers[layer] = {
            "d_ff": runs[name_of(layer, 1.0)].model.d_ff,
            "parameters": parameters_of(runs[name_of(layer, 1.0)].model, layer),
            "losses": {f"{peak:g}": mean_and_interval(losses[peak]) for peak in PEAKS},
            "best_peak": f"{best:g}",
            "best": mean_and_interval(losses[best]),
            "step_seconds": min(seconds),
        }
    best_of = [layers[layer]["best"]["values"] for layer in (SWIGLU, GELU)]
    return {"layers": layers, "swiglu_minus_gelu": difference_and_interval(*best_of)}


def describe(values: dict) -> str:
    """Return a table of the losses, and the difference."""
    lines = ["| layer | d_ff | its parameters | " + " | ".join(f"loss at peak x {peak:g}" for peak in PEAKS)
             + " | time of a step |", "|---|---|---|" + "---|" * (len(PEAKS) + 1)]  # fmt: skip
    fastest = min(each["step_seconds"] for each in values["layers"].values())
    for layer, each in values["layers"].items():
        losses = " | ".join(f"{each['losses'][f'{peak:g}']['mean']:.4f}" for peak in PEAKS)
        lines.append(
            f"| {layer} | {each['d_ff']:,} | {each['parameters']:,} | {losses} | {each['step_seconds'] / fastest:.2f} |"
        )
    return "\n".join(
        [*lines, f"\nSwiGLU minus GELU, each at its best peak: {shown(values['swiglu_minus_gelu'], sign='+')}"]
    )


def plot(values: dict, path: Path) -> None:
    """Draw the loss of each layer against the peak of the learning rate, each seed a point."""
    figure, axes = new_figure(size=(6.0, 4.2), dpi=110)
    for number, (layer, each) in enumerate(values["layers"].items()):
        means = [each["losses"][f"{peak:g}"]["mean"] for peak in PEAKS]
        axes.plot(PEAKS, means, "-", color=f"C{number}", label=f"{layer}, d_ff {each['d_ff']:,}")
        for peak in PEAKS:
            points = each["losses"][f"{peak:g}"]["values"]
            axes.plot([peak] * len(points), points, ".", color=f"C{number}", alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("peak learning rate, times the config's")
    axes.set_ylabel("held-out loss, nats a token")
    axes.legend()
    write_figure(figure, path)


EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    kind="activation",
    help_text=HELP,
    make_variants=make_variants,
    surround=surround,
    report=report,
    describe=describe,
    plot=plot,
)

if __name__ == "__main__":
    run(EXPERIMENT)
