"""Log-likelihoods of tokens, against the logits that the published code gave (tests/golden/oracles)."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from support.published_files import ORACLES, oracle_array
from support.tiny_tokenizers import EOS, tiny_byte_level

from btlm_jax import notices
from btlm_jax.decode.sampling import GREEDY
from btlm_jax.evaluate import texts
from btlm_jax.evaluate.checkpoint import Checkpoint
from btlm_jax.evaluate.scorer import Row, Scorer
from btlm_jax.evaluate.texts import Job, TextWriter
from btlm_jax.generate.loading import load_for_generation
from btlm_jax.hub.given_model import open_given_model
from btlm_jax.hub.native import one_device_mesh
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer

IDS_BT = oracle_array("tiny", "input_ids")
LOG_P_BTV = np.asarray(jax.nn.log_softmax(oracle_array("tiny", "logits").astype(np.float64), axis=-1))


def checkpoint(name):
    given = open_given_model(ORACLES / name, step=0)
    return Checkpoint(
        name=name, directory=given.directory, is_fetched=False, form=given.form, step=0, identity="",
        metadata=given.metadata, tokenizer=None, given=given,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mesh_scorer():
    return checkpoint("tiny").make_scorer(dtype="model", batch_tokens=64)


@pytest.fixture(scope="module")
def tiles_scorer():
    model = load_for_generation(ORACLES / "tiny", as_int4=False)
    return Scorer(model.metadata.network(), model.params, model.mesh, batch_tokens=100)


def rows_of_oracle():
    """Rows of many lengths, scored from their first, a middle and their last token on; with the oracle's row."""
    number = len(IDS_BT)
    ends = [2, 7, 33]  # of inputs of two padded lengths, the second without padding
    firsts = [[1, end // 2, end - 1] for end in ends]
    return [
        (b % number, Row(tokens=IDS_BT[b % number, :end], first=max(first, 1)))
        for b, (end, its_firsts) in enumerate(zip(ends, firsts, strict=True))
        for first in its_firsts
    ]


def test_weights_of_4_bits_compute_in_float32():
    four_bits = dataclasses.replace(checkpoint("tiny"), given=None)
    for load in (four_bits.make_scorer, texts.load_to_generate):
        more = {"batch_tokens": 64} if load == four_bits.make_scorer else {"checkpoint": four_bits, "as_int4": False}
        with pytest.raises(ValueError, match="dtype=bfloat16 is not possible: 4-bit weights compute in float32"):
            load(dtype="bfloat16", **more)


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["mesh_scorer", "tiles_scorer"])
def test_scores_are_those_of_the_original_logits(scorer, request):
    rows = rows_of_oracle()
    scorer = request.getfixturevalue(scorer)
    for (b, row), scores in zip(rows, scorer.log_likelihoods([row for _, row in rows]), strict=True):
        at = np.arange(row.first, len(row.tokens))
        expected_T = LOG_P_BTV[b, at - 1, np.asarray(row.tokens)[at]]
        assert scores.log_p_T.dtype == np.float64
        np.testing.assert_allclose(scores.log_p_T, expected_T, atol=2e-4)
        np.testing.assert_array_equal(scores.is_greedy_T, LOG_P_BTV[b, at - 1].argmax(-1) == np.asarray(row.tokens)[at])


def test_greedy_tokens_are_greedy(mesh_scorer):
    prompt = IDS_BT[0, :9].tolist()
    best = int(LOG_P_BTV[0, 8].argmax())
    other = (best + 1) % LOG_P_BTV.shape[-1]
    rows = [Row(tokens=[*prompt, token], first=9) for token in (best, other)]
    assert [scores.is_greedy_T.tolist() for scores in mesh_scorer.log_likelihoods(rows)] == [[True], [False]]


def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch, capsys):
    devices = make_mesh(devices=jax.devices(), tensor=1)
    scorer, sizes = Scorer(checkpoint("tiny").metadata.network(), {}, devices, batch_tokens=128), []

    def of_little_memory(rows):
        sizes.append(len(rows))
        if len(rows) > 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return [row.tokens[0] for row in rows]

    rows = [Row(tokens=[b, *range(11)], first=1 + b % 3) for b in range(40)]
    monkeypatch.setattr(scorer, "_score_batch", of_little_memory)
    notices.begin(strict=())
    assert scorer.log_likelihoods(rows) == list(range(40))
    assert sizes == [40, 32, 16, 16, 8]
    assert notices.counts() == {"batch-halved": 2}


