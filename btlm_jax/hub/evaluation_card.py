"""The report of a model's evaluation beside its files: where it lies, how it is read, what goes into a model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from btlm_jax import notices
from btlm_jax.hub.given_model import fingerprint_of_checkpoint, fingerprint_of_model
from btlm_jax.storage.files import hash_json, read_json_object

FOLDER, REPORT_FILE, CARD_FILE = "evaluation", "evaluation.json", "evaluation.md"
FORMAT = "btlm evaluation report 2"
SHA256 = "sha256"  # of the report's parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationCard:
    """A section of a model card, in Markdown, and the plots that it shows, by file name."""

    text: str
    plots: dict[str, bytes]


NO_CARD = EvaluationCard(text="", plots={})


def evaluation_folder(directory: Path, *, step: int) -> Path:
    """Return the folder of a model's evaluation; `step` is that of a run's checkpoint, otherwise 0."""
    return directory / FOLDER / f"step-{step}" if step else directory / FOLDER


def read_report(path: Path) -> dict[str, Any]:
    """Return a report as `btlm evaluate` kept it.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not as it was written, or is of another version.
    """
    report = read_json_object(path)
    if report.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {report.get('format')!r}, and this version reads {FORMAT!r}")
    if report.get(SHA256) != hash_json(report.get("parts")):
        raise ValueError(f"{path} is not as it was written: make it again by btlm evaluate")
    return report


def read_evaluation_card(directory: Path, *, step: int) -> EvaluationCard:
    """Return the card of the evaluation of a model; NO_CARD if there is none. `step` is as in `evaluation_folder`.

    Raises:
      OSError: a file cannot be read.
    """
    folder = evaluation_folder(directory, step=step)
    report, card = folder / REPORT_FILE, folder / CARD_FILE
    if not report.is_file() or not card.is_file():
        return NO_CARD
    identity = fingerprint_of_checkpoint(directory, step) if step else fingerprint_of_model(directory)
    try:
        identity_then = read_report(report).get("identity")
    except ValueError as error:
        notices.report("evaluation-again", f"{error}; it stays out of the model card")
        return NO_CARD
    if identity_then != identity:
        notices.report("evaluation-of-other", f"{folder} is of other weights, and stays out of the model card")
        return NO_CARD
    text = card.read_text(encoding="utf-8")
    plots = {path.name: path.read_bytes() for path in sorted(folder.glob("*.png")) if f"({path.name})" in text}
    return EvaluationCard(text=text, plots=plots)
