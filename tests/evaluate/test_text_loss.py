"""Held-out loss: windows, exact counts, intervals; a run's texts against PyTorch; what is kept and said."""

import dataclasses
import json
import math
import resource

import numpy as np
import pytest
from support.made_up_run import run_config, write_run

from btlm_jax import notices
from btlm_jax.cli import main
from btlm_jax.data.store import read_manifest
from btlm_jax.evaluate import evaluation
from btlm_jax.evaluate.bootstrap import interval_of, interval_of_proportion, resampled_sums
from btlm_jax.evaluate.documents import Corpus, Document, limited, read_store, read_texts
from btlm_jax.evaluate.results import FORMAT, Results, Work
from btlm_jax.evaluate.scorer import Scores
from btlm_jax.evaluate.text_loss import TextLoss, documents_of, measure_text_loss
from btlm_jax.evaluate.windows import rolling_windows
from btlm_jax.hub import native
from btlm_jax.tokenizers.tokenizer import load_tokenizer

WILSON = (
    (0, 10, 0, 0.277532799863),
    (4, 10, 0.168180329706, 0.687326230266),
    (10, 10, 0.722467200137, 1),
    (31, 50, 0.48150446931, 0.741372106898),
)


def windows_of_the_harness(tokens, *, prefix, length, overlap):
    """lm_eval 0.4.13, utils.get_rolling_token_windows and make_disjoint_window, in the order of their definitions."""
    pairs, predicted = [], min(length, len(tokens))
    if tokens:
        pairs.append(([prefix, *tokens[: predicted - 1]], tokens[:predicted]))
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, length - overlap + 1)
        end = predicted + count
        pairs.append((tokens[end - length - 1 : end - 1], tokens[end - count : end]))
        predicted += count
    return [(context[: len(context) - (len(scored) - 1)], scored) for context, scored in pairs]


@pytest.mark.parametrize("overlap", [1, 3, 7])
@pytest.mark.parametrize("number", [0, 1, 6, 7, 8, 13, 14, 15, 50])
def test_windows_are_those_of_the_harness_and_score_every_token_once(number, overlap):
    tokens = np.arange(100, 101 + number)
    ours = [
        (tokens[begin:first].tolist(), tokens[first:end].tolist())
        for begin, first, end in rolling_windows(number, length=7, overlap=overlap)
    ]
    assert ours == windows_of_the_harness(tokens[1:].tolist(), prefix=100, length=7, overlap=overlap)
    assert [token for _, scored in ours for token in scored] == tokens[1:].tolist()
    assert all(len(context) >= overlap for context, _ in ours[1:])


def test_the_first_documents_of_each_source_are_enough():
    corpus = Corpus(documents=tuple(made_up_documents()), identity="i", description="5 documents")
    counts = [document.num_targets for document in corpus.documents]
    some = limited(corpus, tokens_per_source=counts[0] + counts[1] - 1)
    assert [document.num_targets for document in some.documents] == [counts[0], *counts[3:]]
    assert some.description == "the first 3 of 5 documents"
    assert limited(corpus, tokens_per_source=0) is limited(corpus, tokens_per_source=1000) is corpus


def test_an_overlap_that_is_no_overlap_is_refused():
    for overlap in (0, 8):
        with pytest.raises(ValueError, match=f"overlap={overlap}"):
            list(rolling_windows(20, length=7, overlap=overlap))


class CountingScorer:
    """Gives token t the log-likelihood -t, and counts how often each is scored."""

    def __init__(self):
        self.num_scored = 0

    def log_likelihoods(self, rows, *, on_scored):
        scores = [np.asarray(row.tokens[row.first :], np.float64) for row in rows]
        self.num_scored += sum(map(len, scores))
        return [Scores(log_p_T=-score, is_greedy_T=score > 0) for score in scores]


