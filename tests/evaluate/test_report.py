"""The report: card and model card; two models side by side; and that a card of other weights stays out."""

import dataclasses
import json
import math
import shutil
import types

import numpy as np
import pytest
from support.made_up_run import run_config, write_run
from support.published_files import ORACLES

from btlm_jax import notices
from btlm_jax.cli import main
from btlm_jax.convert.to_hf import write_hf
from btlm_jax.evaluate.comparison import compare, table_of
from btlm_jax.evaluate.report import Table, write_report
from btlm_jax.evaluate.text_loss import TextLoss
from btlm_jax.hub.evaluation_card import NO_CARD, EvaluationCard, read_evaluation_card
from btlm_jax.hub.source import open_source


def part_of(seed, *, better_by, tokens=None, corpus="c"):
    """A held-out part of 40 hard and easy documents of source a and 2 of b, `better_by` nats a token below seed's."""
    rng = np.random.default_rng(7)
    counts = rng.integers(20, 90, 42) if tokens is None else tokens
    hardness = rng.normal(3.0, 0.8, 42)
    nats = counts * (hardness - better_by + np.random.default_rng(seed).normal(0, 0.01, 42))
    rows = np.stack([nats, counts, 4.0 * np.arange(1, 43)], axis=1)
    return {"corpus": corpus, "length": 8} | TextLoss(documents={"a": rows[:40], "b": rows[40:]}).to_json()


def test_paired_intervals_are_much_narrower_than_those_of_each():
    first, second = part_of(1, better_by=0.0), part_of(2, better_by=0.05)
    found = {(each["what"], each["unit"]): each for each in compare({"heldout": first}, {"heldout": second})}
    assert found.keys() == {(what, unit) for what in ("a", "b", "all") for unit in ("nats/token", "bits/byte")}
    ours = found["a", "nats/token"]
    assert ours["difference"] == pytest.approx(second["sources"]["a"]["loss"] - first["sources"]["a"]["loss"])
    low, high = ours["interval"]
    assert low < -0.05 < high < 0
    own_low, own_high = first["sources"]["a"]["loss_interval"]
    assert (high - low) < 0.1 * (own_high - own_low)
    bits = found["all", "bits/byte"]
    assert bits["second"] == pytest.approx(second["bits_per_byte"])
    text = table_of(list(found.values()), names=("A", "B")).as_text()
    assert f"{ours['difference']:+.4f} [{low:+.4f}, {high:+.4f}]" in text


def test_other_tokenizers_are_compared_by_bytes_alone_and_other_documents_not_at_all():
    first = part_of(1, better_by=0.0)
    other = part_of(1, better_by=0.0, tokens=np.arange(20, 62))
    assert {each["unit"] for each in compare({"heldout": first}, {"heldout": other})} == {"bits/byte"}
    with pytest.raises(ValueError, match="other documents"):
        compare({"heldout": first}, {"heldout": first | {"corpus": "d"}})
    notices.begin(strict=())
    assert compare({"heldout": first}, {"heldout": other | {"length": 16}})
    assert notices.counts() == {"lengths-differ": 1, "not-compared": 1}


def test_of_other_numbers_of_documents_the_first_of_each_source_are_compared():
    """As of two tokenizers, of whose tokens --tokens_per_source has 40 and 30 documents of source a."""
    rows = np.stack([np.arange(1.0, 43), np.full(42, 10), np.full(42, 40.0)], axis=1)
    longer, shorter = (
        {"corpus": "c", "length": 8} | TextLoss(documents={"a": scale * rows[:count], "b": scale * rows[40:]}).to_json()
        for scale, count in ((1, 40), (2, 30))
    )
    notices.begin(strict=())
    found = {each["what"]: each for each in compare({"heldout": longer}, {"heldout": shorter})}
    assert (found["a"]["pairs"], found["b"]["pairs"], found["all"]["pairs"]) == (30, 2, 32)
    assert found["a"]["first"] == pytest.approx(sum(range(1, 31)) / (30 * 40 * math.log(2)))
    assert notices.counts() == {"not-compared": 2}


