"""The report of an evaluation: one JSON file, tables for a terminal, and a section of a model card."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from btlm_jax import __version__, notices
from btlm_jax.evaluate.checkpoint import Checkpoint
from btlm_jax.hub.evaluation_card import CARD_FILE, FORMAT, REPORT_FILE, SHA256, read_report
from btlm_jax.storage.files import hash_json, write_atomically

_DETAILS = ("of_documents", "of_windows", "of_positions", "of_cases")  # are in a part's own file, not in the report
_ITEMS = {"tasks": "scores", "summaries": "groups", "retrieval": "groups", "positions": "curves"}  # of parts, by key
_PASS = (1, 10, 100)  # k of pass@k
_ALIBI = {"none": "as trained", "dynamic": "dynamic"}
# What a part may have been measured with, as its title says it.
_SETTINGS = {
    "int4": "4-bit weights", "limit": "at most {:,} documents", "length": "length {:,}", "dtype": "{}",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a report."""

    title: str
    rows: tuple[tuple[str, ...], ...]  # the first is the header
    note: str = ""  # below it
    plot: str = ""  # file beside the report

    def as_text(self) -> str:
        """Return it for a terminal, the first column at the left, the others at the right."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = []
        for row in self.rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
        return "\n".join([self.title, *lines, *filter(None, [self.note, self.plot])])

    def as_markdown(self) -> str:
        """Return it for a model card."""
        header, *rows = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in self.rows)
        rule = f"|{'|'.join(['---', *['---:'] * (len(self.rows[0]) - 1)])}|"
        parts = [f"**{self.title}**", "\n".join([header, rule, *rows])]
        parts += [self.note] if self.note else []
        parts += [f"![{self.title.partition(':')[0]}]({self.plot})"] if self.plot else []
        return "\n\n".join(parts)


def write_report(folder: Path, checkpoint: Checkpoint, parts: dict[str, dict]) -> dict[str, Any]:
    """Write what was measured to a folder, as JSON and as a card, and return it without its details.

    Parts of an earlier report of the same weights that were not measured now stay in the files; a part that was
    measured otherwise is replaced, and that is said. A part that is of other
    weights or of some documents only (`_is_apart`) replaces none of the model's own, and is in no card.
    """
    report = {
        "format": FORMAT,
        "version": __version__,
        "model": checkpoint.name,
        "form": checkpoint.form,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "trained_length": checkpoint.metadata.max_length,
        "parts": _without_details(parts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    together = _earlier_parts(folder / REPORT_FILE, identity=checkpoint.identity)
    for part, result in report["parts"].items():
        is_apart = _is_apart(result)
        if is_apart:
            notices.report("not-in-card", f"{part} is with {_settings_text(result)}, and stays out of the model card")
        has_own = part in together and not _is_apart(together[part])
        if has_own and not is_apart and not _has_all_of(together[part], json.loads(json.dumps(result)), part):
            notices.report(
                "part-replaced",
                f"{folder / REPORT_FILE} and the card had {part} of other documents, tasks or settings, whose place "
                "this takes; its numbers stay in their own files",
            )
        if not (has_own and is_apart):
            together[part] = result
    parts = {part: together[part] for part in _TABLES if part in together}
    kept = report | {"parts": parts, SHA256: hash_json(parts)}
    write_atomically(folder / REPORT_FILE, json.dumps(kept, indent=1))
    write_atomically(folder / CARD_FILE, _card(kept))
    return report


def _has_all_of(earlier: dict, result: dict, part: str) -> bool:
    """Return whether a part's result has all that an earlier one had, such as its tasks, with the same settings."""
    if part not in _ITEMS:
        return result == earlier
    key = _ITEMS[part]
    if isinstance(earlier[key], dict):
        has_items = all(name in result[key] and result[key][name] == item for name, item in earlier[key].items())
    else:
        has_items = all(item in result[key] for item in earlier[key])
    return has_items and result["settings"] == earlier["settings"]


def _earlier_parts(path: Path, *, identity: str) -> dict[str, dict]:
    """Return the parts of an earlier report, if there is one that can be read and is of the same weights."""
    if not path.is_file():
        return {}
    try:
        earlier = read_report(path)
    except ValueError as error:
        notices.report("evaluation-again", f"{error}; what it says of other parts is left out")
        return {}
    if earlier["identity"] != identity:
        notices.report("evaluation-of-other", f"{path} was of other weights, and is replaced")
        return {}
    return earlier["parts"]


def tables_of(report: dict[str, Any]) -> list[Table]:
    """Return the tables of every part; titles have the settings that are not the model's own."""
    return [
        dataclasses.replace(table, title=f"{table.title}{f' ({text})' * bool(text)}")
        for part, result in report["parts"].items()
        for text in [_settings_text(result)]
        for table in _TABLES[part](result)
    ]


def _settings_text(result: dict) -> str:
    return ", ".join(_SETTINGS[name].format(value) for name, value in result["settings"].items())


def _is_apart(result: dict) -> bool:
    """Return whether a part is not of the model's own weights and all documents."""
    return not result["settings"].keys().isdisjoint(("int4", "limit"))


def _card(report: dict[str, Any]) -> str:
    """Return the section of a model card, "" if nothing belongs into it."""
    own = {part: result for part, result in report["parts"].items() if not _is_apart(result)}
    if not own:
        return ""
    head = (
        f"## Evaluation\n\nPut together with btlm_jax {report['version']} on "
        f"{datetime.datetime.now(datetime.UTC).date()}; intervals in brackets hold 95 %."
    )
    return "\n\n".join([head, *(table.as_markdown() for table in tables_of({"parts": own}))]) + "\n"


