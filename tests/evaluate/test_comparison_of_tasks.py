"""Two models on the same tasks, summaries and problems: differences worked by hand, and what is left out."""

import pytest

from btlm_jax import notices
from btlm_jax.evaluate.comparison import compare


def summaries(*scores, digest="a"):
    cases = [{"rouge1": each, "rouge2": each / 2, "rougeL": each / 4} for each in scores]
    return {"groups": [{"of": "r.jsonl", "digest": digest, "length": 2048, "of_cases": cases}]}


def tasks(of_cases):
    names = [("piqa", "acc"), ("other", "acc"), ("wikitext", "word_perplexity")]
    rows = [[name, "1.0", "none", "0", metric, "0.5", ""] for name, metric in names]
    return {"of_cases": of_cases, "tables": {"results": [["header"] * 7, *rows]}}


def code(**outcomes):
    cases = [{"task_id": name, "outcome": each} for name, its in outcomes.items() for each in its]
    return {"was_run": True, "of_cases": cases}


def test_differences_are_of_pairs():
    first = {
        "tasks": tasks({"piqa acc, none [1a]": [1, 0, 0, 1], "other acc, none [2b]": [1, 0]}),
        "summaries": summaries(0.5, 0.1), "human_eval": code(a=["passed", "failed"], b=["passed"]),
    }  # fmt: skip
    second = {
        "tasks": tasks({"piqa acc, none [1a]": [1, 1, 0, 1], "other acc, none [3c]": [1, 0]}),
        "summaries": summaries(0.7, 0.1), "human_eval": code(a=["passed", "passed"], b=["failed"]),
    }  # fmt: skip
    notices.begin(strict=())
    found = {(each["part"], each["what"]): each for each in compare(first, second)}
    piqa = found["tasks", "piqa acc, none"]
    assert (piqa["first"], piqa["second"], piqa["difference"], piqa["pairs"]) == (0.5, 0.75, 0.25, 4)
    assert piqa["interval"][0] == 0 < piqa["interval"][1]
    assert found["summaries", "r.jsonl 2,048 ROUGE-1"]["difference"] == pytest.approx(0.1)
    assert found["summaries", "r.jsonl 2,048 ROUGE-L"]["difference"] == pytest.approx(0.025)
    assert found["human_eval", "pass@1"]["difference"] == pytest.approx((0.5 - 1) / 2)
    assert ("tasks", "other acc, none") not in found and notices.counts()["not-compared"] == 2


def test_other_documents_are_left_out():
    notices.begin(strict=())
    assert compare({"summaries": summaries(0.5)}, {"summaries": summaries(0.5, digest="b")}) == []
    assert compare({"human_eval": code(a=["passed"])}, {"human_eval": code(b=["passed"])}) == []
    assert compare({"human_eval": {"was_run": False}}, {"human_eval": code(a=["passed"])}) == []
    assert notices.counts()["not-compared"] == 3
