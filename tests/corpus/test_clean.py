"""Cleaning against ftfy and SlimPajama's own few lines; and what every stage promises: restarts, refusals, counts."""

import json
import re
import shutil
import string
import tracemalloc
import unicodedata
from unittest import mock

import ftfy
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_files import made_up_text, write_raw

from btlm_jax.cli import main
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.engine.tasks import LocalInput, LocalTask
from btlm_jax.corpus.near_duplicates import normalize
from btlm_jax.corpus.near_duplicates.normalize import is_shorter, normalized
from btlm_jax.corpus.readers.records import read_records
from btlm_jax.corpus.stages import clean as cleaning
from btlm_jax.corpus.stages.clean import CleanConfig, fix_unicode

PIECES = [
    "plain words ", "\n", "\r\n", "\r", "<b>", "&amp;", "&lt;i&gt;", "&eacute;", "\u201cquoted\u201d ", "schÃ¶n ",
    "â€œ", "ﬁ", "Ａ", "e\u0301", "\x1b[31m", "\x00", "\x7f", "\x85", "\u2028", "\ufeff", "\ud800", "\xa0",
    "<", "&", "漢字",
]  # fmt: skip
MIXED = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


TYPOGRAPHY = st.lists(st.sampled_from("\u2018\u2019\u201c\u201d\u2013\u2014\u2026aZ4.,$%&;<\n \t'\"éÂ£"), max_size=12)


@settings(deadline=None, max_examples=600)
@given(MIXED | st.text(max_size=40) | TYPOGRAPHY.map("".join))
def test_fixed_is_ftfy_on_the_whole_text(text):
    assert fix_unicode(text) == ftfy.fix_text(text, normalization="NFC")


def test_fixed_is_ftfy_where_html_begins_and_in_very_long_lines():
    for text in (
        "a &amp; b\nc <i> &amp; d\ne &amp; \u201cf\u201d",
        "&lt; \u201c\n<p>\n&lt; \u201c",
        "a &amp; " + "x" * 1_100_000 + "<b> &amp; \u201c\n&amp;",
        "x" * 999_999 + "e\u0301",
    ):
        assert fix_unicode(text) == ftfy.fix_text(text, normalization="NFC")


def published_normalization(text: str) -> str:
    """SlimPajama's `clean`, to_hash.py."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text.strip()).strip()


@settings(max_examples=300)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["a", "B.", " ", "\t", " ,", "\xa0", "\u2003é", "İ", "\0"])).map("".join)
)
def test_normalized_is_the_published_normalization(text):
    expected = published_normalization(text)
    assert normalized(text).tolist() == [ord(character) for character in expected]
    for than in (len(expected), len(expected) + 1):
        assert is_shorter(text, than=than) == (len(expected) < than)


@settings(max_examples=200)
@given(
    st.text(st.characters(exclude_characters="\u03a3"), max_size=40)
    | st.lists(st.sampled_from(["ab", " ", ". ", "\n", "é", "漢", "\U0001f600"])).map("".join)
)
def test_a_long_text_is_normalised_in_slices(text):
    with mock.patch.object(normalize, "_SLICE", 5):
        assert normalized(text).tolist() == [ord(character) for character in published_normalization(text)]


def test_a_slice_ends_between_words_for_a_sigma_ends_a_word():
    text = "ΑΒΣ ΑΣΑ ΣΑΣ Σ " * 3
    with mock.patch.object(normalize, "_SLICE", 5):
        assert normalized(text).tolist() == [ord(character) for character in published_normalization(text)]


def test_a_long_text_is_short_when_it_is_punctuation():
    assert is_shorter("." * 5_000 + "x" * 199, than=200) and not is_shorter("." * 5_000 + "x" * 200, than=200)


def run_clean(folder, name="clean", *flags) -> int:
    return main(["corpus", "clean", f"--input={folder / 'raw'}", f"--output={folder / name}", "--workers=1", *flags])


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A folder of three raw files of 60 documents, each a task of its own."""
    monkeypatch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)
    for number in range(3):
        texts = [made_up_text(seed=100 * number + index) for index in range(20)]
        write_raw(tmp_path / "raw" / f"part{number}.jsonl.zst", texts, source=["A", "B", "A"][number])
    return tmp_path


