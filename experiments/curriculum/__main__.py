"""Short sequences only, long ones only, or three quarters short and then long: at equal tokens and at equal time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.evaluate.positions import PLAIN
from btlm_jax.recipe.config import CurriculumConfig, TrainConfig
from btlm_jax.tune.trials import scale_phases, scale_tokens
from experiments.curriculum.positions import find_curve, loss_between, measure_positions_of
from experiments.study import Experiment, Measured, difference_and_interval, mean_and_interval, on_store, run, shown

FOLDER = Path(__file__).parent
KIND = "curriculum"
MIXED, SHORT, LONG = "mixed", "short", "long"
SHORT_TIME, LONG_TIME = "short-equal-time", "long-equal-time"
VARIANTS = (MIXED, SHORT, LONG, SHORT_TIME, LONG_TIME)
HELP = """short sequences only, long ones only, or three quarters of the tokens short, then long.

The config's curriculum has two phases, which is "mixed". All on the same tokens; then short and long alone once more,
with as many tokens as take the time of "mixed" here. The loss by position goes to 8 times the longest sequence.

example:  python -m experiments.curriculum --folder=/tmp/curriculum --data gutenberg_pd.jsonl us_presidents_pd.jsonl
"""


def make_variants(config: TrainConfig, first: Measured, stores: Mapping[str, Path]) -> dict[str, TrainConfig]:
    """Return the runs: those at equal time once the first seed of the others is measured.

    Raises:
      ValueError: the curriculum has not two phases, a short one and a long one.
    """
    table = config.curriculum.table
    if len(table.phases) != 2 or table.phases[0].seq_len >= table.phases[1].seq_len:
        raise ValueError(f"curriculum.seq_len={config.curriculum.seq_len}: give a short length, then a long one")
    config = on_store(config, stores[""])
    made = {MIXED: config, SHORT: _of_one_phase(config, 0, 1.0), LONG: _of_one_phase(config, 1, 1.0)}
    if made.keys() <= first.keys():
        seconds = {name: seconds_of(made[name], step_seconds_of(first)) for name in made}
        made[SHORT_TIME] = _of_one_phase(config, 0, seconds[MIXED] / seconds[SHORT])
        made[LONG_TIME] = _of_one_phase(config, 1, seconds[MIXED] / seconds[LONG])
    return made


def step_seconds_of(measured: Measured) -> dict[str, float]:
    """Return the seconds of a step at each length: the least of the runs at equal tokens, the least disturbed."""
    found: dict[str, float] = {}
    for name in (MIXED, SHORT, LONG):
        for length, seconds in measured[name]["step_seconds"].items():
            found[length] = min(seconds, found[length]) if length in found else seconds
    return found


def seconds_of(config: TrainConfig, step_seconds: Mapping[str, float]) -> float:
    """Return how long the steps of a run take."""
    return sum(phase.num_steps * step_seconds[str(phase.seq_len)] for phase in config.curriculum.table.phases)


def report(config: TrainConfig, seeds: Sequence[Measured]) -> dict:
    """Return the losses of each variant in bands of positions, its cost, and its differences to "mixed"."""
    short, long = config.curriculum.seq_len
    runs = make_variants(config, seeds[0], {"": Path("store")})
    longest = max(curve["length"] for curve in seeds[0][MIXED]["curves"])
    bands = {"inside_short": (1, short), "inside_long": (short + 1, long), "beyond": (long + 1, longest)}
    step_seconds = step_seconds_of(seeds[0])
    seconds = {name: seconds_of(runs[name], step_seconds) for name in VARIANTS}
    variants = {}
    for name in VARIANTS:
        curves = [find_curve(measured[name]["curves"], PLAIN, length=longest) for measured in seeds]
        losses = {band: [loss_between(curve, *ends) for curve in curves] for band, ends in bands.items()}
        losses["heldout"] = [measured[name]["loss"] for measured in seeds]
        variants[name] = {
            "num_tokens": runs[name].curriculum.table.num_tokens,
            "seconds_to_mixed": seconds[name] / seconds[MIXED],
            "losses": {band: mean_and_interval(each) for band, each in losses.items()},
            "first_rise": [curve["first_rise"] for curve in curves],
            "curve": {
                "position": [
                    (a * b) ** 0.5 for a, b in zip(curves[0]["bins"]["first"], curves[0]["bins"]["last"], strict=True)
                ],
                "loss": [
                    sum(each) / len(each) for each in zip(*(curve["bins"]["loss"] for curve in curves), strict=True)
                ],
            },
        }
    for name in VARIANTS:
        variants[name]["minus_mixed"] = {
            band: difference_and_interval(
                variants[name]["losses"][band]["values"], variants[MIXED]["losses"][band]["values"]
            )
            for band in variants[name]["losses"]
        }
    return {"bands": bands, "step_seconds": step_seconds, "variants": variants}


def describe(values: dict) -> str:
    """Return a table of the losses, and of what each variant cost."""
    bands = values["bands"]
    head = " | ".join(f"positions {first:,}-{last:,}" for first, last in bands.values())
    lines = [
        f"| variant | tokens | time to mixed | {head} | minus mixed, beyond |",
        "|---|---|---|" + "---|" * (len(bands) + 1),
    ]
    for name, each in values["variants"].items():
        losses = " | ".join(f"{each['losses'][band]['mean']:.4f}" for band in bands)
        lines.append(
            f"| {name} | {each['num_tokens']:,} | {each['seconds_to_mixed']:.2f} | {losses} | "
            f"{shown(each['minus_mixed']['beyond'], sign='+')} |"
        )
    return "\n".join(lines)


def plot(values: dict, path: Path) -> None:
    """Draw the loss by position at equal tokens and at equal time, as differences to "mixed" at the right."""
    figure, panels = new_panels(size=(11.0, 4.2), dpi=110, columns=2)
    mixed = values["variants"][MIXED]["curve"]
    for name, each in values["variants"].items():
        curve, style = each["curve"], "--" if name in (SHORT_TIME, LONG_TIME) else "-"
        panels[0].plot(curve["position"], curve["loss"], style, marker="o", markersize=2, label=name)
        difference = [a - b for a, b in zip(curve["loss"], mixed["loss"], strict=True)]
        panels[1].plot(curve["position"], difference, style, marker="o", markersize=2, label=name)
    for panel, label in zip(panels, ("loss, nats a token", "loss minus that of mixed"), strict=True):
        for length in values["config"]["curriculum"]["seq_len"]:
            panel.axvline(length, color="#888888", linestyle=":", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of context (dotted: trained lengths)")
        panel.set_ylabel(label)
        panel.legend(fontsize=8)
    write_figure(figure, path)


def _of_one_phase(config: TrainConfig, phase: int, ratio: float) -> TrainConfig:
    """Return the run with the sequences of one phase alone, on so many times the tokens."""
    table, curriculum, optimizer = config.curriculum.table, config.curriculum, config.optimizer
    per_step = table.tokens_per_step
    return dataclasses.replace(
        config,
        curriculum=CurriculumConfig(
            seq_len=(curriculum.seq_len[phase],),
            batch_size=(curriculum.batch_size[phase],),
            num_tokens=scale_phases([table.num_tokens], ratio, per_step=per_step),
        ),
        optimizer=dataclasses.replace(
            optimizer, warmup_tokens=scale_tokens(optimizer.warmup_tokens, ratio, per_step=per_step)
        ),
    )


EXPERIMENT = Experiment(
    folder=FOLDER,
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
