"""Loss by position: one stream, exact sums and counts, rises, and interpolated slopes against the published code."""

import dataclasses

import jax
import numpy as np
import pytest
from support.published_files import ORACLES, oracle_array

from btlm_jax import notices
from btlm_jax.display.plotting import write_figure
from btlm_jax.evaluate import plots
from btlm_jax.evaluate.documents import Corpus, Document
from btlm_jax.evaluate.plots import plot_positions
from btlm_jax.evaluate.positions import (
    DYNAMIC,
    FIXED,
    PLAIN,
    Setting,
    bin_edges,
    measure_positions,
    settings_of,
    stream_of,
)
from btlm_jax.evaluate.report import tables_of
from btlm_jax.evaluate.results import Work
from btlm_jax.evaluate.scorer import Row, Scorer, Scores
from btlm_jax.hub.source import load_native

EOS = 0


def corpus_of(sizes, *, closed, seed=0):
    """Documents of ids from 1 on, each after EOS; with `closed` the EOS after it is counted, as in a store."""
    rng = np.random.default_rng(seed)
    documents = []
    for size in sizes:
        tokens = np.concatenate([[EOS], rng.integers(1, 50, size), [EOS] * closed]).astype(np.int32)
        counted = np.ones(len(tokens) - 1, bool)
        documents.append(Document(source="s", tokens=tokens, is_counted=counted, num_bytes=size))
    return Corpus(documents=tuple(documents), identity="i", description="made up")


class ByPosition:
    """A scorer whose loss at position p, from p tokens of context, is loss(p)."""

    model, batch_tokens = None, 64

    def __init__(self, loss):
        self._loss = loss

    def with_model(self, model):
        return self

    def log_likelihoods(self, rows, *, on_scored):
        assert all(row.first == 1 for row in rows)
        losses = [np.array([self._loss(p) for p in range(1, len(row.tokens))], np.float64) for row in rows]
        return [Scores(log_p_T=-loss, is_greedy_T=loss > 0) for loss in losses]


def curve(loss, corpus, length):
    setting = Setting(length=length, alibi="dynamic", factor=1.0)
    scorer, stream = ByPosition(loss), stream_of(corpus)
    scorer.model = type("Model", (), {"clone": lambda self, **_: self})()
    return measure_positions(scorer, stream, setting, trained_length=8, work=Work("positions", None))


@pytest.mark.parametrize("closed", [True, False])
def test_every_counted_token_is_in_the_stream_once(closed):
    corpus = corpus_of((5, 1, 17, 3), closed=closed)
    stream = stream_of(corpus)
    assert stream.is_counted.sum() == corpus.num_targets
    words = sorted(stream.tokens[1:][stream.is_counted].tolist())
    assert words == sorted(np.concatenate([document.tokens[1:] for document in corpus.documents]).tolist())
    assert (stream.tokens == EOS).sum() == len(corpus.documents) + closed
    assert not ((stream.tokens[:-1] == EOS) & (stream.tokens[1:] == EOS)).any()


@pytest.mark.parametrize("closed", [True, False])
def test_sums_and_counts_at_each_position(closed):
    corpus = corpus_of((50, 41, 77), closed=closed)
    found = curve(lambda p: 1.0 + p, corpus, 32)
    stream = stream_of(corpus)
    padded = np.pad(stream.is_counted, (0, -len(stream.is_counted) % 32)).reshape(-1, 32)
    assert found["of_positions"]["tokens"] == padded.sum(0).tolist()
    np.testing.assert_allclose(found["of_positions"]["nats"], padded.sum(0) * np.arange(2.0, 34))
    assert (found["tokens"], found["windows"]) == (corpus.num_targets, len(padded))
    bins = found["bins"]
    assert sum(bins["num_tokens"]) == corpus.num_targets
    assert (bins["first"][0], bins["last"][-1]) == (1, 32)
    assert bins["last"][:-1] == [first - 1 for first in bins["first"][1:]]
    for first, last, loss in zip(bins["first"], bins["last"], bins["loss"], strict=True):
        counts = padded[:, first - 1 : last].sum(0)
        assert loss == pytest.approx((counts * np.arange(first + 1, last + 2)).sum() / counts.sum())
    assert found["loss"] == pytest.approx((padded.sum(0) * np.arange(2, 34)).sum() / corpus.num_targets)


