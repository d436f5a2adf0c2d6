"""Splitting: every document on one side, nothing of the held-out or evaluation text in train, by hashes alone."""

import json
from collections import Counter

import numpy as np
import pytest
from support.corpus_files import limited_open_files, made_up_text, write_raw

from btlm_jax.cli import main
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.readers.records import read_records
from btlm_jax.corpus.stages import split as splitting
from btlm_jax.corpus.stages.contamination import HeldOut, strict_signature
from btlm_jax.corpus.stages.evaluation_text import WORDS

SOURCES = ("A", "B", "C")
TEXTS = [made_up_text(seed=seed, num_words=60) for seed in range(240)]


@pytest.fixture
def cleaned(tmp_path, monkeypatch):
    """A cleaned folder of 240 documents in 3 files, a source and a task each."""
    monkeypatch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)
    return make_cleaned(tmp_path, TEXTS)


def make_cleaned(folder, texts):
    for number, source in enumerate(SOURCES):
        write_raw(folder / "raw" / f"{number}.jsonl", texts[number::3], source=source)
    assert main(["corpus", "clean", f"--input={folder / 'raw'}", f"--output={folder / 'clean'}", "--workers=1"]) == 0
    return folder


def run_split(folder, name="split", *flags) -> int:
    return main(
        ["corpus", "split", f"--input={folder / 'clean'}", f"--output={folder / name}", "--workers=1",
         "--validation=0.1", "--test=0.05", *flags]
    )  # fmt: skip


def documents(directory) -> dict[str, list]:
    found = {"train": [], "validation": [], "test": []}
    for output in read_stage(directory)["outputs"]:
        found[output["split"]] += read_records(directory / output["file"])
    return found


def texts_of(directory, name: str) -> list[str]:
    return [record.text for record in documents(directory)[name]]


def test_every_document_is_in_one_split_and_counted(cleaned):
    assert run_split(cleaned) == 0
    found = documents(cleaned / "split")
    assert sorted(record.text for records in found.values() for record in records) == sorted(TEXTS)
    assert 12 <= len(found["validation"]) <= 36 and 4 <= len(found["test"]) <= 24
    counted = read_stage(cleaned / "split")["totals"]["splits"]
    for name, records in found.items():
        by_source = Counter(record.source for record in records)
        assert {source: count["documents"] for source, count in counted[name].items()} == by_source
        sizes = Counter()
        for record in records:
            sizes[record.source] += len(record.text.encode())
        assert {source: count["bytes"] for source, count in counted[name].items()} == sizes
    for name in ("validation", "test"):  # one file a source
        for output in read_stage(cleaned / "split")["outputs"]:
            if output["split"] == name:
                assert len({record.source for record in read_records(cleaned / "split" / output["file"])}) == 1
    assert main(["corpus", "verify", f"--store={cleaned / 'split'}"]) == 0


def test_what_is_split_already_is_not_split_or_deduplicated_again(cleaned, capsys):
    """Its held-out documents would come into train, and by the side they are on."""
    assert run_split(cleaned) == 0
    flags = [f"--input={cleaned / 'split'}", f"--output={cleaned / 'again'}", "--workers=1"]
    for verb, purpose in (("split", "split"), ("dedup", "deduplicate")):
        assert main(["corpus", verb, *flags]) == 1
        said = f"holds the stage split; {purpose} what btlm corpus clean or dedup wrote"
        assert said in capsys.readouterr().err


def test_train_is_shuffled_and_the_seed_decides(cleaned):
    assert run_split(cleaned) == run_split(cleaned, "other", "--seed=1") == 0
    order = [record.source for record in documents(cleaned / "split")["train"]]
    changes = sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert changes > len(order) / 2  # sources are mixed: by chance two thirds
    assert texts_of(cleaned / "split", "train") != texts_of(cleaned / "other", "train")
    assert set(texts_of(cleaned / "split", "test")) != set(texts_of(cleaned / "other", "test"))


def contents(directory) -> dict:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.slow
def test_workers_change_nothing_and_partitions_lose_nothing(cleaned, monkeypatch):
    monkeypatch.setattr(splitting, "GATHER_BYTES", 20_000)
    assert run_split(cleaned) == run_split(cleaned, "two", "--workers=2") == 0
    assert len(list((cleaned / "split").glob("train-*"))) >= 4
    found = documents(cleaned / "split")
    assert sorted(record.text for records in found.values() for record in records) == sorted(TEXTS)
    assert contents(cleaned / "split").keys() == contents(cleaned / "two").keys()
    assert contents(cleaned / "split") == contents(cleaned / "two")


