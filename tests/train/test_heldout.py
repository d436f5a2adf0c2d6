"""Held-out sums against values worked out by hand or by enumeration; the model is a table of known losses."""

import json
import math

import numpy as np
import pytest

from btlm_jax.data import store
from btlm_jax.train.heldout import HeldoutResult, SourceLoss, evaluate_heldout


def manifest_of(**sources: tuple[int, int]) -> store.Manifest:
    """Return a manifest whose held-out sources have (bytes, tokens)."""
    entries = {
        name: store.Source(num_documents=1, num_bytes=num_bytes, num_tokens=num_tokens, first_block=0, num_blocks=1)
        for name, (num_bytes, num_tokens) in sources.items()
    }
    split = store.Split(num_blocks=9, num_tokens=99, shards=(), sources=entries)
    tokenizer = store.TokenizerInfo(kind="sentencepiece", file="t", sha256="0", vocab_size=50, eos_id=0)
    return store.Manifest(
        block_len=5, dtype="uint16", tokenizer=tokenizer, splits={store.HELDOUT: split}, features=(), made_by={}
    )


def table_step(params, batch):
    """Return the sums of an eval step whose losses are the batch itself, times a parameter, in float32."""
    losses_BT = batch["losses_BT"] * batch["weights_BT"] * params["scale"]
    return {
        "loss_B": losses_BT.sum(1, dtype=np.float32),
        "weight_B": batch["weights_BT"].sum(1, dtype=np.float32),
        "loss_T": losses_BT.sum(0, dtype=np.float32),
        "weight_T": batch["weights_BT"].sum(0, dtype=np.float32),
    }


def batch_of(losses_BT, num_targets_B):
    losses_BT = np.array(losses_BT, np.float32)
    weights_BT = (np.arange(losses_BT.shape[1]) < np.array(num_targets_B)[:, None]).astype(np.float32)
    return {"losses_BT": losses_BT, "weights_BT": weights_BT}


# Two batches of 3 rows of 5: code has 5 + 2 targets, prose 5 + 5, the rest pads (its losses, 9, must not be seen).
BATCHES = [
    (["code", "code", "prose"], batch_of([[1, 1, 1, 1, 2], [3, 4, 9, 9, 9], [2, 2, 2, 2, 2]], [5, 2, 5])),
    (["prose", "", ""], batch_of([[4, 3, 2, 1, 0], [9] * 5, [9] * 5], [5, 0, 0])),
]
CODE, PROSE = 1 + 1 + 1 + 1 + 2 + 3 + 4, 5 * 2 + 4 + 3 + 2 + 1


def test_sources_and_totals_by_hand():
    result = evaluate_heldout(
        table_step, {"scale": 2.0}, iter(BATCHES), manifest=manifest_of(code=(28, 7), prose=(90, 20))
    )
    report = result.to_json()
    assert report["sources"]["code"] == {
        "loss": 2 * CODE / 7,
        "perplexity": pytest.approx(math.e ** (2 * CODE / 7)),
        "bits_per_byte": pytest.approx(2 * CODE * math.log2(math.e) / 28),
        "tokens": 7,
        "bytes": 28.0,
    }
    assert report["sources"]["prose"]["tokens"] == 10
    assert report["sources"]["prose"]["bytes"] == 45.0  # half of the source's tokens were evaluated
    assert report["sources"]["prose"]["bits_per_byte"] == pytest.approx(2 * PROSE / math.log(2) / 45)
    assert report["loss"] == pytest.approx(2 * (CODE + PROSE) / 17)
    assert report["mean_of_sources"] == pytest.approx((2 * CODE / 7 + 2 * PROSE / 10) / 2)
    assert report["bits_per_byte"] == pytest.approx(2 * (CODE + PROSE) / math.log(2) / 73)
    assert report["heldout_tokens"] == 17


def test_positions_by_hand():
    result = evaluate_heldout(table_step, {"scale": 1.0}, BATCHES, manifest=manifest_of(code=(28, 7), prose=(90, 20)))
    np.testing.assert_array_equal(result.loss_T, [1 + 3 + 2 + 4, 1 + 4 + 2 + 3, 1 + 2 + 2, 1 + 2 + 1, 2 + 2 + 0])
    np.testing.assert_array_equal(result.weight_T, [4, 4, 3, 3, 3])
    assert result.loss_T.dtype == np.float64
    assert result.to_json()["positions"] == {
        "first": [1, 2, 3, 5],
        "last": [1, 2, 4, 5],
        "loss": [10 / 4, 10 / 4, 9 / 6, pytest.approx(4 / 3)],
        "tokens": [4, 4, 6, 3],
    }


def test_the_report_is_plain_json():
    result = evaluate_heldout(table_step, {"scale": 400.0}, BATCHES, manifest=manifest_of(code=(28, 7), prose=(90, 20)))
    report = result.to_json()
    assert json.loads(json.dumps(report, allow_nan=False)) == report  # e^(400 * 2) is beyond float64
    assert report["sources"]["prose"]["perplexity"] == math.exp(700)


