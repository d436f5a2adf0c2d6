"""Two models on the same documents: differences with intervals, of pairs of documents, windows or cases.

Both are resampled alike, so that what makes a document easy or hard for both drops out of the difference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from btlm_jax import notices
from btlm_jax.evaluate.bootstrap import interval_of, resampled_sums
from btlm_jax.evaluate.report import Table, alibi_name
from btlm_jax.evaluate.text_loss import BYTES, NATS, TOKENS, documents_of


def compare(first: dict[str, dict], second: dict[str, dict]) -> list[dict[str, Any]]:
    """Return the differences, second - first, of all that was measured of both, details included.

    Each is {"part", "what", "unit", "first", "second", "difference", "interval", "pairs"}; the interval is None where
    there is only one pair. Losses a token are compared where both divide the documents into as many tokens, and those
    by position where into the same ones. What cannot be compared is left out, and said.

    Raises:
      ValueError: the two were not measured on the same documents.
    """
    found = []
    for part, differences in _PARTS.items():
        if part in first and part in second:
            found += [{"part": part} | difference for difference in differences(first[part], second[part])]
    return found


def table_of(differences: list[dict[str, Any]], *, names: tuple[str, str]) -> Table:
    """Return differences as a table."""
    rows = [("", "unit", *names, "difference", "pairs")]
    for each in differences:
        low_high = "" if each["interval"] is None else " [{:+.4f}, {:+.4f}]".format(*each["interval"])
        values = (f"{each['first']:.4f}", f"{each['second']:.4f}", f"{each['difference']:+.4f}{low_high}")
        rows.append((f"{each['part']} {each['what']}", each["unit"], *values, f"{each['pairs']:,}"))
    return Table(title=f"{names[1]} compared with {names[0]}", rows=tuple(rows))


def _heldout(first: dict, second: dict) -> list[dict]:
    _check_same_documents(first, second)
    if first["length"] != second["length"]:
        notices.report(
            "lengths-differ",
            f"the first is measured in windows of {first['length']:,} tokens and the second of {second['length']:,}, "
            "as they were trained; --length gives both the same",
        )
    ours, theirs = documents_of(first), documents_of(second)
    for source in ours:  # of whose first documents as many tokens as asked for are more or fewer documents
        counts = len(ours[source]), len(theirs[source])
        if counts[0] != counts[1]:
            _report_left_out(
                f"the last {abs(counts[0] - counts[1]):,} of {max(counts):,} documents of source {source!r}",
                why="tokens_per_source has fewer of them in the tokens of one model",
            )
        ours[source], theirs[source] = ours[source][: min(counts)], theirs[source][: min(counts)]
    same_tokens = all(np.array_equal(ours[source][:, TOKENS], theirs[source][:, TOKENS]) for source in ours)
    if not same_tokens:
        _report_left_out("the loss a token", why="the two divide the texts into other numbers of tokens")
    found = []
    for unit, column, scale in (("nats/token", TOKENS, 1.0), ("bits/byte", BYTES, math.log(2))):
        if column == TOKENS and not same_tokens:
            continue
        strata = {
            source: np.stack([ours[source][:, NATS], theirs[source][:, NATS], ours[source][:, column] * scale], axis=1)
            for source in ours
        }
        found += [_difference(source, unit, [array]) for source, array in strata.items() if array[:, 2].any()]
        if len(strata) > 1:
            found.append(_difference("all", unit, list(strata.values())))
    return found


def _check_same_documents(first: dict, second: dict) -> None:
    if first["corpus"] != second["corpus"]:
        raise ValueError("the two were measured on other documents, and cannot be compared: give both the same --text")


def _positions(first: dict, second: dict) -> list[dict]:
    _check_same_documents(first, second)
    if first["stream"] != second["stream"]:
        _report_left_out("the loss by position", why="the two divide the texts into other tokens")
        return []
    theirs = {(curve["length"], curve["alibi"], curve["factor"]): curve["of_windows"] for curve in second["curves"]}
    found = []
    for curve in first["curves"]:
        own, other = curve["of_windows"], theirs.get((curve["length"], curve["alibi"], curve["factor"]))
        what = f"{curve['length']:,}, {alibi_name(curve)}"
        if other is None:
            _report_left_out(f"the loss by position at {what}", why="the two were trained at other lengths")
            continue
        array = np.array([own["nats"], other["nats"], own["tokens"]], np.float64).T
        found.append(_difference(what, "nats/token", [array]))
    return found


def _retrieval(first: dict, second: dict) -> list[dict]:
    theirs = {(group["task"], group["length"]): group for group in second["groups"]}
    found = []
    for group in first["groups"]:
        other = theirs.get((group["task"], group["length"]))
        # Another tokenizer fills the same length otherwise.
        if other is None or (other["items"], other["cases"]) != (group["items"], group["cases"]):
            _report_left_out(f"retrieval of {group['task']} at {group['length']:,}")
            continue
        for key, name, unit in (("right", "accuracy", "share"), ("nats", "answer", "nats")):
            columns = [group["of_cases"][key], other["of_cases"][key], [1] * group["cases"]]
            what = f"{group['task']} {group['length']:,} {name}"
            found.append(_difference(what, unit, [np.array(columns, np.float64).T]))
    return found


def _tasks(first: dict, second: dict) -> list[dict]:
    measured = {what.partition(" [")[0] for what in first["of_cases"]}
    for name, _, of_filter, _, metric, *_ in first["tables"]["results"][1:]:
        if (what := f"{name} {metric}, {of_filter}") not in measured:
            _report_left_out(f"the task {what}", why="its score is no mean of numbers of documents")
    found = []
    for what, values in first["of_cases"].items():
        other = second["of_cases"].get(what)
        if other is None or len(other) != len(values):
            _report_left_out(f"the task {what}")
            continue
        columns = np.array([values, other, [1.0] * len(values)]).T
        found.append(_difference(what.partition(" [")[0], "mean", [columns]))
    return found


def _summaries(first: dict, second: dict) -> list[dict]:
    theirs = {(group["digest"], group["length"]): group["of_cases"] for group in second["groups"]}
    found = []
    for group in first["groups"]:
        other = theirs.get((group["digest"], group["length"]))
        if other is None:
            _report_left_out(f"the summaries of {group['of']} at {group['length']:,}")
            continue
        for measure, name in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L")):
            pairs = zip(group["of_cases"], other, strict=True)
            columns = np.array([(own[measure], its[measure], 1.0) for own, its in pairs])
            found.append(_difference(f"{group['of']} {group['length']:,} {name}", "F1", [columns]))
    return found


def _code(first: dict, second: dict) -> list[dict]:
    if not first["was_run"] or not second["was_run"]:
        _report_left_out("HumanEval", why="the completions were not run: --run_code does")
        return []
    shares = []
    for result in (first, second):
        outcomes: dict[str, list[bool]] = {}
        for case in result["of_cases"]:
            outcomes.setdefault(case["task_id"], []).append(case["outcome"] == "passed")
        shares.append({problem: float(np.mean(passed)) for problem, passed in outcomes.items()})
    if shares[0].keys() != shares[1].keys():
        _report_left_out("HumanEval")
        return []
    columns = np.array([(share, shares[1][problem], 1.0) for problem, share in shares[0].items()])
    return [_difference("pass@1", "share", [columns])]


def _report_left_out(what: str, *, why: str = "the two have other texts there") -> None:
    notices.report("not-compared", f"not compared: {what}, as {why}")


def _difference(what: str, unit: str, strata: list[np.ndarray]) -> dict:
    """Return a difference of two ratios of sums; a stratum is [pairs, (first, second, what both are divided by)]."""
    sums, resamples = np.sum([array.sum(0) for array in strata], axis=0), resampled_sums(strata).sum(1)
    drawn = (resamples[:, 1] - resamples[:, 0]) / resamples[:, 2]
    return {
        "what": what,
        "unit": unit,
        "first": float(sums[0] / sums[2]),
        "second": float(sums[1] / sums[2]),
        "difference": float((sums[1] - sums[0]) / sums[2]),
        "interval": interval_of(drawn).to_json() if min(map(len, strata)) > 1 else None,
        "pairs": sum(map(len, strata)),
    }


_PARTS = {
    "heldout": _heldout,
    "positions": _positions,
    "retrieval": _retrieval,
    "tasks": _tasks,
    "summaries": _summaries,
    "human_eval": _code,
}
