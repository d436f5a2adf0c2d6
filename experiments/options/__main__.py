"""The options beyond the recipe of 2023, each beside the recipe, and each at its better learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from btlm_jax.display.plotting import new_figure, write_figure
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.storage.files import read_json_object
from btlm_jax.train import SUMMARY_FILE
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

RECIPE, AVERAGED, MUON, COMPLETEP = "recipe", "average: ema", "muon", "completep"
PEAKS = (0.5, 1.0, 2.0)  # times the config's, of muon's rate for muon
HOT = 8.0  # times the config's: what an option is worth where training is near to diverging
CHANGES: dict[str, dict[str, dict[str, object]]] = {  # section, key: value
    RECIPE: {"optimizer": {"average": "ema", "average_share": 0.05}},  # which is kept beside and changes nothing
    "end at 10 %": {},
    "decay to zero": {},
    "weight decay auto": {"optimizer": {"weight_decay": "auto"}},
    COMPLETEP: {"mup": {"preset": "completep"}},
    "z-loss 1e-4": {"optimizer": {"z_loss": 1e-4}},
    "qk-norm rms": {"model": {"qk_norm": "rms"}},
    "qk-norm rms_gain": {"model": {"qk_norm": "rms_gain"}},
    MUON: {"optimizer": {"hidden_optimizer": "muon"}},
    "constant, last 0.2": {"optimizer": {"schedule": "constant", "average": "last", "average_share": 0.2}},
}
ENDS = {"end at 10 %": 0.1, "decay to zero": 0.0}  # of the peak; all others as the config
MADE_HOT = (RECIPE, "z-loss 1e-4", "qk-norm rms", "qk-norm rms_gain")
OF_AVERAGE = ("constant, last 0.2",)  # judged by the average of its weights
HELP = """the options beyond the recipe of 2023, each beside the recipe.

Decay to zero, weight decay by the power law, CompleteP with a base of half the depth, z-loss, QK-norm, Muon for the
hidden matrices and averages of the weights: each at the config's peak rate, at half and at twice that (Muon: of its own
rate), compared at its best one; z-loss and QK-norm also at 8 times.

example:  python -m experiments.options --folder=/tmp/options --data gutenberg_pd.jsonl us_presidents_pd.jsonl
"""


def name_of(option: str, peak: float) -> str:
    """Return the name of a run."""
    return f"{option.replace(',', '').replace(' %', 'percent').replace(' ', '_')}-peak{peak:g}"


def peaks_of(option: str) -> tuple[float, ...]:
    """Return the peaks of the learning rate that an option is tried at."""
    return (*PEAKS, HOT) if option in MADE_HOT else PEAKS


def make_variants(config: TrainConfig, first: Measured, stores: Mapping[str, Path]) -> dict[str, TrainConfig]:
    """Return the runs."""
    config = on_store(config, stores[""])
    return {name_of(option, peak): _variant(config, option, peak) for option in CHANGES for peak in peaks_of(option)}


def _variant(config: TrainConfig, option: str, peak: float) -> TrainConfig:
    for section, values in CHANGES[option].items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    if option == COMPLETEP:
        config = dataclasses.replace(
            config, mup=dataclasses.replace(config.mup, base_num_layers=config.model.num_layers // 2)
        )
    if option == MUON:  # all but the hidden matrices keep AdamW's rate
        rate = peak * config.optimizer.muon_learning_rate
        return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, muon_learning_rate=rate))
    return with_peak(config, peak, end=ENDS.get(option))


def measure(config: TrainConfig, workdir: Path) -> dict:
    """Return the held-out loss of the averaged weights, of a run that has them."""
    found = read_json_object(workdir / SUMMARY_FILE).get("heldout_of_average")
    return {"loss_of_average": found["loss"]} if found else {}


def report(config: TrainConfig, seeds: Sequence[Measured]) -> dict:
    """Return each option's losses at each peak, and at its best one minus the recipe's at its own; None: diverged.

    Raises:
      ValueError: the recipe diverged at every peak.
    """
    options: dict[str, dict] = {}
    of_recipe: list[float] = []
    for shown_name, option, key in [
        *((name, name, "loss_of_average" if name in OF_AVERAGE else "loss") for name in CHANGES),
        (AVERAGED, RECIPE, "loss_of_average"),
    ]:
        whole: dict[float, list[float]] = {}  # by peak, of those at which no seed diverged
        for peak in peaks_of(option):
            name = name_of(option, peak)
            losses = [loss for seed in seeds if (loss := seed[name].get(key)) is not None]
            if len(losses) == len(seeds):
                whole[peak] = losses
        usual = [peak for peak in whole if peak != HOT]
        best = min(usual, key=lambda peak, of=whole: sum(of[peak])) if usual else None
        if shown_name == RECIPE:
            if best is None:
                raise ValueError("the recipe diverged at every peak of its learning rate: nothing is compared with it")
            of_recipe = whole[best]
        options[shown_name] = {
            "losses": {
                f"{peak:g}": mean_and_interval(whole[peak]) if peak in whole else None for peak in peaks_of(option)
            },
            "best_peak": None if best is None else f"{best:g}",
            "minus_recipe": None if best is None else difference_and_interval(whole[best], of_recipe),
        }
    return {"options": options}


def describe(values: dict) -> str:
    """Return a table of the losses, and of the differences to the recipe's."""
    peaks = " | ".join(f"peak x {peak:g}" for peak in (*PEAKS, HOT))
    lines = [f"| option | {peaks} | minus the recipe, each at its best |", "|---|" + "---|" * (len(PEAKS) + 2)]
    for option, each in values["options"].items():
        cells = [_cell(each["losses"], peak) for peak in (*PEAKS, HOT)]
        difference = each["minus_recipe"] and shown(each["minus_recipe"], sign="+", digits=3)
        difference = "0" if option == RECIPE else difference or "diverged"
        lines.append(f"| {option} | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines)


def _cell(losses: Mapping[str, dict | None], peak: float) -> str:
    found = losses.get(f"{peak:g}", {})
    return "diverged" if found is None else f"{found['mean']:.3f}" if found else ""


def plot(values: dict, path: Path) -> None:
    """Draw each option's difference to the recipe with its interval, and each seed as a point."""
    figure, axes = new_figure(size=(7.0, 4.6), dpi=110)
    names = [name for name, each in values["options"].items() if name != RECIPE and each["minus_recipe"]]
    for place, name in enumerate(reversed(names)):
        difference = values["options"][name]["minus_recipe"]
        axes.plot(difference["values"], [place] * len(difference["values"]), ".", color="C0", alpha=0.6)
        low, high = difference["low"], difference["high"]
        if low is not None:
            axes.plot([low, high], [place, place], "-", color="C0", linewidth=1.2)
        axes.plot([difference["mean"]], [place], "|", markersize=12, color="C0")
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("held-out loss minus the recipe's, each at its best rate, nats a token")
    write_figure(figure, path)


EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    kind="options",
    help_text=HELP,
    make_variants=make_variants,
    report=report,
    describe=describe,
    plot=plot,
    measure=measure,
    may_diverge=True,
    most_heldout_tokens=1 << 17,
)

if __name__ == "__main__":
    run(EXPERIMENT)
