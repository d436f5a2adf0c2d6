"""Retrieval: golden cases, what is asked for at each depth and length, and scores of a model that sees so far back."""

import re
from pathlib import Path

import numpy as np
import pytest

from btlm_jax.evaluate.plots import plot_retrieval
from btlm_jax.evaluate.report import tables_of
from btlm_jax.evaluate.results import Work
from btlm_jax.evaluate.retrieval import CHANCE_NATS, DEPTHS, encode_case, make_group, measure_retrieval
from btlm_jax.evaluate.retrieval_cases import Case, Task, make_case
from btlm_jax.evaluate.scorer import Scores

GOLDEN = Path(__file__).parents[1] / "golden" / "retrieval"


class Bytes:
    """A tokenizer whose ids are bytes, but for pairs of digits, which are one."""

    eos_id = 0

    def encode_prompt(self, text):
        return [int(part) + 1000 if part.isdigit() and len(part) == 2 else ord(part)
                for part in re.findall(r"\d\d|.", text, flags=re.DOTALL)]  # fmt: skip


class SeesBack:
    """Knows an answer if what it answers stands within so many tokens before it; otherwise gives each token 2 nats."""

    def __init__(self, reach):
        self._reach = reach

    def log_likelihoods(self, rows, *, on_scored):
        scores = []
        for row in rows:
            tokens, answer = list(row.tokens), list(row.tokens[row.first :])
            core = answer[1:-1]
            seen = tokens[max(0, row.first - self._reach) : row.first]
            knows = any(seen[at : at + len(core)] == core for at in range(len(seen)))
            count = len(answer)
            is_greedy_T = np.arange(count) < (count if knows else 1)  # the first token of an answer is easy
            scores.append(Scores(log_p_T=np.full(count, 0.0 if knows else -2.0), is_greedy_T=is_greedy_T))
        return scores


@pytest.mark.parametrize("task", Task)
def test_cases_are_golden(task):
    case = make_case(task, num_items=4, depth=0.6, seed=7)
    assert f"{case.prompt}|{case.answer}|{case.depth:.4f}\n" == (GOLDEN / f"{task}.txt").read_text()
    assert case != make_case(task, num_items=4, depth=0.6, seed=8)


@pytest.mark.parametrize("num_items", [2, 9, 400])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_line_that_is_asked_for_is_at_its_depth(num_items, depth):
    case = make_case(Task.LINES, num_items=num_items, depth=depth, seed=3)
    lines = re.findall(r"^line (\S+): REGISTER_CONTENT is (<\d+>)$", case.prompt, flags=re.MULTILINE)
    assert len(lines) == len({name for name, _ in lines}) == num_items
    (asked,) = re.findall(r"in line (\S+)\? I need the number\.\nLine \1: <REGISTER_CONTENT> is$", case.prompt)
    at = [name for name, _ in lines].index(asked)
    assert at == round(depth * (num_items - 1))
    assert case.answer == f" {lines[at][1]}"


def test_a_passkey_is_told_once_at_its_depth_and_the_first_topic_is_asked_for():
    for depth in DEPTHS:
        case = make_case(Task.PASSKEY, num_items=40, depth=depth, seed=3)
        (at,) = [match.start() for match in re.finditer(re.escape(f"The pass key is{case.answer}"), case.prompt)]
        assert case.prompt[:at].count("The grass is green") == round(40 * depth)
        assert case.prompt.count("The grass is green") == 40
    case = make_case(Task.TOPICS, num_items=20, depth=1.0, seed=3)
    topics = re.findall(r"discuss the topic of ([^<]+?)\. ", case.prompt)
    assert len(set(topics)) == 20 and case.answer == f" {topics[0]}." and case.depth == 0


@pytest.mark.parametrize("task", Task)
def test_cases_fill_their_length(task):
    sizes = {Task.LINES: 60, Task.TOPICS: 1700, Task.PASSKEY: 120}  # bytes of an item, at most
    length = 5200 if task == Task.TOPICS else 1000
    group = make_group(task, length=length, num_cases=6, seed=1, tokenizer=Bytes(), bos_id=5)
    lengths = [len(row.tokens) for row in group.rows]
    assert length - sizes[task] < min(lengths) <= max(lengths) <= length
    assert all(row.tokens[0] == 5 for row in group.rows)
    assert group.depths == ((0.0,) * 6 if task == Task.TOPICS else (*DEPTHS, DEPTHS[0]))
    assert make_group(task, length=90, num_cases=2, seed=1, tokenizer=Bytes(), bos_id=None) is None


def test_one_case_has_no_interval_and_a_loss_that_is_no_number_is_named():
    group = make_group(Task.LINES, length=1000, num_cases=1, seed=2, tokenizer=Bytes(), bos_id=None)
    assert measure_retrieval(SeesBack(5), group, work=Work("r", None))["answer_nats_interval"] is None

    class Damaged:
        def log_likelihoods(self, rows, *, on_scored):
            return [Scores(log_p_T=np.full(3, np.nan), is_greedy_T=np.zeros(3, bool)) for _ in rows]

    with pytest.raises(FloatingPointError, match="a loss of retrieval of lines at 1,000 tokens is not finite"):
        measure_retrieval(Damaged(), group, work=Work("r", None))


def test_the_scored_tokens_are_those_that_the_answer_changes():
    row = encode_case(Case(prompt="ab 1", answer="2.", depth=0), tokenizer=Bytes(), bos_id=None)
    assert (row.tokens, row.first) == ([ord("a"), ord("b"), ord(" "), 1012, ord(".")], 3)


def test_a_model_that_sees_half_of_a_text_finds_what_is_in_it(tmp_path):
    groups = []
    for length in (1000, 2000):
        group = make_group(Task.LINES, length=length, num_cases=10, seed=2, tokenizer=Bytes(), bos_id=None)
        groups.append(measure_retrieval(SeesBack(830), group, work=Work("retrieval", None)))
    near, far = groups
    assert near["accuracy"] == 1 and near["answer_nats"] == 0
    assert [part["accuracy"] for part in far["depths"]] == [0, 0, 0, 1, 1]
    assert (far["accuracy"], far["cases"]) == (0.4, 10)
    lost = [2.0 * tokens for tokens, right in zip(far["of_cases"]["tokens"], far["of_cases"]["right"], strict=True)
            if not right]  # fmt: skip
    assert far["answer_nats"] == pytest.approx(sum(lost) / 10)
    low, high = far["accuracy_interval"]
    assert low < 0.4 < high
    part = {"chance_nats": CHANCE_NATS, "plot": "retrieval.png", "groups": groups, "settings": {}}
    (made,) = tables_of({"parts": {"retrieval": part}})
    table = made.as_text()
    assert "40%" in table and "10.82 nats" in table
    plot_retrieval(groups, tmp_path / "r.png", trained_length=2048, title="made up")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
