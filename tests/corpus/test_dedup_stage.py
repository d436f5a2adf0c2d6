"""Deduplication on disk: planted duplicates in several files; workers, order and kills change nothing."""

import json
import random
import string
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_files import contents, made_up_text, write_raw

from btlm_jax.cli import main
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.near_duplicates import lsh
from btlm_jax.corpus.near_duplicates.lsh import Clusters
from btlm_jax.corpus.readers.records import read_records
from btlm_jax.corpus.stages import dedup as deduplicating

NUM_CLUSTERS, NUM_SINGLES = 12, 20


def variants(seed: int) -> list[str]:
    """Return a text, a copy in other case and punctuation, and an edited, longer one with a Jaccard of about 0.9."""
    text = made_up_text(seed=seed, num_words=150)
    return [text, text.upper().replace(" ", ",  "), text + " " + made_up_text(seed=seed + 999, num_words=9)]


def documents() -> list[str]:
    texts = [text for seed in range(NUM_CLUSTERS) for text in variants(seed)]
    return texts + [made_up_text(seed=5_000 + seed) for seed in range(NUM_SINGLES)]


def make_cleaned(folder, texts, *, num_files=4) -> None:
    """Write texts to raw files, a task and a shard each, and clean them."""
    for number in range(num_files):
        write_raw(folder / "raw" / f"{number}.jsonl", texts[number::num_files], source=f"S{number}")
    assert main(["corpus", "clean", f"--input={folder / 'raw'}", f"--output={folder / 'clean'}", "--workers=1"]) == 0


@pytest.fixture
def cleaned(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)
    make_cleaned(tmp_path, documents())
    return tmp_path


def arguments(folder, name="dedup", *flags) -> list[str]:
    return ["corpus", "dedup", f"--input={folder / 'clean'}", f"--output={folder / name}", "--workers=1", *flags]


def kept_texts(directory) -> list[str]:
    manifest = read_stage(directory)
    return [record.text for output in manifest["outputs"] for record in read_records(directory / output["file"])]


@pytest.mark.parametrize("preset", ["strict", "slimpajama"])
def test_the_longest_of_each_cluster_stays_and_everything_is_counted(cleaned, preset, capsys):
    assert main(arguments(cleaned, "dedup", f"--preset={preset}")) == 0
    kept = kept_texts(cleaned / "dedup")
    texts = documents()
    singles = set(texts[3 * NUM_CLUSTERS :])
    found = {number for number, text in enumerate(texts) if text in set(kept)}
    longest = {3 * seed + max(range(3), key=lambda place: len(texts[3 * seed + place])) for seed in range(NUM_CLUSTERS)}
    assert singles <= set(kept)
    if preset == "strict":
        assert found == longest | set(range(3 * NUM_CLUSTERS, len(texts)))
        assert len(kept) == NUM_CLUSTERS + NUM_SINGLES
    else:  # misses some at 0.9, never the copy that is equal after normalisation
        assert longest <= found and len(kept) <= 2 * NUM_CLUSTERS + NUM_SINGLES
    totals = read_stage(cleaned / "dedup")["totals"]
    assert sum(count["documents"] for count in totals["read"].values()) == len(texts)
    assert sum(count["documents"] for count in totals["written"].values()) == len(kept)
    assert sum(count["bytes"] for count in totals["written"].values()) == sum(len(text.encode()) for text in kept)
    assert totals["dropped"] == {"near-duplicates": len(texts) - len(kept)}
    assert f"near-duplicates: {len(texts) - len(kept)}" in capsys.readouterr().out
    assert main(["corpus", "verify", f"--store={cleaned / 'dedup'}"]) == 0


def test_the_survivor_does_not_depend_on_the_order(cleaned, tmp_path):
    texts = [text for seed in range(8) for text in (variants(seed)[0], variants(seed)[0].upper())]  # equally long
    rows = []
    for seed in (1, 2, 3):
        random.Random(seed).shuffle(texts)
        folder = tmp_path / f"order{seed}"
        make_cleaned(folder, texts)
        assert main(arguments(folder)) == 0
        rows.append(sorted(kept_texts(folder / "dedup")))
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 8