def test_windows_and_cases_are_compared_in_pairs():
    def parts(shift, *, corpus="c", items=3.0, length=8, stream="s"):
        windows = {"nats": [30.0 + shift, 20.0 + 2 * shift], "tokens": [10, 5]}
        curve = {"length": length, "alibi": "none", "factor": 1.0, "of_windows": windows}
        cases = {"right": [0, 1, int(shift > 0)], "nats": [3.0, 0.0, 1.0 - shift], "tokens": [2, 2, 2]}
        group = {"task": "lines", "length": 64, "items": items, "cases": 3, "of_cases": cases}
        positions = {"corpus": corpus, "stream": stream, "curves": [curve]}
        return {"positions": positions, "retrieval": {"groups": [group]}}

    found = {each["what"]: each for each in compare(parts(0.0), parts(0.5))}
    assert found["8, as trained"]["difference"] == pytest.approx(1.5 / 15)
    assert found["8, as trained"]["interval"] == pytest.approx([0.05, 0.2])  # of all draws of two windows
    assert found["lines 64 accuracy"]["difference"] == pytest.approx(1 / 3)
    assert found["lines 64 answer"]["difference"] == pytest.approx(-0.5 / 3)
    notices.begin(strict=())
    assert compare(parts(0.0), parts(0.5, items=2.9, length=16)) == []
    assert notices.counts() == {"not-compared": 2}
    assert {each["part"] for each in compare(parts(0.0), parts(0.5, stream="of another tokenizer"))} == {"retrieval"}
    assert notices.counts() == {"not-compared": 3}
    with pytest.raises(ValueError, match="other documents"):
        compare(parts(0.0), parts(0.5, corpus="d"))


def test_a_table_in_markdown():
    table = Table(title="a: b", rows=(("x", "y"), ("1|2", "3")), note="n", plot="p.png")
    assert table.as_markdown() == "**a: b**\n\n| x | y |\n|---|---:|\n| 1/2 | 3 |\n\nn\n\n![a](p.png)"


@pytest.mark.slow
def test_the_card_of_an_evaluation_is_of_these_weights(token_store, tmp_path, capsys):
    workdir = tmp_path / "run"
    config = run_config(token_store, evaluation__batch_size=8)
    write_run(workdir, config, steps=(3,))
    assert read_evaluation_card(workdir, step=3) == NO_CARD
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{n} " }}\n' for n in range(40)))
    command = ["evaluate", f"--checkpoint={workdir}", f"--text={tmp_path / 'texts.jsonl'}"]
    of_positions = ["--positions", "--position_lengths=16"]
    assert main([*command, *of_positions]) == 0
    assert main([*command, "--heldout"]) == 0  # the report keeps what was measured before
    capsys.readouterr()
    folder = workdir / "evaluation" / "step-3"
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["parts"].keys() == {"heldout", "positions"}
    assert not any(key.startswith("of_") for key in report["parts"]["heldout"])
    damaged = report | {"parts": report["parts"] | {"positions": {"curves": "none"}}}
    (folder / "evaluation.json").write_text(json.dumps(damaged))
    assert main([*command, "--heldout"]) == 0
    assert notices.counts()["evaluation-again"] == 1
    assert json.loads((folder / "evaluation.json").read_text())["parts"].keys() == {"heldout"}
    assert main([*command, *of_positions]) == 0
    assert json.loads((folder / "evaluation.json").read_text())["parts"] == report["parts"]
    (folder / "evaluation.json").write_text("{")
    notices.begin(strict=())
    assert read_evaluation_card(workdir, step=3) == NO_CARD and notices.counts() == {"evaluation-again": 1}
    (folder / "evaluation.json").write_text(json.dumps(report | {"identity": "other"}))
    assert main([*command, "--heldout"]) == 0 and notices.counts() == {"evaluation-of-other": 1}
    assert json.loads((folder / "evaluation.json").read_text())["parts"].keys() == {"heldout"}
    assert main([*command, *of_positions]) == 0
    shutil.copytree(workdir / "checkpoints/3", workdir / "checkpoints/4")  # the run has gone on since
    card = read_evaluation_card(workdir, step=3)
    assert card.plots == {"positions.png": (folder / "positions.png").read_bytes()}
    assert f"{report['parts']['heldout']['loss']:.4f}" in card.text
    notices.begin(strict=())
    (folder / "evaluation.json").write_text(json.dumps(report | {"identity": "other"}))
    assert read_evaluation_card(workdir, step=3) == NO_CARD
    assert notices.counts() == {"evaluation-of-other": 1}


