"""The report of an evaluation: one JSON file, and tables for a terminal and for a model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from btlm_jax.evaluate.checkpoint import Checkpoint
from btlm_jax.storage.files import write_atomically

REPORT_FILE = "evaluation.json"
FORMAT = "btlm evaluation report 1"
_DETAILS = ("of_documents", "of_windows", "of_positions", "of_cases")  # are in a part's own file, not in the report


def write_report(folder: Path, checkpoint: Checkpoint, parts: dict[str, dict]) -> dict[str, Any]:
    """Write what was measured to a folder, and return it."""
    report = {
        "format": FORMAT,
        "model": checkpoint.name,
        "form": checkpoint.form,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "trained_length": checkpoint.metadata.max_length,
        "parts": _without_details(parts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REPORT_FILE, json.dumps(report, indent=1))
    return report


def _without_details(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_details(each) for key, each in value.items() if key not in _DETAILS}
    return [_without_details(each) for each in value] if isinstance(value, list) else value


def tables(report: dict[str, Any]) -> str:
    """Return every part as a table for a terminal."""
    made = {"heldout": heldout_table, "positions": positions_table, "retrieval": retrieval_table}
    return "\n\n".join(made[part](result) for part, result in report["parts"].items() if part in made)


def positions_table(result: dict) -> str:
    """Return the curves of loss by position as a table for a terminal."""
    names = {"none": "as trained", "dynamic": "dynamic"}
    rows = [("window", "ALiBi", "tokens", "nats/token", "rises at", "first 256", "last quarter")]
    for curve in result["curves"]:
        bins = list(zip(*(curve["bins"][key] for key in ("first", "last", "loss", "num_tokens")), strict=True))
        rows.append(
            (
                f"{curve['length']:,}",
                names.get(curve["alibi"], f"slopes / {curve['factor']:g}"),
                f"{curve['tokens']:,}",
                _with_interval(curve, "loss"),
                f"{curve['first_rise']:,}" if curve["first_rise"] else "no rise",
                _mean(part for part in bins if part[1] <= 256),
                _mean(part for part in bins if part[0] > curve["length"] * 3 // 4),
            )
        )
    return "\n".join([f"loss by position: {result['of']}, in one stream; {result['plot']}", *_aligned(rows)])


def retrieval_table(result: dict) -> str:
    """Return retrieval as a table for a terminal."""
    depths = sorted({part["depth"] for group in result["groups"] for part in group["depths"]})
    rows = [("task", "tokens", "items", "cases", "accuracy", "answer nats", *(f"at {depth:g}" for depth in depths))]
    for group in result["groups"]:
        low, high = group["accuracy_interval"]
        by_depth = {part["depth"]: part for part in group["depths"]}
        rows.append(
            (
                group["task"],
                f"{group['length']:,}",
                f"{group['items']:,.0f}",
                f"{group['cases']:,}",
                f"{group['accuracy']:.0%} [{low:.0%}, {high:.0%}]",
                _with_interval(group, "answer_nats"),
                *(_at_depth(by_depth[depth]) if depth in by_depth else "" for depth in depths),
            )
        )
    chance = f"a number guessed at random has {result['chance_nats']:.2f} nats"
    head = f"retrieval, by depth accuracy and nats of the answer ({chance}); {result['plot']}"
    return "\n".join([head, *_aligned(rows)])


def _at_depth(part: dict) -> str:
    return f"{part['accuracy']:.0%} {part['answer_nats']:.2f}"


def _mean(bins: Iterable[tuple[int, int, float, int]]) -> str:
    """Return the loss over bins (first, last, loss, tokens)."""
    parts = [(loss * count, count) for _, _, loss, count in bins]
    total = sum(count for _, count in parts)
    return f"{sum(nats for nats, _ in parts) / total:.4f}" if total else ""


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines, the first column at the left, the others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines


def heldout_table(result: dict) -> str:
    """Return the held-out loss as a table for a terminal."""
    rows = [("source", "documents", "tokens", "nats/token", "perplexity", "bits/byte")]
    rows += [_row(name, part) for name, part in result["sources"].items()]
    if len(result["sources"]) > 1:
        rows.append(_row("all", result))
    lines = _aligned(rows)
    if len(result["sources"]) > 1:
        lines.append(f"mean of sources: {_with_interval(result, 'mean_of_sources')} nats/token")
    head = f"held-out loss: {result['of']}, windows of {result['length']:,} tokens, overlap {result['overlap']:,}"
    return "\n".join([head, *lines])


def _row(name: str, part: dict) -> tuple[str, ...]:
    return (
        name,
        f"{part['documents']:,}",
        f"{part['tokens']:,}",
        _with_interval(part, "loss"),
        f"{part['perplexity']:,.2f}",
        _with_interval(part, "bits_per_byte") if "bits_per_byte" in part else "",
    )


def _with_interval(part: dict, name: str) -> str:
    interval = part[f"{name}_interval"]
    return f"{part[name]:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