def test_bins_are_half_octaves():
    assert bin_edges(48) == [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 48]
    assert bin_edges(32768)[-3:] == [16384, 23170, 32768]


def test_a_rise_is_found_where_it_begins():
    corpus = corpus_of((64 * 150,), closed=True)
    assert curve(lambda p: 3.0 + (0.1 if p > 32 else 0.0), corpus, 64)["first_rise"] == 33
    assert curve(lambda p: 3.0 + (0.01 if p > 32 else 0.0), corpus, 64)["first_rise"] == 0
    few = corpus_of((64 * 15,), closed=True)  # bins of fewer than 1,000 tokens, whose losses scatter
    assert curve(lambda p: 3.0 + (0.1 if p > 32 else 0.0), few, 64)["first_rise"] == 0


def test_which_curves_are_measured(capsys):
    notices.begin(strict=())
    settings = settings_of((64, 16, 32, 256), trained_length=16, stream_length=100)
    assert notices.counts() == {"length-left-out": 1}
    expected = [(16, PLAIN, 1), (32, PLAIN, 1), (64, PLAIN, 1), (16, FIXED, 4), (32, FIXED, 4), (64, FIXED, 4)]
    assert [(each.length, each.alibi, each.factor) for each in settings] == [*expected, (32, DYNAMIC, 1)]
    assert {each.alibi for each in settings_of((8, 16), trained_length=16, stream_length=100)} == {PLAIN}
    with pytest.raises(ValueError, match="have 100 in all"):
        settings_of((256,), trained_length=16, stream_length=100)


def test_interpolated_slopes_are_the_published_ones():
    native = load_native(ORACLES / "tiny_pi_fix")
    plain = dataclasses.replace(native.metadata.model, alibi_scaling=1.0)
    scorer = Scorer(
        dataclasses.replace(native.metadata, model=plain).network(), native.params, native.mesh, batch_tokens=256
    )
    ids_BT = oracle_array("tiny_pi_fix", "input_ids")
    log_p_BTV = jax.nn.log_softmax(oracle_array("tiny_pi_fix", "logits"), axis=-1)
    expected_BT = np.take_along_axis(np.asarray(log_p_BTV)[:, :-1], ids_BT[:, 1:, None], axis=2)[..., 0]
    rows = [Row(tokens=ids_T, first=1) for ids_T in ids_BT]
    length = ids_BT.shape[1] - 1  # the keys of a call whose last token is scored only; 4 x 24.75
    for setting, trained_length in (
        (Setting(length=length, alibi=FIXED, factor=4.0), 25),
        (Setting(length=length, alibi=DYNAMIC, factor=1.0), length / 4),
    ):
        network = setting.network(scorer.model, trained_length=trained_length)
        found = scorer.with_model(network).log_likelihoods(rows)
        errors = [np.abs(one.log_p_T - expected).max() for one, expected in zip(found, expected_BT, strict=True)]
        assert max(errors) < 2e-4, (setting, errors)


def test_the_table_and_the_plot(tmp_path, monkeypatch):
    corpus = corpus_of((640,), closed=True)
    curves = [curve(lambda p: 4 - 0.1 * np.log(p), corpus, 32), curve(lambda p: 4 - 0.1 * np.log(p), corpus, 64)]
    curves[0] |= {"alibi": "none"}
    curves[1] |= {"alibi": "none"}
    part = {"of": "made up", "plot": "positions.png", "curves": curves, "settings": {"dtype": "float32"}}
    (made,) = tables_of({"parts": {"positions": part}})
    table = made.as_text()
    assert table.startswith("loss by position: made up, in one stream (float32)\n")
    assert "no rise" in table and f"{curves[1]['loss']:.4f}" in table
    ruined = curve(lambda p: 9.0 + 0 * p, corpus, 64) | {"alibi": "fixed", "factor": 2.0}
    drawn = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: drawn.append(figure) or write_figure(figure, path))
    plot_positions([*curves, ruined], tmp_path / "p.png", trained_length=32, title="made up")
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["32", "64", "64, ALiBi / 2 (higher)"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
