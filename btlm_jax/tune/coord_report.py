"""The coordinate check's results as a table, a verdict and a plot."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from btlm_jax.storage.files import write_atomically
from btlm_jax.tune.coord_check import CaseResult, Design, coord_check


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordReport:
    """The table for a terminal, and whether every case is as expected."""

    table: str
    passed: bool


def report_coord_check(design: Design, *, directory: Path) -> CoordReport:
    """Run the check, write coord_check.txt and coord_check.png into `directory`, and return the table and verdict."""
    directory.mkdir(parents=True, exist_ok=True)
    results = coord_check(design)
    table = format_table(results)
    write_atomically(directory / "coord_check.txt", table + "\n")
    write_plot(results, directory / "coord_check.png")
    return CoordReport(table=table, passed=all(result.is_as_expected for result in results))


def format_table(results: Sequence[CaseResult]) -> str:
    """Return one row a case, and the verdict."""
    design = results[0].design
    lines = [
        f"Coordinate check: widths {', '.join(map(str, design.widths))}, {len(design.seeds)} seeds. "
        f"Flat: slope <= {design.flat_slope:g} and loss spread <= {design.flat_spread:g}. "
        f"Caught: slope > {design.broken_slope:g} or spread > {design.broken_spread:g} nats.",
        f"{'case':<26} {'must be':<8} {'slope':>7}  {'of':<32} {'spread':>7}  {'losses':<24} verdict",
    ]
    for result in results:
        losses = " ".join(f"{loss:.2f}" for loss in result.losses)
        lines.append(
            f"{result.case.name:<26} {'flat' if result.case.is_flat else 'caught':<8} "
            f"{result.slopes[result.worst]:>+7.2f}  {result.worst:<32} {result.loss_spread:>7.2f}  {losses:<24} "
            f"{'as expected' if result.is_as_expected else 'WRONG'}"
        )
    wrong = [result.case.name for result in results if not result.is_as_expected]
    lines.append(f"failed: {', '.join(wrong)}" if wrong else f"passed: all {len(results)} cases are as expected")
    return "\n".join(lines)


def write_plot(results: Sequence[CaseResult], path: Path) -> None:
    """Draw log2 of each statistic against the width, a panel for each of presets btlm, completep and sp present."""
    from matplotlib.figure import Figure  # here, since nothing else of the check needs it

    shown = [result for result in results if result.case.name in ("btlm", "completep", "sp")] or list(results[:1])
    figure = Figure(figsize=(5 * len(shown), 5), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, result in zip(panels, shown, strict=True):
        for name, values in result.statistics.items():
            dashed = name.startswith("size")
            relative = [value - values[0] for value in values]
            panel.plot(result.design.widths, relative, "o--" if dashed else "o-", markersize=3, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(result.design.widths, [str(width) for width in result.design.widths])
        panel.set_xlabel("width (d_model)")
        panel.set_title(f"{result.case.name}: steepest slope {result.slopes[result.worst]:+.2f}")
        panel.axhline(0, color="black", linewidth=0.5)
    panels[0].set_ylabel("log2(statistic), relative to the smallest width")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    contents = io.BytesIO()
    figure.savefig(contents, format="png", dpi=110)
    write_atomically(path, contents.getvalue())