def made_up_documents():
    rng = np.random.default_rng(1)
    sizes = {"a": (5, 90, 31), "b": (1, 17)}
    return [
        Document(
            source=source, tokens=rng.integers(1, 50, n + 1), is_counted=rng.random(n) < (1.0 if n < 40 else 0.7),
            num_bytes=3 * n,
        )
        for source, lengths in sizes.items()
        for n in lengths
    ]  # fmt: skip


def test_losses_are_sums_over_counted_tokens(tmp_path):
    documents, scorer = made_up_documents(), CountingScorer()
    loss = measure_text_loss(scorer, documents, length=9, overlap=4, work=Work("heldout", None))
    assert scorer.num_scored == 5 + 90 + 31 + 1 + 17
    nats = {name: [d.tokens[1:][d.is_counted].sum() for d in documents if d.source == name] for name in "ab"}
    counts = {name: [d.is_counted.sum() for d in documents if d.source == name] for name in "ab"}
    found = loss.to_json()
    for name in "ab":
        assert found["sources"][name]["tokens"] == sum(counts[name])
        assert found["sources"][name]["loss"] == pytest.approx(sum(nats[name]) / sum(counts[name]))
    total, tokens, size = sum(map(sum, nats.values())), sum(map(sum, counts.values())), 3 * (5 + 90 + 31 + 1 + 17)
    assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, size, 5)
    assert found["loss"] == pytest.approx(total / tokens)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size)
    assert found["mean_of_sources"] == pytest.approx(np.mean([sum(nats[n]) / sum(counts[n]) for n in "ab"]))
    again = documents_of(json.loads(json.dumps(found)))
    assert all(np.array_equal(again[name], array) for name, array in loss.documents.items())
    assert found == loss.to_json()  # intervals are drawn from a fixed seed


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(3), 0
    for trial in range(200):
        tokens = rng.integers(50, 150, 60)
        nats = tokens * 2.0 + rng.normal(0, 30, 60)
        sums = resampled_sums([np.stack([nats, tokens], axis=1)], seed=trial)[:, 0]
        interval = interval_of(sums[:, 0] / sums[:, 1])
        covered += interval.low <= 2.0 <= interval.high
    assert 178 <= covered <= 198  # 95 % of 200 is 190, with a standard deviation of 3


def test_intervals_of_proportions():
    """Of scipy.stats.binomtest(number, of).proportion_ci(0.95, method="wilson"), SciPy 1.17."""
    for number, of, low, high in WILSON:
        interval = interval_of_proportion(number, of)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-9)


def test_a_source_of_one_document_has_no_interval():
    loss = TextLoss(documents={"a": np.array([[6.0, 2, 5]]), "b": np.array([[3.0, 1, 4], [9, 3, 9]])}).to_json()
    assert loss["sources"]["a"]["loss_interval"] is None is loss["loss_interval"]
    assert loss["sources"]["b"]["loss_interval"] == [3.0, 3.0]