def test_documents_are_repaired_counted_and_described(raw):
    broken = "\u201cschÃ¶n\u201d &amp; e\u0301 " + made_up_text(seed=1)
    write_raw(raw / "raw" / "x" / "more.jsonl", [broken, "short", "." * 5_000], source="C")
    assert run_clean(raw) == 0
    manifest = read_stage(raw / "clean")
    records = [record for output in manifest["outputs"] for record in read_records(raw / "clean" / output["file"])]
    assert len(records) == 61 and records[-1].text == ftfy.fix_text(broken, normalization="NFC")
    assert unicodedata.is_normalized("NFC", records[-1].text) and records[-1].text.startswith('"schön"')
    assert records[-1].id == "x/more.jsonl:1" and records[-1].source == "C"
    totals = manifest["totals"]
    assert {source: count["documents"] for source, count in totals["read"].items()} == {"A": 40, "B": 20, "C": 3}
    assert {source: count["documents"] for source, count in totals["written"].items()} == {"A": 40, "B": 20, "C": 1}
    assert totals["written"]["C"]["bytes"] == len(records[-1].text.encode())
    assert totals["dropped"] == {"short": 2} and totals["changed"] == 1
    assert sum(totals["lengths"].values()) == 61
    assert [output["num_documents"] for output in manifest["outputs"]] == [20, 20, 20, 1]
    assert main(["corpus", "verify", f"--store={raw / 'clean'}"]) == 0


def contents(directory) -> dict:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_two_workers_give_the_bytes_of_one(raw):
    assert run_clean(raw) == run_clean(raw, "two", "--workers=2") == 0
    assert contents(raw / "clean") == contents(raw / "two")


def test_a_stage_that_failed_goes_on_and_redoes_nothing(raw, monkeypatch, capsys):
    assert run_clean(raw, "undisturbed") == 0
    real, calls = cleaning.is_shorter, []

    def full_disk(text, *, than):
        calls.append(text)
        if len(calls) == 30:  # in the middle of the second file
            raise OSError(28, "No space left on device")
        return real(text, than=than)

    monkeypatch.setattr(cleaning, "is_shorter", full_disk)
    assert run_clean(raw) == 1 and "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in (raw / "clean" / "done").iterdir()) == ["00000.json"]
    assert not list((raw / "clean").glob(".*.tmp")) and not (raw / "clean" / "manifest.json").exists()
    assert main(["corpus", "verify", f"--store={raw / 'clean'}"]) == 1
    assert "an unfinished stage; give its command again" in capsys.readouterr().err
    assert run_clean(raw) == 0 and len(calls) == 30 + 40
    assert contents(raw / "clean") == contents(raw / "undisturbed")
    assert run_clean(raw) == 0 and len(calls) == 70
    assert "done already" in capsys.readouterr().out


def test_changed_inputs_and_settings_are_refused(raw, capsys):
    assert run_clean(raw) == 0
    assert run_clean(raw, "clean", "--source=other") == 1
    assert "default_source='unnamed' then, 'other' now" in capsys.readouterr().err
    part = raw / "raw" / "part1.jsonl.zst"
    data = part.read_bytes()
    part.write_bytes(data)  # the same contents at another time are the same input
    assert run_clean(raw) == 0
    part.write_bytes(zstandard.ZstdCompressor(level=9).compress(b"{}")[:-1] + data[: len(data)])
    assert run_clean(raw) == 1 and "the input files are others" in capsys.readouterr().err
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert run_clean(raw) == 1 and "part1.jsonl.zst changed after it was processed" in capsys.readouterr().err
    part.write_bytes(data)
    assert run_clean(raw) == 0