@dataclasses.dataclass
class MadeUp:
    """As much of a Checkpoint as a report reads."""

    name = form = identity = "made up"
    step = 0
    metadata = types.SimpleNamespace(max_length=64)


def test_what_is_not_of_the_model_and_all_documents_stays_out_of_its_card(tmp_path):
    def written(part, **settings):
        notices.begin(strict=())
        write_report(
            tmp_path, MadeUp(), {"heldout": part | {"of": "c", "length": 8, "overlap": 1, "settings": settings}}
        )
        kept = json.loads((tmp_path / "evaluation.json").read_text())["parts"]["heldout"]
        return kept["loss"], (tmp_path / "evaluation.md").read_text()

    own, small = part_of(1, better_by=0.0), part_of(1, better_by=0.5)
    assert written(small, limit=5) == (small["loss"], "") and notices.counts() == {"not-in-card": 1}
    loss, card = written(own, dtype="float32")
    assert loss == own["loss"] and f"{loss:.4f}" in card and "overlap 1 (float32)" in card
    assert written(own, dtype="float32") == (loss, card) and not notices.counts()  # the same again
    other, _ = written(part_of(2, better_by=0.0), dtype="float32")
    assert other != loss and notices.counts() == {"part-replaced": 1}
    loss, card = written(own, dtype="float32")
    assert written(small, int4=True) == (own["loss"], card) and notices.counts() == {"not-in-card": 1}


def test_a_part_that_loses_something_in_the_report_is_said(tmp_path):
    def written(**scores):
        notices.begin(strict=())
        result = {"scores": scores, "tables": {}, "settings": {}, "lm_eval": "0", "of_cases": {}}
        write_report(tmp_path, MadeUp(), {"tasks": result})
        return notices.counts()

    assert written(a={"acc": 0.5}) == written(a={"acc": 0.5}, b={"acc": 1.0}) == {}
    assert written(b={"acc": 1.0}) == written(b={"acc": 0.0}) == {"part-replaced": 1}


def test_an_export_has_the_card(tmp_path):
    source = open_source(ORACLES / "tiny")
    for folder, evaluation in (
        ("with", EvaluationCard(text="## Evaluation\n\nvery good\n", plots={"p.png": b"png"})),
        ("without", NO_CARD),
    ):
        (tmp_path / folder).mkdir()
        write_hf(
            tmp_path / folder, config=source.config, tensors=source.tensors, dtype="float32", max_shard_bytes=10**9,
            notes={}, generation_config={}, pad_token_id=None, evaluation=evaluation, report=lambda name: None,
        )  # fmt: skip
    without = (tmp_path / "without" / "README.md").read_text()
    assert (tmp_path / "with" / "README.md").read_text() == f"{without}\n## Evaluation\n\nvery good\n"
    assert (tmp_path / "with" / "p.png").read_bytes() == b"png"
    assert "Evaluation" not in without


@pytest.mark.slow
def test_two_runs_are_compared(token_store, tmp_path, capsys):
    workdir, output = tmp_path / "run", tmp_path / "out"
    write_run(workdir, run_config(token_store, evaluation__batch_size=8), steps=(3, 6))
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "text number {n}"}}\n' for n in range(5)))
    models = [f"{workdir}/checkpoints/{step}" for step in (3, 6)]
    command = ["evaluate", "--compare", *models, "--text", f"{tmp_path}/texts.jsonl", f"--output={output}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    kept = json.loads((output / "comparison.json").read_text())["differences"]
    assert f"{kept[0]['difference']:+.4f}" in said and kept[0]["pairs"] == 5
    losses = [json.loads((output / name / "evaluation.json").read_text())["parts"] for name in ("first", "second")]
    assert kept[0]["difference"] == pytest.approx(losses[1]["heldout"]["loss"] - losses[0]["heldout"]["loss"])
    assert main(["evaluate", "--compare", models[0]]) == 2
    assert "--compare A B takes two models" in capsys.readouterr().err
