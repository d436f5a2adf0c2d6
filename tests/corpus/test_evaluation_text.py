"""Evaluation text in documents: every form of it, every script, long and short, and what cannot be found is said."""

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_files import made_up_text

from btlm_jax import notices
from btlm_jax.cli import ERROR, main
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.engine.tasks import LocalInput, LocalTask, no_heartbeat
from btlm_jax.corpus.readers.records import read_records
from btlm_jax.corpus.stages.evaluation_text import (
    BY_SCRIPT,
    MIN_WORDS,
    PUBLISHED,
    WORDS,
    EvaluationIndex,
    index_task,
    run_hashes,
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import corpus_contamination  # noqa: E402


def units_of(text: str) -> list[tuple[str, float]]:
    """Return the words of a text and what each counts: an independent reading of the rule, character by character."""
    units, word = [], ""
    for character in text.lower() + " ":
        name = unicodedata.name(character, "")
        if character.isspace():
            weight = 0.0
        elif name.startswith(("CJK UNIFIED", "HIRAGANA LETTER", "KATAKANA LETTER")):
            weight = 0.5
        elif name.startswith(("THAI", "LAO", "KHMER", "MYANMAR")) and unicodedata.category(character)[0] != "P":
            weight = 0.25
        elif character in "+<=>^`|~$" or unicodedata.category(character)[0] == "P":
            continue
        else:
            word += character
            continue
        units += [(word, 1.0)] if word else []
        units += [(character, weight)] if weight else []
        word = ""
    return units


def runs_of(text: str) -> set[tuple[str, ...]]:
    units = units_of(text)
    runs = set()
    for begin in range(len(units)):
        total = 0.0
        for end in range(begin, len(units)):
            total += units[end][1]
            if total >= WORDS:
                runs.add(tuple(unit for unit, _ in units[begin : end + 1]))
                break
    return runs


ATOMS = [
    *"ab",
    "cd ",
    " ",
    "\n",
    "é",
    "漢",
    "字",
    "か",
    "ナ",
    "ไ",
    "ท",
    "ย",
    "ខ",
    "。",
    "、",
    "«",
    "—",
    "!",
    "x y ",
    "42",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), min_size=20, max_size=160).map("".join))
def test_runs_are_those_of_the_rule(text):
    assert len(run_hashes(text, rule=BY_SCRIPT)) == len(runs_of(text))
    words = text.lower().replace("!", "").split()
    published = {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}
    assert len(run_hashes(text, rule=PUBLISHED)) == len(published)


def index(folder, texts: list[str], *, rule: str = BY_SCRIPT) -> EvaluationIndex:
    folder.mkdir()
    path = folder / "e.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = LocalTask(index=0, inputs=(LocalInput(name="e.jsonl", path=path, sha256=""),))
    index_task(task, folder, no_heartbeat, rule=rule, key="text")
    return EvaluationIndex.load(folder, rule=rule)


def test_a_text_is_found_whole_or_by_one_run_and_not_by_less(tmp_path):
    words = made_up_text(seed=1).split()
    question = " ".join(made_up_text(seed=2).split()[:9])
    found = index(tmp_path / "by-script", [" ".join(words), question, "two words"])
    around = made_up_text(seed=3)
    for part, is_found in (
        (" ".join(words[30 : 30 + WORDS]), True),
        (" ".join(words[30 : 29 + WORDS]), False),  # a word less than a run
        (question.upper() + "?", True),
        (question.rsplit(" ", 1)[0], False),
        (question + "s", False),  # its last word is another
        ("two words", False),  # below MIN_WORDS it is no document's whole text
    ):
        assert found.is_in(f"{around}\n{part}\n{around}") is is_found, part
    assert found.is_in(" Two words. ") and not found.is_in("two words more")
    assert MIN_WORDS < len(question.split()) < WORDS
    published = index(tmp_path / "published", [" ".join(words), question], rule=PUBLISHED)
    assert published.is_in(" ".join(words[:WORDS])) and not published.is_in(f"{around} {question} {around}")


