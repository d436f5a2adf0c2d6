"""The tables of stats, and the whole way from raw files through a tokenizer of its own to a store that trains."""

import unittest.mock
from collections import Counter

import jax
import numpy as np
import pytest
from support import loop_run
from support.corpus_files import made_up_text, write_raw

from btlm_jax.cli import main
from btlm_jax.corpus.inspect import charts
from btlm_jax.data import store
from btlm_jax.data.reader import open_store
from btlm_jax.data.verify import verify
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import evaluation_sharding
from btlm_jax.train import loop
from btlm_jax.train.finish import heldout_batches

TEXTS = [made_up_text(seed=seed, num_words=40 + 8 * (seed % 5)) for seed in range(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder in which every stage has run, a tokenizer of 400 pieces included."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, source in enumerate(("books", "web")):
        texts = TEXTS[number::2] + (TEXTS[2:22:2] if source == "web" else [])
        write_raw(folder / "raw" / f"{number}.jsonl.zst", texts, source=source)

    def run(verb, source, output, *flags) -> None:
        assert main(["corpus", verb, f"--input={folder / source}", f"--output={folder / output}", *flags]) == 0

    run("clean", "raw", "clean", "--workers=1")
    run("dedup", "clean", "dedup", "--workers=1")
    run("split", "dedup", "split", "--workers=1", "--validation=0.1", "--test=0.05")
    run("tokenizer", "split", "tokenizer", "--vocab_size=400")
    run("tokenize", "split", "store", "--workers=1", f"--tokenizer={folder / 'tokenizer'}", "--block_len=48")
    return folder


def shown(capsys, directory) -> list[list[str]]:
    assert main(["corpus", "stats", f"--input={directory}"]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_pictures_are_drawn_for_stages_and_stores(corpus, tmp_path):
    for name, pictures in (
        ("clean", {"bytes.png", "lengths.png"}),
        ("dedup", {"bytes.png", "lengths.png", "clusters.png"}),
        ("store", {"tokens-train.png", "tokens-heldout.png", "tokens-test.png"}),
    ):
        for target in (tmp_path / name, tmp_path / "again" / name):
            assert main(["corpus", "stats", f"--input={corpus / name}", f"--plots={target}"]) == 0
        drawn = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert drawn.keys() == pictures
        assert drawn == {path.name: path.read_bytes() for path in (tmp_path / "again" / name).iterdir()}
        assert all(data.startswith(b"\x89PNG") for data in drawn.values())
    stage = charts.read_stage(corpus / "dedup")["totals"]
    with unittest.mock.patch.object(charts, "_write", lambda figure, path: figure.axes[0]):
        lengths = charts._histogram(tmp_path, stage["lengths"], label="x")
        shares = charts._bars(tmp_path, {"web": 30, "books": 10}, label="x")
    heights = {
        text.get_text(): bar.get_height() for text, bar in zip(lengths.get_xticklabels(), lengths.patches, strict=True)
    }
    assert heights == {f"{int(size):,}": count for size, count in stage["lengths"].items()}
    assert [bar.get_width() for bar in shares.patches] == [30, 10]
    assert [text.get_text() for text in shares.texts] == ["30 (75.0 %)", "10 (25.0 %)"]


def test_stats_of_stages_and_stores_are_the_counts(corpus, capsys):
    rows = shown(capsys, corpus / "clean")
    sizes = [sum(len(text) for text in TEXTS[0::2]), sum(len(text) for text in TEXTS[1::2] + TEXTS[2:22:2])]
    for name, count, size in zip(("books", "web"), (150, 160), sizes, strict=True):
        share = f"{100 * size / sum(sizes):.1f}"
        assert [
            name,
            str(count),
            f"{size / 1e6:.2f}",
            str(count),
            f"{size / 1e6:.2f}",
            share,
            "%",
            "100.0",
            "%",
        ] in rows
    bars = {row[0]: row[1:] for row in rows if len(row) == 3 and row[2].startswith("#")}
    lengths = [1 << (len(text) - 1).bit_length() for text in TEXTS + TEXTS[2:22:2]]
    assert {size: int(count) for size, (count, _) in bars.items()} == {
        f"{size:,}": lengths.count(size) for size in set(lengths)
    }
    assert max(len(bar) for _, bar in bars.values()) == 40

    rows = shown(capsys, corpus / "dedup")
    assert ["near-duplicates:", "10", "documents"] in rows
    assert ["2", "10", "#" * 2] in rows and ["1", "290", "#" * 40] in rows  # clusters

    rows = shown(capsys, corpus / "split")
    assert sum(row[:1] == ["split"] for row in rows) == 3

    rows = shown(capsys, corpus / "store")
    manifest = store.read_manifest(corpus / "store")
    for name, split in manifest.splits.items():
        assert any(row[:2] == ["split", f"{name},"] and f"{split.num_tokens:,}" in row for row in rows)
        for source, part in split.sources.items():
            wanted = [source, f"{part.num_documents:,}", f"{part.num_bytes / 1e6:.2f}", f"{part.num_tokens:,}"]
            (found,) = (row for row in rows if row[:4] == wanted)
            assert found[-1] == f"{part.num_bytes / part.num_tokens:.2f}"


def test_what_cannot_be_described_or_trained_on_is_refused(corpus, tmp_path, capsys):
    assert main(["corpus", "stats", f"--input={tmp_path}"]) == 1
    assert "is not a token store" in capsys.readouterr().err
    assert main(["corpus", "stats"]) == 2
    command = ["corpus", "tokenizer", f"--input={corpus / 'split'}", f"--output={tmp_path / 'many'}"]
    assert main([*command, "--vocab_size=200"]) == 1
    assert "is too small for a byte-fallback tokenizer" in capsys.readouterr().err
    assert main(["corpus", "tokenizer", f"--input={corpus / 'clean'}", f"--output={tmp_path / 'clean'}"]) == 1
    assert "holds the stage clean" in capsys.readouterr().err


def test_every_document_reached_the_store_once(corpus):
    manifest = verify(corpus / "store", log=print)
    parts = [part for split in manifest.splits.values() for part in split.sources.values()]
    assert sum(part.num_documents for part in parts) == 300
    assert sum(part.num_bytes for part in parts) == sum(len(text) for text in TEXTS)


@pytest.mark.parametrize("verb", ["clean", "dedup", "split", "tokenizer", "tokenize", "stats", "verify"])
def test_every_verb_explains_itself(verb, capsys):
    assert main(["corpus", verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"btlm corpus {verb}" in said and "example" in said and "--help" in said


def test_a_run_trains_on_the_store(corpus, tmp_path, monkeypatch):
    """The loop, with a step that only counts, and what is evaluated; a whole run is on a stage's store of examples."""
    token_store = open_store(corpus / "store", expected_fingerprint="")
    found = loop_run.train(tmp_path, token_store, monkeypatch, [(1, 0)])
    assert found.outcomes == [loop.DONE] and {weight for _, weight in found.steps.values()} == {384}
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    options = {"batch_size": 8, "blocks_per_source": 10**9, "prefetch": 1, "sharding": evaluation_sharding(mesh)}
    tokens = Counter()
    for sources, batch in heldout_batches(token_store, **options):
        for source, weight in zip(sources, np.asarray(batch["weights_BT"]).sum(1).tolist(), strict=True):
            tokens[source] += weight
    heldout = token_store.manifest.splits[store.HELDOUT]
    assert +tokens == {source: part.num_tokens for source, part in heldout.sources.items()}


@pytest.mark.parametrize("stage", ["tokenizer", "dedup/work/pairs", "split/work/assign", "store/work/tokens"])
def test_stages_without_documents_are_described_and_verified(corpus, stage, capsys):
    assert main(["corpus", "stats", f"--input={corpus / stage}"]) == 0
    said = capsys.readouterr().out
    assert ("files" in said) and (stage != "tokenizer" or "tokenizer.model" in said)
    assert main(["corpus", "verify", f"--store={corpus / stage}"]) == 0
    assert main(["corpus", "show", f"--input={corpus / stage}", "--number=0"]) in (0, 1)
    assert "fault" not in capsys.readouterr().err
