"""The report of an evaluation: one JSON file, and tables for a terminal and for a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from btlm_jax.evaluate.checkpoint import Checkpoint
from btlm_jax.storage.files import write_atomically

REPORT_FILE = "evaluation.json"
FORMAT = "btlm evaluation report 1"
_OF_DOCUMENTS = "of_documents"  # is in a part's own file, and not in the report


def write_report(folder: Path, checkpoint: Checkpoint, parts: dict[str, dict]) -> dict[str, Any]:
    """Write what was measured to a folder, and return it."""
    report = {
        "format": FORMAT,
        "model": checkpoint.name,
        "form": checkpoint.form,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "trained_length": checkpoint.metadata.max_length,
        "parts": {
            part: {key: value for key, value in result.items() if key != _OF_DOCUMENTS}
            for part, result in parts.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REPORT_FILE, json.dumps(report, indent=1))
    return report


def heldout_table(result: dict) -> str:
    """Return the held-out loss as a table for a terminal."""
    rows = [("source", "documents", "tokens", "nats/token", "perplexity", "bits/byte")]
    rows += [_row(name, part) for name, part in result["sources"].items()]
    if len(result["sources"]) > 1:
        rows.append(_row("all", result))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if not number else cell.rjust(width) for number, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
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
