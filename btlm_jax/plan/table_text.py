"""The table of layouts as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from btlm_jax.plan.chips import GIB
from btlm_jax.plan.layout import shown_mesh


def format_table_markdown(table: dict) -> str:
    """Return a table as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    calibrations = sorted({row["calibration"] for row in table["rows"] if row.get("calibration")})
    lines = [
        "# Layouts compiled for TPU slices",
        "",
        f"Made by `{table['made_by']}` with {versions}. Predicted, not measured on a TPU.",
        "A row is a config of this folder or, indented, another layout of its model. `btlm train` and",
        "`launch/tpu.sh` refuse what does not fit. Names with _ count chips: v5p_128 and v4_128 are what Google Cloud",
        "calls v5p-256 and v4-256, after their cores. Names after an @ are Google Cloud's: v4-8 and v5p-8 are four",
        "chips.",
        "",
        "| config | slice | layout | phase | GiB a chip | fits | step, s | MFU | HFU "
        "| GiB exchanged alone / beside work |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line for row in table["rows"] for line in _row_lines(row)]
    if calibrations:
        lines += [
            "",
            f"Steps have a central value and its range, by the calibration {', '.join(calibrations)}",
            "(docs/guide/plan.md); MFU and HFU are those of the central value, over all keys:",
            "",
        ]
        lines += [f"- {assumption}" for assumption in table["assumptions"]]
    if any(not row.get("calibration") for row in table["rows"]):
        lines += [
            "",
            "Rows marked (old) were made before the calibration: a range out of the compiler's own estimates,",
            "optimistic by up to a half, in which every exchange has a closed ring of neighbours, and the fast end",
            "skips keys. Their memory and exchanged bytes hold.",
        ]
    lines += ["", f"MFU counts {table['flops_convention']}.", ""]
    return "\n".join(lines)


def _row_lines(row: dict) -> Iterator[str]:
    name = f"`{row['name']}`" if row["is_config"] else f"&nbsp;&nbsp;{row['name']}"
    parts = {**shown_mesh(row["layout"]["mesh"]), "remat": row["layout"]["remat"]}
    layout = ", ".join(f"{key} {value}" for key, value in parts.items())
    for index, phase in enumerate(row["phases"]):
        head = f"| {name} | {row['topology']} | {layout} " if not index else "| | | "
        memory = f"{phase['needed_bytes'] / GIB:.2f} of {row['available_bytes'] / GIB:.2f}"
        shown = f"{head}| {phase['batch_size']:,} x {phase['seq_len']:,} | {memory} "
        if not phase["fits"]:
            yield f"{shown}| **no** | | | | |"
            continue
        spare = 1 - phase["needed_bytes"] / row["available_bytes"]
        yield f"{shown}| {spare:.0%} to spare | {_time_cells(phase)} | {_exchanged(phase)} |"


def _time_cells(phase: dict) -> str:
    low, high = phase["step_seconds"]
    worst, best = phase["mfu"]
    if "step_central" not in phase:
        return f"{low:.2f} to {high:.2f} (old) | {worst:.1%} to {best:.1%} | "
    return f"{phase['step_central']:.2f} ({low:.2f} to {high:.2f}) | {phase['mfu_central']:.1%} | {phase['hfu']:.1%}"


def _exchanged(phase: dict) -> str:
    by_kind: dict[str, list[float]] = {}
    for each in phase["collectives"]:
        by_kind.setdefault(each["kind"], [0.0, 0.0])[each["is_asynchronous"]] += each["bytes"] / GIB
    return ", ".join(f"{kind} {alone:.1f} / {beside:.1f}" for kind, (alone, beside) in by_kind.items())