class BatchOfIds:
    """Stands for a decode Batch whose only row draws `ids`."""

    ids, dropped_attention_bound = (), 0.0

    def __init__(self, *_, num_tokens, **__):
        self.left, self.active_rows = list(self.ids)[:num_tokens], {0}

    def step(self):
        token = self.left.pop(0)
        if not self.left:
            self.active_rows = set()
        return {0: token}

    def finish(self, row, reason):
        self.active_rows.discard(row)


def texts_of(*ids, bound, stops, monkeypatch):
    """Return the text that a TextWriter writes where these ids are drawn."""
    model = load_for_generation(ORACLES / "tiny", as_int4=False)
    tokenizer = ByteLevelTokenizer(tiny_byte_level().to_str().encode(), eos_id=299)
    monkeypatch.setattr(texts, "Batch", BatchOfIds)
    monkeypatch.setattr(BatchOfIds, "ids", ids)
    monkeypatch.setattr(BatchOfIds, "dropped_attention_bound", bound)
    writer = TextWriter(dataclasses.replace(model, tokenizer=tokenizer), batch_size=4, seed=0)
    return list(writer.write([Job(number=7, ids=[1], stops=stops, num_tokens=9, sample=0, sampling=GREEDY)]))


def test_a_special_token_that_is_a_stop_string_ends_a_written_text(monkeypatch):
    cat, dog = (tiny_byte_level().encode(word).ids for word in ("cat", "dog"))
    assert texts_of(*cat, 299, *dog, bound=0.0, stops=(EOS,), monkeypatch=monkeypatch) == [(7, "cat")]
    assert texts_of(*cat, 299, *dog, bound=0.0, stops=("og",), monkeypatch=monkeypatch) == [(7, "catd")]


def test_what_the_cache_drops_is_said_of_scores_and_of_texts(monkeypatch, capsys):
    scorer = Scorer(checkpoint("tiny").metadata.network(), {}, one_device_mesh(), batch_tokens=32)
    notices.begin(strict=())
    for bound in (1e-7, 2e-6, 3e-6, 0.5, 5e34):
        scorer._note_dropped(bound)
    assert re.findall(r"up to (\S+) of a head", capsys.readouterr().err) == ["2.0e-06", "5.0e-01"]
    texts_of(5, bound=0.1, stops=(), monkeypatch=monkeypatch)
    assert notices.counts() == {"attention-dropped": 3} and "up to 1.0e-01 of" in capsys.readouterr().err


def test_a_row_that_never_fits_and_another_error_are_raised(monkeypatch):
    scorer = Scorer(checkpoint("tiny").metadata.network(), {}, one_device_mesh(), batch_tokens=32)
    rows = [Row(tokens=IDS_BT[0, :5], first=1)]
    monkeypatch.setattr(scorer, "_score_batch", lambda rows: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError, match="score shorter"):
        scorer.log_likelihoods(rows)
    error = jax.errors.JaxRuntimeError("INTERNAL: something else")
    monkeypatch.setattr(scorer, "_score_batch", lambda rows: (_ for _ in ()).throw(error))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        scorer.log_likelihoods(rows)


def test_few_padded_lengths_and_none_beyond_the_length_of_dynamic_scaling():
    scorer = Scorer(checkpoint("tiny").metadata.network(), {}, one_device_mesh(), batch_tokens=8)
    lengths = [scorer.padded_length(length) for length in range(1, 3000)]
    assert all(padded >= length for length, padded in enumerate(lengths, 1))
    assert all(padded <= 1.5 * length for length, padded in enumerate(lengths, 1) if length > 16)
    assert sorted(set(lengths))[:7] == [16, 24, 32, 48, 64, 96, 128]
    dynamic = Scorer(scorer.model.clone(alibi_train_len=40), {}, one_device_mesh(), batch_tokens=8)
    assert [dynamic.padded_length(n) for n in (20, 24, 33, 40, 41, 47, 300)] == [24, 24, 40, 40, 41, 47, 300]


@pytest.mark.parametrize(
    ("tokens", "first", "match"),
    [
        ([5], 1, "1 tokens"),
        ([], 1, "0 tokens"),
        ([5, 6], 0, "number 0"),
        ([5, 6], 2, "number 2"),
        ([5, 9999], 1, "9999"),
    ],
)
def test_rows_that_cannot_be_scored(mesh_scorer, tokens, first, match):
    with pytest.raises(ValueError, match=match):
        mesh_scorer.log_likelihoods([Row(tokens=tokens, first=first)])
