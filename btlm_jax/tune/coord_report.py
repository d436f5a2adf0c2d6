"""The coordinate check's results: a table, a verdict, a plot, and all numbers as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.recipe.config import TrainConfig, describe_mesh
from btlm_jax.storage.files import write_atomically
from btlm_jax.tune.coord_check import WIDTH, CaseResult, Design, coord_check

STEM = "coord_check"  # of the files


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordReport:
    """The table for a terminal, and whether every case is as expected."""

    table: str
    passed: bool


def report_coord_check(
    design: Design, *, directory: Path, devices: Sequence[Any], report_progress: Callable[[str], None]
) -> CoordReport:
    """Run the check; write coord_check.txt, .png and .json into `directory`; return the table and verdict.

    Raises:
      ValueError: as `coord_check`.
      OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    results = coord_check(design, devices=devices, report_progress=report_progress)
    table, passed = format_table(results), all(result.is_as_expected for result in results)
    write_atomically(directory / f"{STEM}.txt", table + "\n")
    write_atomically(directory / f"{STEM}.json", json.dumps(to_json(results), indent=2))
    write_plot(results, directory / f"{STEM}.png")
    return CoordReport(table=table, passed=passed)


def describe_design(design: Design, config: TrainConfig, *, num_devices: int) -> str:
    """Return what is checked of a config, and what is not as in its run."""
    model, phase = design.config.model, design.config.curriculum.table.phases[0]
    layers = f"{model.num_layers} of {config.model.num_layers} layers"
    if design.ladder != WIDTH:
        layers = f"d_model {model.d_model}"
    return (
        f"Checked: preset {config.mup.preset}, {design.ladder}s {', '.join(map(str, design.sizes))} (base width "
        f"{config.mup.base_d_model:g}), {layers}, heads {model.head_dim} wide, {model.vocab_size:,} ids, "
        f"{model.dtype}, on {num_devices} devices as {describe_mesh(config.mesh, num_devices=num_devices)}; "
        f"{phase.batch_size} x {phase.seq_len} tokens a step, {design.num_steps} steps at {design.learning_rate:g} "
        f"without warm-up, in place of the config's peak of {config.optimizer.peak_learning_rate:g} after one"
    )


def format_table(results: Sequence[CaseResult]) -> str:
    """Return one row a case, the slopes of the first case, and the verdict."""
    design, first = results[0].design, results[0]
    limits = design.limits
    lines = [
        f"Coordinate check: {design.ladder}s {', '.join(map(str, design.sizes))}, {len(design.seeds)} seeds, "
        f"{design.num_steps} steps at learning rate {design.learning_rate:g}.",
        f"Flat: slope <= {limits.flat_slope:g} and loss spread <= {limits.flat_spread:g}. "
        f"Caught: slope > {limits.broken_slope:g} or spread > {limits.broken_spread:g} nats.",
        f"{'case':<26} {'must be':<8} {'slope':>7}  {'of':<32} {'spread':>7}  {'losses':<24} verdict",
    ]
    for result in results:
        losses = " ".join(f"{loss:.2f}" for loss in result.losses)
        lines.append(
            f"{result.case.name:<26} {'flat' if result.case.is_flat else 'caught':<8} "
            f"{result.slopes[result.worst]:>+7.2f}  {result.worst:<32} {result.loss_spread:>7.2f}  {losses:<24} "
            f"{_verdict(result)}"
        )
    scatter = "with their standard error over seeds" if len(design.seeds) > 1 else "of one seed: no standard error"
    lines += ["", f"Slopes of {first.case.name!r}, {scatter}:"]
    for name, slope in first.slopes.items():
        shown = "" if first.is_judged(name) else "  (not judged)"
        error = first.errors[name]
        lines.append(f"  {name:<34} {slope:>+6.2f}{'' if error is None else f' +- {error:.2f}'}{shown}")
    hidden = [result.case.name for result in results if not result.case.is_visible]
    if hidden:
        lines += ["", f"Seen by the exact checks alone, not by activations or loss: {'; '.join(hidden)}"]
    undecided = [result.case.name for result in results if result.is_undecided]
    if undecided:
        lines.append(
            f"Within two standard errors of the limit, so not decided; give more --seeds: {', '.join(undecided)}"
        )
    wrong = [result.case.name for result in results if not result.is_as_expected]
    lines.append(f"failed: {', '.join(wrong)}" if wrong else f"passed: all {len(results)} cases are as expected")
    return "\n".join(lines)


def _verdict(result: CaseResult) -> str:
    if not result.is_as_expected:
        return "WRONG"
    return "flat" if result.case.is_flat else f"caught by {result.caught_by}"


def to_json(results: Sequence[CaseResult]) -> dict:
    """Return all that was measured and judged."""
    design = results[0].design
    return {
        "ladder": design.ladder,
        "sizes": design.sizes,
        "seeds": design.seeds,
        "steps": design.num_steps,
        "learning_rate": design.learning_rate,
        "limits": dataclasses.asdict(design.limits),
        "config": dataclasses.asdict(design.config),
        "cases": [
            {
                "name": result.case.name,
                "must_be": "flat" if result.case.is_flat else "caught",
                "is_as_expected": result.is_as_expected,
                "caught_by": result.caught_by,
                "steepest": result.worst,
                "slopes": {name: _number(value) for name, value in result.slopes.items()},
                "standard_errors": {name: _number(value) for name, value in result.errors.items()},
                "log2": {name: [[_number(x) for x in row] for row in rows] for name, rows in result.statistics.items()},
                "losses": [_number(loss) for loss in result.losses],
                "loss_spread": _number(result.loss_spread),
                "exact_error": _number(result.exact_error),
            }
            for result in results
        ],
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no others


def write_plot(results: Sequence[CaseResult], path: Path) -> None:
    """Draw log2 of each statistic against the size: a panel for each of the right ones and sp, at most three."""
    shown = [result for result in results if result.case.is_flat and not result.case.wide_heads]
    shown += [result for result in results if result.case.name == "sp"]
    shown = (shown or list(results))[:3]
    figure, panels = new_panels(size=(5.5 * len(shown), 6.5), dpi=110, columns=len(shown))
    for panel, result in zip(panels, shown, strict=True):
        for name, by_size in result.statistics.items():
            values = [sum(row) / len(row) for row in by_size]
            style = {"s": "o--", "u": "o:"}.get(name[0], "o-")  # size, update, change
            panel.plot(result.design.sizes, [x - values[0] for x in values], style, markersize=3, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(result.design.sizes, [str(size) for size in result.design.sizes])
        is_width = result.design.ladder == WIDTH
        panel.set_xlabel("width (d_model)" if is_width else "depth (layers)")
        panel.set_ylabel(f"log2(statistic), relative to the smallest {result.design.ladder}")
        panel.set_title(f"{result.case.name}: steepest slope {result.slopes[result.worst]:+.2f}")
        panel.axhline(0, color="black", linewidth=0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="x-small")
    write_figure(figure, path)
