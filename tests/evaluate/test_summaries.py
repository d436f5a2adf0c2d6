"""Summaries: prompts, what is cut out of documents, ROUGE worked by hand, and the mean over documents."""

import json

import numpy as np
import pytest

pytest.importorskip("rouge_score")
from btlm_jax.evaluate.results import Work  # noqa: E402
from btlm_jax.evaluate.summaries import (  # noqa: E402
    TOKENS_OF_ANSWER,
    TOKENS_OF_SUMMARY,
    Case,
    cut_middle,
    measure_summaries,
    prompt_of,
    read_cases,
    read_files,
    rouge,
)


class OneIdACharacter:
    """A tokenizer whose ids are the characters' code points."""

    def encode(self, text):
        return [ord(character) for character in text]


def text_of(ids):
    return "".join(map(chr, ids))


class Echo:
    """Writes the words that it is given, in order of the jobs."""

    def __init__(self, *texts):
        self.texts, self.jobs = list(texts), []

    def write(self, jobs):
        self.jobs += jobs
        for job in jobs:
            yield job.number, self.texts[job.number]


REPORT = Case(document="abcdefghij" * 100, question="", references=("the cat sat on the mat",))
MEETING = Case(document="a: hello\nb: bye", question="Who left?", references=("b", "B left"))


def test_a_document_that_fits_is_whole():
    ids, num_cut = prompt_of(MEETING, OneIdACharacter(), length=2048)
    assert text_of(ids) == "a: hello\nb: bye\n\nQuestion: Who left?\nSummary:" and num_cut == 0
    ids, _ = prompt_of(MEETING, OneIdACharacter(), length=2048, bos_id=7)
    assert ids[0] == 7 and text_of(ids[1:2]) == "a"


def test_a_long_document_loses_its_middle_and_leaves_room_for_the_summary():
    ids, num_cut = prompt_of(REPORT, OneIdACharacter(), length=1000)
    assert len(ids) == 1000 - TOKENS_OF_SUMMARY
    document = text_of(ids).removesuffix("\n\nSummary:")
    room = 1000 - TOKENS_OF_SUMMARY - len("\n\nSummary:")
    assert document == REPORT.document[: -(-room // 2)] + REPORT.document[-(room // 2) :]
    assert num_cut == len(REPORT.document) - room


@pytest.mark.parametrize(
    ("room", "kept"), [(2, "aj"), (3, "abj"), (4, "abij"), (9, "abcdefghj"[:5] + "ghij"), (10, "abcdefghij")]
)
def test_the_middle_is_cut_out(room, kept):
    assert text_of(cut_middle([ord(letter) for letter in "abcdefghij"], room)) == kept


def test_files_of_one_name_are_all_read(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(json.dumps({"document": folder, "summary": "s"}))
    first, second = (tmp_path / folder / "test.jsonl" for folder in ("a", "b"))
    found = read_files([first, second, first])
    assert {name: [case.document for case in cases] for name, cases in found.items()} == {
        str(first): ["a"], str(second): ["b"],
    }  # fmt: skip
    assert read_files([first, first]).keys() == {"test.jsonl"}


def test_no_room_for_a_document():
    with pytest.raises(
        ValueError, match=f"length=260 leaves no room for a document: the summary takes {TOKENS_OF_ANSWER}"
    ):
        prompt_of(MEETING, OneIdACharacter(), length=260)


@pytest.mark.parametrize(
    ("summary", "references", "expected"),
    [
        # 4 of 6 words, 1 of 5 pairs, "the cat on mat" in order
        ("the cat lay on a mat", ["the cat sat on the mat"], [4 / 6, 1 / 5, 4 / 6]),
        # precision 2 / 2, recall 2 / 4: F1 2/3; 1 of 1 pairs and 1 of 3: 1/2
        ("b c", ["a b c d"], [2 / 3, 1 / 2, 2 / 3]),
        # the words are the same, their order is not
        ("c b a", ["a b c"], [1.0, 0.0, 1 / 3]),
        # stems: running, runs -> run
        ("she runs", ["she running"], [1.0, 1.0, 1.0]),
        # of two references the nearer one
        ("b c", ["x y", "b c"], [1.0, 1.0, 1.0]),
        ("", ["a b"], [0.0, 0.0, 0.0]),
    ],
)
def test_rouge_worked_by_hand(summary, references, expected):
    np.testing.assert_allclose(rouge(summary, references), expected)


def test_the_mean_is_over_documents(tmp_path):
    writer = Echo("the cat lay on a mat", "b")
    work = Work("summaries", tmp_path / "work")
    settings = {"length": 2048, "bos_id": None}
    found = measure_summaries(writer, OneIdACharacter(), [REPORT, MEETING], work=work, **settings)
    work.close()
    assert [job.num_tokens for job in writer.jobs] == [TOKENS_OF_SUMMARY, TOKENS_OF_ANSWER]
    assert found["rouge1"] == pytest.approx((4 / 6 + 1) / 2) and found["rouge2"] == pytest.approx((1 / 5 + 0) / 2)
    assert found["rouge1_interval"] == pytest.approx([4 / 6, 1])
    assert (found["documents"], found["cut_documents"]) == (2, 0)
    again = measure_summaries(
        Echo(), OneIdACharacter(), [REPORT, MEETING], work=Work("s", tmp_path / "work"), **settings
    )
    assert again == found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"document": "d", "summary": "s"}, Case(document="d", question="", references=("s",))),
        ({"document": "d", "query": "q", "summary": "s"}, Case(document="d", question="q", references=("s",))),
        (
            {"context": "d", "input": "q", "answers": ["s", "t"]},
            Case(document="d", question="q", references=("s", "t")),
        ),
        ({"report": "d\u2028e", "summary": "s"}, Case(document="d\u2028e", question="", references=("s",))),
        ({"id": 1, "input": "d", "output": "s"}, Case(document="d", question="", references=("s",))),
    ],
)
def test_lines_of_several_data_sets(tmp_path, row, expected):
    (tmp_path / "cases.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n")
    assert read_cases(tmp_path / "cases.jsonl") == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"document": "d"}', "line 1 has the keys document; needed are a document and its summary"),
        ('{"document": " ", "summary": "s"}', "line 1: document must be text, and not empty"),
        ('{"document": "d", "summary": []}', "line 1: summary is empty"),
        ("[1]", "line 1"),
        (b'{"document": "\xff", "summary": "s"}', "line 1 is not valid JSON"),
        ('{"document": "\\ud800", "summary": "s"}', "line 1: document must be text"),
        ("", "has no documents"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "cases.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_cases(tmp_path / "cases.jsonl")