def test_bad_lines_go_to_quarantine_and_too_many_fail(raw, capsys):
    (raw / "raw" / "bad.jsonl").write_bytes(b'{"text": null}\n')
    assert run_clean(raw) == 1
    said = capsys.readouterr().err
    assert "1 of 61 lines are bad, which is more than max_bad_rate=0.001" in said and "quarantine" in said
    (line,) = (raw / "clean" / "quarantine" / "00000.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found.pop("head") == '{"text": null}'
    assert found == {"file": "bad.jsonl", "line": 1, "offset": 0, "reason": "text is null"}
    assert run_clean(raw, "clean", "--max_bad_rate=0.02") == 0
    assert read_stage(raw / "clean")["totals"]["bad"] == {"quarantined": 1}
    where = raw / "clean" / "quarantine"
    said = "1 lines or files are bad and left out, bad.jsonl, line 1: text is null"
    assert f"{said}; {where} has all" in capsys.readouterr().err
    shutil.rmtree(where)
    assert run_clean(raw, "clean", "--max_bad_rate=0.02") == 0
    assert f"left out, which {where} does not list any more" in capsys.readouterr().err


def test_memory_does_not_grow_with_bad_lines(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"content": "of another key"}\n' * 10_000)
    config = CleanConfig(inputs=(path,), default_source="x", on_bad_file="fail", max_bad_rate=0.1)
    task = LocalTask(index=0, inputs=(LocalInput(name=path.name, path=path, sha256=""),))
    tracemalloc.start()
    result = cleaning._clean_task(task, tmp_path, lambda *counted: None, config=config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result["totals"]["bad"] == {"quarantined": 10_000} and peak < 2_000_000  # 5 MB if they were kept
    assert len((tmp_path / "quarantine" / "00000.jsonl").read_bytes().splitlines()) == 10_000


def test_a_file_cut_short_fails_or_gives_its_beginning(raw, capsys):
    part = raw / "raw" / "part1.jsonl.zst"
    part.write_bytes(part.read_bytes()[:-2])
    assert run_clean(raw) == 1
    assert "part1.jsonl.zst cannot be used: it ends in the middle" in capsys.readouterr().err
    assert run_clean(raw, "kept", "--on_bad_file=keep-prefix", "--max_bad_rate=0.1") == 0
    totals = read_stage(raw / "kept")["totals"]
    assert totals["bad"] == {"quarantined": 1} and totals["read"]["A"]["documents"] == 40


def test_the_output_may_not_be_in_the_input(raw, capsys):
    assert run_clean(raw, "raw/clean") == 1
    assert "so it would be read as input" in capsys.readouterr().err and not (raw / "raw" / "clean").exists()


def test_an_input_without_documents_is_an_error(tmp_path, capsys):
    write_raw(tmp_path / "raw" / "a.jsonl", ["short"], source="A")
    assert run_clean(tmp_path) == 1 and "nothing is left: all documents are short" in capsys.readouterr().err
    (tmp_path / "raw" / "a.jsonl").unlink()
    assert run_clean(tmp_path) == 1 and "holds no file that ends in .jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--output=x"], "--input=DIR is needed"),
        (["--input=x"], "--output=DIR is needed"),
        (["--input=x", "--output=y", "--workers=0"], "--workers=0 must be 1 or more"),
        (["--input=x", "--output=y", "--on_bad_file=guess"], "it may be fail, keep-prefix"),
        (["--input=x", "--output=y", "--max_bad_rate=2"], "max_bad_rate=2.0 must be between 0 and 1"),
        (["--input=x", "--output=y", "--workers=100000000000"], "--workers=100000000000 must be 65,536 or less"),
        (["--input=x", "--output=y", "--source=\udce9"], "--source='\\udce9' is not valid Unicode"),
        (["--input=x", "--output=y", "--text_key="], "the key of the text is empty; give its name"),
        (["--input=x", "--output=gs://y"], "--output=gs://y is a URL; a path on this machine is needed"),
    ],
)
def test_wrong_flags_are_usage_errors(capsys, flags, said):
    assert main(["corpus", "clean", *flags]) == 2 and said in capsys.readouterr().err
