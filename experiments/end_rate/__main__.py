"""Where the learning rate ends: at 10 % of its peak, at 0.85 % as BTLM's, or at 0; for few and many tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.sizes import count_parameters
from btlm_jax.tune.trials import scale_phases, scale_tokens
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

ENDS = {"10 %": 0.1, "0.85 %": 0.0085, "0": 0.0}  # of the peak
BTLM = "0.85 %"
FEW, MANY = "few", "many"
BUDGETS = {FEW: 1.0, MANY: 8.0}  # times the config's tokens
PEAKS = (1.0, 2.0)  # times the config's: which end is best depends on where the peak is
HELP = """the learning rate ends at 10 % of its peak, at 0.85 % as BTLM's, or at 0.

Each at the config's tokens and at 8 times as many, and each at the config's peak and at twice that, since a rate that
ends lower bears a higher peak.

example:  python -m experiments.end_rate --folder=/tmp/end_rate --data gutenberg_pd.jsonl us_presidents_pd.jsonl
"""


def name_of(budget: str, end: str, peak: float) -> str:
    """Return the name of a run."""
    return f"{budget}-end{100 * ENDS[end]:g}-peak{peak:g}"


def make_variants(config: TrainConfig, first: Measured, stores: Mapping[str, Path]) -> dict[str, TrainConfig]:
    """Return the runs: those of few tokens first."""
    config = on_store(config, stores[""])
    return {
        name_of(budget, end, peak): _variant(config, tokens=tokens, end=ENDS[end], peak=peak)
        for budget, tokens in BUDGETS.items()
        for peak in PEAKS
        for end in ENDS
    }


def _variant(config: TrainConfig, *, tokens: float, end: float, peak: float) -> TrainConfig:
    config = with_peak(config, peak, end=end)
    curriculum, optimizer = config.curriculum, config.optimizer
    per_step = curriculum.table.tokens_per_step
    return dataclasses.replace(
        config,
        curriculum=dataclasses.replace(
            curriculum, num_tokens=scale_phases(curriculum.num_tokens, tokens, per_step=per_step)
        ),
        optimizer=dataclasses.replace(
            optimizer,
            warmup_tokens=scale_tokens(optimizer.warmup_tokens, tokens, per_step=per_step),
        ),
    )


def report(config: TrainConfig, seeds: Sequence[Measured]) -> dict:
    """Return the held-out losses, what each end adds to BTLM's at its own peak, and each end at its better peak."""
    runs = make_variants(config, {}, {"": Path("store")})
    parameters = count_parameters(config.model)
    budgets = {}
    for budget in BUDGETS:
        losses = {
            end: {peak: [measured[name_of(budget, end, peak)]["loss"] for measured in seeds] for peak in PEAKS}
            for end in ENDS
        }
        best = {end: min(PEAKS, key=lambda peak, end=end: sum(losses[end][peak])) for end in ENDS}
        num_tokens = runs[name_of(budget, BTLM, 1.0)].curriculum.table.num_tokens
        budgets[budget] = {
            "num_tokens": num_tokens,
            "tokens_per_parameter": num_tokens / parameters,
            "losses": {end: {f"{peak:g}": mean_and_interval(losses[end][peak]) for peak in PEAKS} for end in ENDS},
            "minus_btlm": {
                end: {f"{peak:g}": difference_and_interval(losses[end][peak], losses[BTLM][peak]) for peak in PEAKS}
                for end in ENDS
            },
            "best_peak": {end: f"{best[end]:g}" for end in ENDS},
            "best_minus_btlm": {
                end: difference_and_interval(losses[end][best[end]], losses[BTLM][best[BTLM]]) for end in ENDS
            },
        }
    return {"num_parameters": parameters, "budgets": budgets}


def describe(values: dict) -> str:
    """Return a table of the losses, and of the differences to BTLM's end."""
    lines = ["| tokens a parameter | end | " + " | ".join(f"loss at peak x {peak:g}" for peak in PEAKS)
             + " | its better peak minus 0.85 %'s |", "|---|---|" + "---|" * (len(PEAKS) + 1)]  # fmt: skip
    for each in values["budgets"].values():
        for end in ENDS:
            losses = " | ".join(f"{each['losses'][end][f'{peak:g}']['mean']:.4f}" for peak in PEAKS)
            difference = shown(each["best_minus_btlm"][end], sign="+") if end != BTLM else "0"
            lines.append(f"| {each['tokens_per_parameter']:.1f} | {end} | {losses} | {difference} |")
    return "\n".join(lines)


def plot(values: dict, path: Path) -> None:
    """Draw what each end adds to BTLM's loss at the same peak: a panel for each number of tokens."""
    figure, panels = new_panels(size=(9.0, 4.0), dpi=110, columns=len(BUDGETS))
    for panel, each in zip(panels, values["budgets"].values(), strict=True):
        for number, peak in enumerate(PEAKS):
            for place, end in enumerate(ENDS):
                difference = each["minus_btlm"][end][f"{peak:g}"]
                x = place + 0.15 * number
                panel.plot([x] * len(difference["values"]), difference["values"], ".", color=f"C{number}", alpha=0.5)
                label = f"peak x {peak:g}" if place == 0 else None
                panel.plot([x], [difference["mean"]], "_", markersize=14, color=f"C{number}", label=label)
        panel.axhline(0, color="#888888", linewidth=0.8)
        panel.set_xticks(range(len(ENDS)), list(ENDS))
        panel.set_xlabel("end of the learning rate, of its peak")
        panel.set_title(f"{each['tokens_per_parameter']:.1f} tokens a parameter", fontsize=10)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("held-out loss minus that of 0.85 %, nats")
    write_figure(figure, path)


EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    kind="end_rate",
    help_text=HELP,
    make_variants=make_variants,
    report=report,
    describe=describe,
    plot=plot,
)

if __name__ == "__main__":
    run(EXPERIMENT)