def _without_details(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_details(each) for key, each in value.items() if key not in _DETAILS}
    return [_without_details(each) for each in value] if isinstance(value, list) else value


def _heldout(result: dict) -> list[Table]:
    def row(name: str, part: dict) -> tuple[str, ...]:
        bits = with_interval(part, "bits_per_byte") if "bits_per_byte" in part else ""
        counts = (f"{part['documents']:,}", f"{part['tokens']:,}")
        return (name, *counts, with_interval(part, "loss"), f"{part['perplexity']:,.2f}", bits)

    rows = [("source", "documents", "tokens", "nats/token", "perplexity", "bits/byte")]
    rows += [row(name, part) for name, part in result["sources"].items()]
    note = ""
    if len(result["sources"]) > 1:
        rows.append(row("all", result))
        note = f"mean of sources: {with_interval(result, 'mean_of_sources')} nats/token"
    windows = f"windows of {result['length']:,} tokens, overlap {result['overlap']:,}"
    return [Table(title=f"held-out loss: {result['of']}, {windows}", rows=tuple(rows), note=note)]


def _positions(result: dict) -> list[Table]:
    rows = [("window", "ALiBi", "tokens", "nats/token", "rises at", "first 256", "second half")]
    for curve in result["curves"]:
        bins = list(zip(*(curve["bins"][key] for key in ("first", "last", "loss", "num_tokens")), strict=True))
        rows.append(
            (
                f"{curve['length']:,}",
                alibi_name(curve),
                f"{curve['tokens']:,}",
                with_interval(curve, "loss"),
                f"{curve['first_rise']:,}" if curve["first_rise"] else "no rise",
                _mean(part for part in bins if part[1] <= 256),
                _mean(part for part in bins if part[0] > curve["length"] // 2),
            )
        )
    title = f"loss by position: {result['of']}, in one stream"
    return [Table(title=title, rows=tuple(rows), plot=result["plot"])]


def _retrieval(result: dict) -> list[Table]:
    depths = sorted({part["depth"] for group in result["groups"] for part in group["depths"]})
    rows = [("task", "tokens", "items", "cases", "accuracy", "answer nats", *(f"at {depth:g}" for depth in depths))]
    for group in result["groups"]:
        low, high = group["accuracy_interval"]
        by_depth = {part["depth"]: f"{part['accuracy']:.0%} {part['answer_nats']:.2f}" for part in group["depths"]}
        rows.append(
            (
                group["task"],
                f"{group['length']:,}",
                f"{group['items']:,.0f}",
                f"{group['cases']:,}",
                f"{group['accuracy']:.0%} [{low:.0%}, {high:.0%}]",
                with_interval(group, "answer_nats", digits=2),
                *(by_depth.get(depth, "") for depth in depths),
            )
        )
    note = f"a number guessed at random has {result['chance_nats']:.2f} nats"
    title = "retrieval: accuracy and nats of the answer, in all and by depth (0: at the beginning)"
    return [Table(title=title, rows=tuple(rows), note=note, plot=result["plot"])]


def _tasks(result: dict) -> list[Table]:
    titles = {"results": f"tasks of lm-evaluation-harness {result['lm_eval']}", "groups": "groups of tasks"}
    return [
        Table(title=titles[column], rows=tuple(tuple(row) for row in rows)) for column, rows in result["tables"].items()
    ]


def _summaries(result: dict) -> list[Table]:
    rows: list[tuple[str, ...]] = [("documents", "number", "tokens", "cut", "ROUGE-1", "ROUGE-2", "ROUGE-L")]
    for group in result["groups"]:
        scores = (with_interval(group, measure, digits=3) for measure in ("rouge1", "rouge2", "rougeL"))
        counts = (f"{group['documents']:,}", f"{group['length']:,}", f"{group['cut_documents']:,}")
        rows.append((group["of"], *counts, *scores))
    note = "F1 with stems; cut: documents that lost their middle"
    return [Table(title="summaries, by tokens of prompt and summary", rows=tuple(rows), note=note)]


def _code(result: dict) -> list[Table]:
    rows: list[tuple[str, ...]] = [
        ("problems", "samples of each", *(f"pass@{k}" for k in _PASS if f"pass@{k}" in result))
    ]
    scores = (with_interval(result, name, digits=3) for name in rows[0][2:])
    rows.append((f"{result['problems']:,}", f"{result['samples']:,}", *scores))
    note = "" if result["was_run"] else "the completions are kept, and were not run: --run_code does"
    return [Table(title="HumanEval", rows=tuple(rows), note=note)]


_TABLES: dict[str, Callable[[dict], list[Table]]] = {
    "heldout": _heldout,
    "positions": _positions,
    "retrieval": _retrieval,
    "tasks": _tasks,
    "summaries": _summaries,
    "human_eval": _code,
}


def alibi_name(curve: dict) -> str:
    """Return how ALiBi's slopes are divided in a curve."""
    return _ALIBI.get(curve["alibi"], f"slopes / {curve['factor']:g}")


def with_interval(part: dict, name: str, *, digits: int = 4) -> str:
    """Return a number of a part with its interval, where it has one."""
    interval = part[f"{name}_interval"]
    text = f"{part[name]:.{digits}f}"
    return text if interval is None else f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _mean(bins: Iterable[tuple[int, int, float, int]]) -> str:
    """Return the loss over bins (first, last, loss, tokens)."""
    parts: Sequence[tuple[float, int]] = [(loss * count, count) for _, _, loss, count in bins]
    total = sum(count for _, count in parts)
    return f"{sum(nats for nats, _ in parts) / total:.4f}" if total else ""