def test_equal_texts_share_a_split_and_near_ones_leave_train(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)
    copies = [text.upper().replace(" ", " - ") for text in TEXTS[:120]]
    near = [text + " tail" for text in TEXTS[120:]]
    make_cleaned(tmp_path, TEXTS + copies + near)
    assert run_split(tmp_path) == 0
    side = {}
    for name, records in documents(tmp_path / "split").items():
        for record in records:
            side[record.text] = name
    heldout = {text for text, name in side.items() if name != "train"}
    assert all(side[text] == side[copy] for text, copy in zip(TEXTS, copies, strict=False) if text in side)
    for text, other in zip(TEXTS[120:], near, strict=True):
        if (text in heldout) != (other in heldout):  # the one in train is gone
            assert len({text, other} & side.keys()) == 1
    dropped = read_stage(tmp_path / "split")["totals"]["dropped"]["near a held-out document"]
    assert dropped == 480 - len(side) > 10


def test_evaluation_text_is_found_by_13_words(cleaned, capsys):
    words = TEXTS[7].split()
    evaluation = ["question: " + " ".join(words[20 : 20 + WORDS]).upper() + "?", " ".join(TEXTS[8].split()[:12])]
    rows = [{"id": 1, "item": {"question": text}} for text in evaluation]
    (cleaned / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--evaluation={cleaned / 'evaluation.jsonl'}", "--evaluation_rule=13-words"]
    flags.append("--evaluation_key=item.question")
    assert run_split(cleaned, "split", *flags) == 0
    everything = [record.text for records in documents(cleaned / "split").values() for record in records]
    assert sorted(everything) == sorted(set(TEXTS) - {TEXTS[7]})
    assert "has evaluation text: 1\n" in capsys.readouterr().out
    totals = read_stage(cleaned / "split")["totals"]
    assert totals["dropped"] == {"has evaluation text": 1}
    assert sum(count["documents"] for count in totals["read"].values()) == len(TEXTS)
    assert sum(count["documents"] for count in totals["written"].values()) == len(TEXTS) - 1
    (cleaned / "evaluation.jsonl").write_text('{"question": "q"}')
    assert run_split(cleaned, "other", f"--evaluation={cleaned / 'evaluation.jsonl'}") == 1
    said = "line 1: there is no text; --evaluation_key names another key, such as question"
    assert said in capsys.readouterr().err
    assert run_split(cleaned, "other", "--evaluation=") == 2
    assert "--evaluation= is empty; give a file or folder" in capsys.readouterr().err


def test_near_duplicates_are_found_among_many():
    heldout = HeldOut.index(np.stack([strict_signature(text) for text in TEXTS[:100]]))
    probes = [TEXTS[3] + " tail", TEXTS[150], TEXTS[99].upper(), TEXTS[151], TEXTS[3][: len(TEXTS[3]) // 2]]
    assert heldout.has_near_duplicate(probes).tolist() == [True, False, True, False, False]
    assert heldout.has_near_duplicate([]).tolist() == []


def test_weights_take_a_source_so_many_times(cleaned, capsys):
    assert run_split(cleaned) == 0
    assert run_split(cleaned, "weighted", "--weight=A=2.5", "--weight=C=0") == 0
    plain, weighted = (documents(cleaned / name) for name in ("split", "weighted"))
    before = Counter(record.source for record in plain["train"])
    after = Counter(record.source for record in weighted["train"])
    assert after["B"] == before["B"] and after["C"] == 0
    assert 2.25 * before["A"] < after["A"] < 2.75 * before["A"]
    times = Counter(record.text for record in weighted["train"] if record.source == "A")
    assert set(times.values()) == {2, 3}
    for name in ("validation", "test"):
        assert weighted[name] == plain[name]
    assert run_split(cleaned, "unknown", "--weight=D=2") == 1
    assert "weights name D, which is no source; there are A, B, C" in capsys.readouterr().err
    assert run_split(cleaned, "unknown", "--weight=A") == 2
    assert run_split(cleaned, "unknown", "--weight=A=-1") == 2
    assert run_split(cleaned, "unknown", "--weight=A=1", "--weight=A=0") == 2
    assert "--weight is given more than once for A" in capsys.readouterr().err


def test_shares_that_leave_nothing_are_refused(cleaned, capsys):
    assert run_split(cleaned, "split", "--test=0.7") == 2
    assert "test=0.7 must be 0 or more and less than 0.5" in capsys.readouterr().err
    assert run_split(cleaned, "none", "--weight=A=0", "--weight=B=0", "--weight=C=0") == 1
    assert "no training document is left" in capsys.readouterr().err
    assert run_split(cleaned, "few", "--validation=1e-6") == 1
    assert "validation=1e-06 holds out none of 240 documents: give a larger --validation" in capsys.readouterr().err


def test_documents_of_one_id_are_all_kept(tmp_path):
    (tmp_path / "raw").mkdir()
    rows = [json.dumps({"id": "same", "source": "A", "text": text}) for text in TEXTS]
    (tmp_path / "raw" / "all.jsonl").write_text("\n".join(rows))
    for verb, source in (("clean", "raw"), ("dedup", "clean")):
        command = ["corpus", verb, f"--input={tmp_path / source}", f"--output={tmp_path / verb}", "--workers=1"]
        assert main(command) == 0
    (tmp_path / "clean").rename(tmp_path / "cleaned")
    (tmp_path / "dedup").rename(tmp_path / "clean")
    assert run_split(tmp_path, "split", "--weight=A=2") == 0
    found = documents(tmp_path / "split")
    train = Counter(record.text for record in found["train"])
    assert set(train.values()) == {2}
    heldout = [record.text for name in ("validation", "test") for record in found[name]]
    assert sorted([*train, *heldout]) == sorted(TEXTS)


def test_a_shared_id_does_not_decide_for_all(tmp_path):
    """A fractional weight takes its share, whether ids are empty, all the same, or a few."""
    (tmp_path / "raw").mkdir()
    texts = [made_up_text(seed=seed, num_words=60) for seed in range(300)]
    rows = [json.dumps({"id": ["", "train"][seed % 2], "source": "A", "text": text}) for seed, text in enumerate(texts)]
    (tmp_path / "raw" / "all.jsonl").write_text("\n".join(rows))
    assert (
        main(["corpus", "clean", f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'clean'}", "--workers=1"]) == 0
    )
    assert run_split(tmp_path, "half", "--weight=A=0.5") == run_split(tmp_path, "more", "--weight=A=1.5") == 0
    half, more = (Counter(texts_of(tmp_path / name, "train")) for name in ("half", "more"))
    assert 95 < len(half) < 160 and set(half.values()) == {1}
    assert set(more.values()) == {1, 2} and {text for text, count in more.items() if count == 2} == set(half)
    totals = read_stage(tmp_path / "half")["totals"]
    num_heldout = sum(len(texts_of(tmp_path / "half", name)) for name in ("validation", "test"))
    read = sum(count["documents"] for count in totals["read"].values())
    assert totals["dropped"] == {"weight of the source": read - len(half) - num_heldout}


def test_documents_that_get_lost_between_the_steps_are_an_error(cleaned, capsys, monkeypatch):
    """The step that gathers a part's documents counts them: a file that is gone is not one that never was."""
    gather = splitting._documents

    def lose(folder, *, part, **rest):
        if part.startswith("train"):
            next(folder.glob("train-00000-of-00001*")).unlink()
        return gather(folder, part=part, **rest)

    monkeypatch.setattr(splitting, "_documents", lose)
    assert run_split(cleaned) == 1
    said = capsys.readouterr().err
    assert "documents of train-00000: a file is missing or cut short; give the command again" in said
    monkeypatch.setattr(splitting, "_documents", gather)
    assert run_split(cleaned) == run_split(cleaned, "whole") == 0
    assert contents(cleaned / "split") == contents(cleaned / "whole")
    totals = read_stage(cleaned / "split")["totals"]
    done = next((cleaned / "split/done").iterdir())  # as the version before wrote it, which counted there again
    record = json.loads(done.read_text())
    record["result"]["totals"]["read"] = totals["read"]
    done.write_text(json.dumps(record))
    (cleaned / "split/manifest.json").unlink()
    assert run_split(cleaned) == 0 and read_stage(cleaned / "split")["totals"] == totals


def test_as_many_sources_as_documents_need_few_open_files(tmp_path, capsys, monkeypatch):
    (tmp_path / "raw").mkdir()
    rows = [json.dumps({"source": f"https://site/{seed}", "text": text}) for seed, text in enumerate(TEXTS[:120])]
    (tmp_path / "raw" / "all.jsonl").write_text("\n".join(rows))
    assert (
        main(["corpus", "clean", f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'clean'}", "--workers=1"]) == 0
    )
    monkeypatch.setattr(splitting, "MANY_SOURCES", 100)
    with limited_open_files(20):
        assert run_split(tmp_path, "split", "--validation=0.3", "--test=0.3") == 0
    found = documents(tmp_path / "split")
    assert sorted(record.text for records in found.values() for record in records) == sorted(TEXTS[:120])
    assert len(found["test"]) > 20
    assert "has 120 sources" in capsys.readouterr().err