def test_sources_without_evaluated_tokens_are_left_out():
    batches = [(["code", "prose"], batch_of([[1, 2], [1, 2]], [2, 0]))]
    manifest = manifest_of(code=(4, 2), prose=(3, 1), never_read=(9, 9))
    assert list(evaluate_heldout(table_step, {"scale": 1.0}, batches, manifest=manifest).sources) == ["code"]


def test_small_terms_survive_many_batches():
    """2,000 sums of 16,777,216 + 1: a float32 accumulator would lose every 1."""
    big, small = batch_of([[2.0**24]], [1]), batch_of([[1.0]], [1])
    batches = [(["code"], big), (["code"], small)] * 2000
    result = evaluate_heldout(table_step, {"scale": 1.0}, batches, manifest=manifest_of(code=(1, 4000)))
    assert result.total.nats == 2000 * (2**24 + 1) == result.loss_T[0]


def test_nothing_to_evaluate():
    batches = [(["", ""], batch_of([[1, 2], [1, 2]], [0, 0]))]
    for nothing in ([], batches):
        with pytest.raises(ValueError, match="no held-out text"):
            evaluate_heldout(table_step, {"scale": 1.0}, nothing, manifest=manifest_of(code=(4, 2)))


def test_a_loss_that_is_not_finite_names_its_source():
    batches = [(["prose", "code"], batch_of([[1, 2], [1, math.inf]], [2, 2]))]
    with pytest.raises(FloatingPointError, match="'code' is inf"):
        evaluate_heldout(table_step, {"scale": 1.0}, batches, manifest=manifest_of(code=(4, 2), prose=(3, 2)))


def by_position(mean_T, *, num_rows: int) -> HeldoutResult:
    mean_T = np.array(mean_T, np.float64)
    total = SourceLoss(nats=float(mean_T.sum()) * num_rows, num_tokens=num_rows * len(mean_T), num_bytes=1.0)
    return HeldoutResult(
        sources={"all": total}, loss_T=mean_T * num_rows, weight_T=np.full(len(mean_T), float(num_rows))
    )


@pytest.mark.parametrize("num_positions", [1, 2, 3, 7, 8, 9, 100])
def test_bins_by_enumeration(num_positions):
    """Every position is in the bin of its bit length: position p - 1 has as many bits in all of a bin."""
    losses = np.random.default_rng(num_positions).normal(size=num_positions)
    members = {}
    for position in range(1, num_positions + 1):
        members.setdefault((position - 1).bit_length(), []).append(position)
    bins = by_position(losses, num_rows=6).bins
    assert [(bin_.first, bin_.last) for bin_ in bins] == [(part[0], part[-1]) for part in members.values()]
    for bin_, part in zip(bins, members.values(), strict=True):
        here = [losses[position - 1] for position in part]
        assert bin_.loss == pytest.approx(sum(here) / len(here))
        assert bin_.num_tokens == 6 * len(here)
        error = np.std(here, ddof=1) / len(here) ** 0.5 if len(here) > 1 else 0.0
        assert bin_.standard_error == pytest.approx(error)


def test_positions_never_evaluated_have_no_bin():
    result = HeldoutResult(sources={}, loss_T=np.array([2.0, 3, 0, 0, 0]), weight_T=np.array([1.0, 1, 0, 0, 0]))
    assert [bin_.first for bin_ in result.bins] == [1, 2]


def test_first_rise():
    falling = [5.0, 4.0] + [3.0] * 2 + [2.5] * 4 + [2.4] * 8
    assert by_position([*falling, *[2.3] * 16], num_rows=7).first_rise == 0
    assert by_position([*falling, *[2.415] * 16], num_rows=7).first_rise == 0
    assert by_position([*falling, *[2.425] * 16], num_rows=7).first_rise == 17
    # Two rises of 0.015 are one of 0.03 above the lowest.
    assert by_position([*falling, *[2.415] * 16, *[2.43] * 32], num_rows=7).first_rise == 33
    assert by_position([5.0], num_rows=7).first_rise == 0


def test_first_rise_is_not_fooled_by_chance():
    """2.5 nats of scatter a token over 32 blocks: a falling curve seldom seems to rise, a rise of 0.3 is found."""
    random = np.random.default_rng(0)
    position = np.arange(1, 1025)
    falling = 3.4 + 2 * position**-0.5
    rising = falling + 0.15 * np.maximum(np.log2(position / 256), 0)
    found = {}
    for name, mean in (("falling", falling), ("rising", rising)):
        noise = 2.5 / 32**0.5 * random.normal(size=(100, 1024))
        found[name] = sum(by_position(mean + x_T, num_rows=32).first_rise > 0 for x_T in noise)
    assert found["falling"] <= 12
    assert found["rising"] >= 85


def test_padding_rows_belong_to_no_source():
    """Even with weights: the name alone tells them."""
    batches = [(["code", ""], batch_of([[1, 2], [5, 6]], [2, 2]))]
    result = evaluate_heldout(table_step, {"scale": 1.0}, batches, manifest=manifest_of(code=(4, 2)))
    assert result.to_json()["loss"] == 1.5 and list(result.sources) == ["code"]