@pytest.fixture(scope="module")
def made_up_run(token_store, tmp_path_factory):
    """The workdir of a run of random weights, with checkpoints of steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    write_run(workdir, run_config(token_store, evaluation__batch_size=8), steps=(3, 6))
    return workdir


def test_every_held_out_token_of_a_store_is_counted_once(token_store, monkeypatch, capsys):
    manifest = read_manifest(token_store)
    tokenizer = load_tokenizer(token_store, manifest.tokenizer)
    corpus = read_store(token_store, tokenizer, name="model")
    assert corpus.num_targets == manifest.splits["heldout"].num_tokens
    for name, source in manifest.splits["heldout"].sources.items():
        documents = corpus.of_source(name)
        assert len(documents) == source.num_documents
        assert sum(document.num_bytes for document in documents) == source.num_bytes
    notices.begin(strict=())
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: "x")
    monkeypatch.setattr("btlm_jax.evaluate.documents.difference", lambda first, second: "")
    read_store(token_store, tokenizer, name="model")
    num_bytes = sum(source.num_bytes for source in manifest.splits["heldout"].sources.values())
    said = f" {len(corpus.documents)} bytes back of the {num_bytes:,} of their text"
    assert said in capsys.readouterr().err and notices.counts() == {"tokenizer-lossy": 1}


def test_the_verb_measures_once_and_says_what_it_found(made_up_run, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "one two three", "source": "x"}\n{"text": ""}\nnot json\n')
    output = tmp_path / "out"
    command = [
        "evaluate",
        f"--checkpoint={made_up_run}/checkpoints/3",
        "--text",
        f"{tmp_path}/texts",
        f"--output={output}",
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "x" in said.out and "nats/token" in said.out
    assert notices.counts()["line-quarantined"] >= 1
    report = json.loads((output / "evaluation.json").read_text())
    assert (report["step"], report["parts"]["heldout"]["sources"].keys()) == (3, {"x"})
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == said.out and "done already" in again.err and "loading" not in again.err
    assert main([*command, "--overlap=5"]) == 0
    assert "loading" in capsys.readouterr().err


def test_another_store_in_the_place_of_the_run_s_is_not_measured(made_up_run, tmp_path, capsys, monkeypatch):
    def store_of_run(directory):
        return dataclasses.replace(native.store_of_run(directory), fingerprint="f00")

    monkeypatch.setattr(evaluation, "store_of_run", store_of_run)
    assert main(["evaluate", f"--checkpoint={made_up_run}", "--heldout", f"--output={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "was trained on: its fingerprint is" in said and "not f00; what it holds out may have been trained" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--text", "{folder}/nothing*"], "nothing matches"),
        (["--text", "{folder}/empty.txt"], "there is no text in"),
        (["--text", "{folder}/a.txt", "--overlap=0"], "overlap=0 is not allowed"),
        (["--text", "{folder}/a.txt", "--overlap=49"], "overlap=49 is more than the window's 24 tokens"),
        (["--text", "{folder}/a.txt", "--store={folder}"], "give one of them"),
        (["--store={folder}"], "is not a token store"),
        (["--text={folder}", "--output={folder}/out"], "so it would be read as input"),
        (["--int4"], "--int4 is for --tasks or --summaries or --human_eval, which are not given"),
        (["--no_human_eval", "--code_samples=10"], "--code_samples is for --human_eval, which is not given"),
        (["--retrieval", "--text", "{folder}/a.txt"], "--text is for --heldout or --positions, which are not given"),
        (["--heldout", "--summary_lengths=512"], "--summary_lengths is for --summaries, which is not given"),
        (["--human_eval", "--code_temperature=1"], "--code_temperature is for --code_samples of 2 and more"),
        (["--text", "{folder}/empty.txt", "--human_eval=false", "--no_int4"], "there is no text in"),
    ],
)
def test_what_cannot_be_evaluated_is_said(made_up_run, tmp_path, capsys, flags, said):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("a text")
    words = [word.format(folder=tmp_path) for word in flags]
    assert main(["evaluate", f"--checkpoint={made_up_run}", *words]) in (1, 2)
    assert said in capsys.readouterr().err


def test_progress_and_what_is_left_are_of_what_is_done(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    work = Work("heldout", None)
    work.begin([100, 300], unit_name="tokens")
    for size in (50, 50):
        now[0] += 10
        work.advance(size)
    work.add(0, [])
    now[0] += 10
    work.advance(150)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "heldout: 50 of 400 tokens (12%)"  # nothing to tell a rate from
    assert lines[1] == "heldout: 100 of 400 tokens (25%), 5/s, 1:00 left"
    assert lines[2] == "heldout: 250 of 400 tokens (62%), 10/s, 0:15 left"


def test_a_second_kind_of_units_goes_on_and_a_full_or_damaged_file_loses_nothing(tmp_path, capsys):
    path, limits = tmp_path / "part.partial", resource.getrlimit(resource.RLIMIT_FSIZE)
    work = Work("part", path)
    work.begin([1, 1], unit_name="tokens")
    work.begin([1, 1, 1, 1], unit_name="tokens")
    try:
        work.add(0, "text")
        work.add(2, "text")
        work.begin([1, 1, 1, 1], unit_name="tokens")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4, limits[1]))
        with pytest.raises(OSError, match=f"{path} cannot be written: File too large; what is in it is kept"):
            work.add(1, "long text")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        work.close()
    assert "going on" not in capsys.readouterr().err
    notices.begin(strict=())
    for damage in (b"", b"\0\0\0\n[3, 1]\n"):
        path.write_bytes(path.read_bytes() + damage)
        work = Work("part", path)
        work.begin([1, 1], unit_name="tokens")
        work.begin([1, 1, 1, 1], unit_name="tokens")
        assert "part: going on, 2 of 4 parts are done" in capsys.readouterr().err
        assert [work.done(number) for number in range(4)] == ["text", None, "text", None]
        work.add(1, "text")
        work.close()
        assert len(path.read_bytes().splitlines()) == 3
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert notices.counts() == {"evaluation-again": 1}


class LossyTokenizer:
    """Makes an id of each letter, and nothing of anything else."""

    eos_id, boundary = 0, None

    def encode_exactly(self, text):
        return [ord(letter) for letter in text if letter.isalpha()]


def test_a_text_without_tokens_is_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "1 2"}\n{"text": ""}\n')
    notices.begin(strict=())
    (document,) = read_texts([tmp_path / "a.jsonl"], LossyTokenizer()).documents
    assert document.tokens.tolist() == [0, 97, 98] and notices.counts() == {"text-empty": 2}


def test_a_loss_that_is_no_number_is_not_kept():
    class Damaged(CountingScorer):
        def log_likelihoods(self, rows, *, on_scored):
            return [Scores(log_p_T=np.full(row.num_scored, np.nan), is_greedy_T=np.zeros(1)) for row in rows]

    work, document = Work("heldout", None), made_up_documents()[0]
    with pytest.raises(FloatingPointError, match="a document of source 'a' is nan"):
        measure_text_loss(Damaged(), [document], length=9, overlap=4, work=work)
    assert work.units == []


def test_only_one_process_measures_the_same(tmp_path):
    results = Results(tmp_path, identity={"model": "m"})
    with pytest.raises(FileExistsError, match="another process"):
        results.measure("part", {}, lambda work: results.measure("part", {}, lambda work: {}))


def test_interrupted_work_goes_on(tmp_path, capsys):
    results = Results(tmp_path, identity={"model": "m"})

    def make(work):
        work.begin([1, 1, 1], unit_name="tokens")
        for number in range(3):
            if work.done(number) is None:
                calls.append(number)
                work.add(number, number * 10)
            if number == stop_after:
                raise KeyboardInterrupt
        return {"values": [work.done(number) for number in range(3)]}

    calls, stop_after = [], 1
    with pytest.raises(KeyboardInterrupt):
        results.measure("part", {"length": 5}, make)
    (partial,) = tmp_path.glob("part-*.partial")
    partial.write_bytes(partial.read_bytes() + b"[2, 2")  # cut off by a kill
    stop_after = 9
    assert results.measure("part", {"length": 5}, make) == {"values": [0, 10, 20]}
    assert calls == [0, 1, 2] and not partial.exists()
    assert results.measure("part", {"length": 5}, lambda work: 1 / 0) == {"values": [0, 10, 20]}
    (kept,) = tmp_path.glob("part-*.json")
    notices.begin(strict=())
    for damage in ("{", kept.read_text().replace(FORMAT, "another")):
        kept.write_text(damage)
        assert results.measure("part", {"length": 5}, make) == {"values": [0, 10, 20]}
    assert notices.counts() == {"evaluation-again": 2}
    calls.clear()
    results.measure("part", {"length": 6}, make)
    assert calls == [0, 1, 2]