def test_of_equal_texts_the_id_decides(tmp_path):
    ids = []
    for seed in (1, 2, 3):
        names = [f"id{number}" for number in range(9)]
        random.Random(seed).shuffle(names)
        folder = tmp_path / f"order{seed}"
        (folder / "raw").mkdir(parents=True)
        rows = [json.dumps({"id": name, "text": made_up_text(seed=int(name[2:]) % 3)}) for name in names]
        (folder / "raw" / "all.jsonl").write_text("\n".join(rows))
        clean = ["corpus", "clean", f"--input={folder / 'raw'}", f"--output={folder / 'clean'}", "--workers=1"]
        assert main(clean) == main(arguments(folder)) == 0
        found = read_stage(folder / "dedup")["outputs"]
        ids.append({record.id for output in found for record in read_records(folder / "dedup" / output["file"])})
    assert ids[0] == ids[1] == ids[2] and {int(name[2:]) % 3 for name in ids[0]} == {0, 1, 2}


def test_only_verified_pairs_are_dropped(tmp_path):
    """At a Jaccard of 0.6 four of ten pairs share one of 32 keys of 8, and none has 0.75 of the numbers in common."""
    texts = []
    for seed in range(40):
        text = made_up_text(seed=seed, num_words=200)
        kept = text[: 3 * len(text) // 4]
        texts += [text, kept + made_up_text(seed=seed + 500, num_words=50)]
    make_cleaned(tmp_path, texts)
    assert main(arguments(tmp_path)) == 0
    assert sorted(kept_texts(tmp_path / "dedup")) == sorted(texts)
    assert main(arguments(tmp_path, "published", "--preset=slimpajama")) == 0
    assert len(kept_texts(tmp_path / "published")) > 70


@pytest.mark.slow
def test_workers_and_partitions_change_nothing(cleaned, monkeypatch):
    assert main(arguments(cleaned)) == main(arguments(cleaned, "two", "--workers=2")) == 0
    expected = contents(cleaned / "dedup")
    assert contents(cleaned / "two") == expected
    monkeypatch.setattr(deduplicating, "PARTITION_DOCUMENTS", 10)
    monkeypatch.setattr(deduplicating, "_COMPARED", 3)
    assert main(arguments(cleaned, "ranges")) == 0
    assert kept_texts(cleaned / "ranges") == kept_texts(cleaned / "dedup")
    assert len(list((cleaned / "ranges" / "work" / "pairs").glob("pairs-*"))) == 32 * 6


KILLED = """
import os, random, signal, sys
from btlm_jax.cli import main
from btlm_jax.corpus.stages import dedup

def killed_at(left):
    def replace(source, target):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    real, os.replace = os.replace, replace
    sys.exit(main(sys.argv[1:]))

rng, codes = random.Random(3), []
while 0 not in codes:
    left = rng.randint(2, 18)
    if not (child := os.fork()):  # a process of its own, which need not import anything
        killed_at(left)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert codes[-1] in (0, -signal.SIGKILL), codes
print("kills", len(codes) - 1)
"""


@pytest.mark.slow
def test_a_dedup_that_is_killed_ten_times_gives_the_same_bytes(cleaned):
    """Kill it as it is about to give a file its name, anywhere in its four steps; the temporary file stays behind."""
    assert main(arguments(cleaned, "undisturbed")) == 0
    command = [sys.executable, "-c", KILLED, *arguments(cleaned, "killed")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 10
    found = contents(cleaned / "killed")
    assert {name: data for name, data in found.items() if not name.endswith(".tmp")} == contents(
        cleaned / "undisturbed"
    )


def test_changed_or_unfinished_input_is_refused(cleaned, capsys):
    assert main(arguments(cleaned)) == 0
    assert main(arguments(cleaned, "dedup", "--preset=slimpajama")) == 1
    assert "bands=32 then, 9 now" in capsys.readouterr().err
    shard = cleaned / "clean" / read_stage(cleaned / "clean")["outputs"][0]["file"]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + b"x")
    assert main(arguments(cleaned, "other")) == 1
    assert "is not what the stage that wrote it recorded" in capsys.readouterr().err
    assert main(["corpus", "verify", f"--store={cleaned / 'clean'}"]) == 1
    assert f"the contents of {shard.name} do not hash" in capsys.readouterr().err
    (cleaned / "clean" / "manifest.json").unlink()
    assert main(arguments(cleaned, "third")) == 1
    assert "an unfinished stage; give its command again" in capsys.readouterr().err
    assert main(arguments(cleaned, "fourth", "--preset=fast")) == 2


def chain(length: int, *, seed: int) -> list[str]:
    """Return documents of which each shares nine tenths with the next, and the first nothing with the last."""
    words = made_up_text(seed=seed, num_words=300 + 15 * length).split()
    return [" ".join(words[15 * number : 15 * number + 300]) for number in range(length)]


def grams(text: str) -> set[str]:
    text = " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
    return {text[start : start + 13] for start in range(len(text) - 12)}


def jaccard(first: str, second: str) -> float:
    return len(grams(first) & grams(second)) / len(grams(first) | grams(second))


def test_of_a_chain_stays_what_is_not_near_the_one_that_stays(tmp_path):
    texts = chain(40, seed=1) + chain(25, seed=2)
    assert jaccard(texts[0], texts[1]) > 0.85 and jaccard(texts[0], texts[39]) < 0.05
    make_cleaned(tmp_path, texts)
    assert main(arguments(tmp_path)) == 0
    kept = kept_texts(tmp_path / "dedup")
    gone = set(texts) - set(kept)
    assert all(max(jaccard(text, other) for other in kept) > 0.68 for text in gone)  # near one that stays
    assert all(jaccard(text, other) < 0.82 for text in kept for other in kept if text is not other)
    assert 65 / 8 < len(kept) < 65 / 1.5
    assert main(arguments(tmp_path, "published", "--preset=slimpajama")) == 0
    assert len(kept_texts(tmp_path / "published")) < 12  # of the published rule one of each chain that it sees stays


@pytest.mark.slow
def test_copies_among_many_fillings_of_a_template_are_found(tmp_path, monkeypatch):
    """More survivors in one cluster than rounds of comparison: the rest is divided anew, and no copy is missed."""
    monkeypatch.setattr("btlm_jax.corpus.near_duplicates.lsh.MAX_ROUNDS", 3)
    template = made_up_text(seed=9, num_words=160)
    texts = [f"{template} {made_up_text(seed=100 + number, num_words=30)}" for number in range(60)]
    make_cleaned(tmp_path, [*texts, *(f"{text} x" for text in texts[::4])])
    assert main(arguments(tmp_path)) == 0
    kept = kept_texts(tmp_path / "dedup")
    assert not any({texts[number], f"{texts[number]} x"} <= set(kept) for number in range(0, 60, 4))
    assert all(max(jaccard(text, other) for other in kept) > 0.68 for text in texts)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), count=st.integers(0, 30), rounds=st.integers(1, 5))
def test_each_document_that_goes_agrees_with_one_that_stays(data, count, rounds):
    """On any relation: chosen like a person would, best first, comparing within a component of the relation."""
    near = np.zeros((count, count), bool)
    for a, b in data.draw(st.lists(st.tuples(*[st.integers(0, max(count - 1, 0))] * 2), max_size=40 if count else 0)):
        near[a, b] = near[b, a] = True
    np.fill_diagonal(near, True)
    lengths = np.array(data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)), np.int64)
    ranks = np.array(data.draw(st.permutations(range(count))), np.int64)
    pairs = np.argwhere(np.triu(near, 1))
    clusters = Clusters(count)
    clusters.join(pairs)
    expected, best_first = np.zeros(count, bool), np.lexsort((ranks, -lengths))
    for document in best_first:
        expected[document] = not (near[document] & expected).any()
    with mock.patch.object(lsh, "MAX_ROUNDS", rounds):
        kept = lsh.verified_survivors(
            clusters.roots(np.arange(count)),
            lengths=lengths,
            ranks=ranks,
            agree=lambda first, second: near[first, second],
            pairs_among=lambda some: pairs[np.isin(pairs, some).all(axis=1)],
        )
    assert kept.tolist() == expected.tolist()
