"""Looking at documents: the right one by number and by id, and what dedup took for duplicates."""

import shutil

import pytest
from support.corpus_files import made_up_text, write_raw

from btlm_jax.cli import main
from btlm_jax.corpus.engine import inputs

TEXTS = [made_up_text(seed=seed) for seed in range(9)]
COPIES = [TEXTS[4] + f" and {word}" for word in ("one", "three", "sixteen")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    write_raw(folder / "raw" / "a.jsonl", TEXTS, source="A")
    write_raw(folder / "raw" / "b.jsonl", [*COPIES, TEXTS[7]], source="B")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "TASK_BYTES", 1)
        for verb, source in (("clean", "raw"), ("dedup", "clean")):
            assert main(["corpus", verb, f"--input={folder / source}", f"--output={folder / verb}", "--workers=1"]) == 0
    return folder


def show(folder, *flags, stage="clean") -> int:
    return main(["corpus", "show", f"--input={folder / stage}", *flags])


def test_a_document_by_number_and_by_id(folder, capsys):
    assert show(folder, "--number=8", "--count=2") == 0
    said = capsys.readouterr().out
    assert "document 8: a.jsonl:9, source A" in said and "document 9: b.jsonl:1, source B" in said
    assert TEXTS[8] in said and COPIES[0] in said and "document 10" not in said
    assert show(folder, "--id=b.jsonl:4") == 0
    assert f"document 12: b.jsonl:4, source B, {len(TEXTS[7]):,} characters\n{TEXTS[7]}" in capsys.readouterr().out
    assert show(folder, "--number=13") == 1 and "has the documents 0 to 12, not 13" in capsys.readouterr().err
    assert show(folder, "--id=c") == 1 and "no document of id 'c'" in capsys.readouterr().err


def test_clusters_come_largest_first_with_the_one_that_stays(folder, capsys):
    assert show(folder, "--clusters=5", f"--documents={folder / 'clean'}", "--characters=30", stage="dedup") == 0
    said = capsys.readouterr().out
    first, second = said.split("cluster of ")[1:]
    assert first.startswith("4 documents") and second.startswith("2 documents")
    assert first.count("goes: ") == 3 and first.count("stays: ") == 1 and "stays: b.jsonl:3, source B" in first
    assert "goes: a.jsonl:5, source A" in first and TEXTS[4][:30] in first and TEXTS[4][:40] not in first
    assert "a.jsonl:8" in second and "b.jsonl:4" in second and second.count("stays: ") == 1


def test_what_cannot_be_shown_is_refused(folder, capsys):
    assert show(folder, "--clusters=1", f"--documents={folder / 'clean'}") == 1
    assert "holds the stage clean; clusters are what dedup finds" in capsys.readouterr().err
    assert show(folder, "--clusters=1", f"--documents={folder / 'dedup'}", stage="dedup") == 1
    assert "was not made of" in (said := capsys.readouterr().err) and "the stage that dedup read" in said
    shutil.copytree(folder / "clean", folder / "pieces")  # as of a --data that divided the documents
    assert show(folder, "--clusters=1", f"--documents={folder / 'dedup'}", stage="dedup") == 1
    assert f"give --documents={folder / 'pieces'}" in capsys.readouterr().err
    assert show(folder, "--number=0", "--count=0") == 2 and "--count=0 must be 1 or more" in capsys.readouterr().err
    assert show(folder) == 2 and "--number=N, --id=ID or --clusters=N" in capsys.readouterr().err
    assert show(folder, "--clusters=1", stage="dedup") == 2 and "--documents=DIR" in capsys.readouterr().err