def test_chance_does_not_make_contamination(tmp_path):
    found = index(tmp_path / "index", [corpus_contamination.FORMS[form].text(1) for form in corpus_contamination.FORMS])
    for form in corpus_contamination.FORMS.values():
        assert not any(found.is_in(form.text(seed)) for seed in range(1000, 1020))


def test_contamination_in_ten_forms_is_gone(tmp_path, capsys):
    assert len(corpus_contamination.FORMS) >= 10
    left = corpus_contamination.measure(tmp_path, count=4)
    assert left == dict.fromkeys(corpus_contamination.FORMS, 0)
    # the published rule finds the forms that have 13 words between spaces, and no others
    published = corpus_contamination.measure(tmp_path / "published", count=2, rule=PUBLISHED)
    spaced = {"curly quotes", "French", "NFD", "entities", "full-width letters", "mojibake"}
    assert {form for form, count in published.items() if not count} == spaced
    assert {published[form] for form in published.keys() - spaced} == {2}


def write_stage(folder):
    (folder / "raw").mkdir()
    rows = [json.dumps({"text": made_up_text(seed=seed)}) for seed in range(40)]
    (folder / "raw" / "a.jsonl").write_text("\n".join(rows))
    assert main(["corpus", "clean", f"--input={folder / 'raw'}", f"--output={folder / 'clean'}", "--workers=1"]) == 0


def split(folder, name: str, *flags: str) -> int:
    return main(
        ["corpus", "split", f"--input={folder / 'clean'}", f"--output={folder / name}", "--workers=1",
         "--validation=0.1", "--test=0.1", *flags]
    )  # fmt: skip


def test_what_yields_no_runs_is_said(tmp_path, capsys):
    write_stage(tmp_path)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "short.txt").write_text("two words")
    (tmp_path / "evaluation" / "long.txt").write_text(made_up_text(seed=7))
    (tmp_path / "evaluation" / "data.csv").write_text("1,2")
    flag = f"--evaluation={tmp_path / 'evaluation'}"
    assert split(tmp_path, "split", flag) == 0
    said = capsys.readouterr().err
    assert "evaluation text short.txt has no text of 6 words or more" in said
    assert "1 of 2 evaluation texts have less than 6 words" in said and "data.csv for one" in said
    assert notices.counts() == {"evaluation-without-runs": 1, "evaluation-short": 1, "file-not-read": 1}
    outputs = read_stage(tmp_path / "split")["outputs"]
    texts = [record.text for output in outputs for record in read_records(tmp_path / "split" / output["file"])]
    assert made_up_text(seed=7) not in texts and len(texts) == 39
    assert split(tmp_path, "strict", flag, "--strict=evaluation-without-runs") == ERROR
    assert "--strict" in capsys.readouterr().err


def test_another_split_of_the_directory_changes_nothing_of_the_first(tmp_path, capsys):
    """Neither a later one without the evaluation texts nor one that comes while another is at work."""
    write_stage(tmp_path)
    (tmp_path / "e.txt").write_text(made_up_text(seed=7))
    assert split(tmp_path, "split", f"--evaluation={tmp_path / 'e.txt'}") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "split").rglob("*") if path.is_file()}
    assert split(tmp_path, "split") == ERROR
    assert "was begun otherwise: the input files are others" in capsys.readouterr().err
    with __import__("btlm_jax.corpus.engine.stage", fromlist=["only_command"]).only_command(
        tmp_path / "split", inputs=[]
    ):
        assert split(tmp_path, "split") == ERROR
        assert "another process is working in" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "split").rglob("*") if path.is_file()}
    assert np.load(tmp_path / "split" / "work" / "evaluation" / "runs.npy").size


@pytest.mark.parametrize("verb", ["dedup", "split", "tokenize"])
def test_a_stage_does_not_write_into_its_input(tmp_path, verb, capsys):
    write_stage(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    place = tmp_path / "clean"
    flags = [f"--tokenizer={tmp_path}"] if verb == "tokenize" else []
    assert main(["corpus", verb, f"--input={place}", f"--output={place}", "--workers=1", *flags]) == ERROR
    assert "is the input, and is not written to" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
