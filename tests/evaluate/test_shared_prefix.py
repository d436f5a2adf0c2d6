"""Rows that begin alike: how they are grouped, and their log-likelihoods against the published code's logits."""

import jax
import numpy as np
import pytest
from support.published_files import ORACLES, oracle_array

from btlm_jax import notices
from btlm_jax.evaluate.scorer import Row
from btlm_jax.evaluate.shared_prefix import PrefixScorer, make_families
from btlm_jax.generate.loading import load_for_generation
from btlm_jax.kernels.build import has_kernels

IDS_BT = oracle_array("tiny", "input_ids")
LOG_P_BTV = np.asarray(jax.nn.log_softmax(oracle_array("tiny", "logits").astype(np.float64), axis=-1))


def make_scorer(batch_tokens):
    model = load_for_generation(ORACLES / "tiny", as_int4=False)
    return PrefixScorer(model.metadata.network(), model.params, model.mesh, batch_tokens=batch_tokens)


def rows_that_begin_alike():
    """Rows of the oracle's tokens: alone, of one context, of contexts that begin alike, with equal inputs."""
    rows = [Row(tokens=IDS_BT[0, :end], first=first) for end, first in ((40, 33), (45, 33), (50, 33), (34, 33))]
    rows += [Row(tokens=IDS_BT[0, :end], first=first) for end, first in ((60, 55), (58, 55), (70, 60), (66, 64))]
    rows += [Row(tokens=IDS_BT[1, :end], first=first) for end, first in ((30, 1), (9, 2), (2, 1), (31, 20), (64, 5))]
    other = [*IDS_BT[1, :19].tolist(), int(IDS_BT[1, 19] + 1) % 512]
    return [*rows, Row(tokens=IDS_BT[1, :20], first=19), Row(tokens=other, first=19)]


def test_families_keep_equal_contexts_together_and_what_contexts_share():
    few_shot = list(range(100, 140))
    questions = [[*few_shot, number, 8, 9] for number in range(3)]
    rows = [Row(tokens=[*question, choice], first=43) for question in questions for choice in (1, 2)]
    rows += [Row(tokens=[*range(20), 5, end], first=21) for end in (8, 9)]  # one branch
    rows += [Row(tokens=[*range(30, 50), 5, end, 4], first=20) for end in (8, 9)]  # two branches
    assert len(make_families(rows, least_saved=81)) == 1
    shared, rest = make_families(rows, least_saved=80)
    assert shared.num_shared == 40
    assert [(branch.context, branch.inputs, branch.rows) for branch in shared.branches] == [
        ((*few_shot, number, 8), (9,), (2 * number, 2 * number + 1)) for number in range(3)
    ]
    assert rest.num_shared == 0
    assert [(branch.rows, branch.skip, len(branch.context)) for branch in rest.branches] == [
        ((8,), 0, 19), ((9,), 0, 19), ((6, 7), 20, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("batch_tokens", [20, 4096])
def test_scores_are_those_of_the_original_logits(batch_tokens):
    rows = rows_that_begin_alike()
    of_oracle = [0] * 8 + [1] * 7
    found = make_scorer(batch_tokens).log_likelihoods(rows)
    for b, row, scores in zip(of_oracle, rows, found, strict=True):
        at, targets = np.arange(row.first, len(row.tokens)), np.asarray(row.tokens)[row.first :]
        np.testing.assert_allclose(scores.log_p_T, LOG_P_BTV[b, at - 1, targets], atol=2e-5)
        np.testing.assert_array_equal(scores.is_greedy_T, LOG_P_BTV[b, at - 1].argmax(-1) == targets)


@pytest.mark.skipif(not has_kernels(), reason="a mesh shares nothing")
def test_what_rows_share_runs_once(monkeypatch):
    scorer, ran = make_scorer(200), []
    whole = scorer._extend

    def count(cache, layout, *, inputs, starts, num_rows):
        ran.append(sum(map(len, inputs)))
        return whole(cache, layout, inputs=inputs, starts=starts, num_rows=num_rows)

    monkeypatch.setattr(scorer, "_extend", count)
    questions = ([*range(200), number, 6, 7] for number in (3, 4))
    rows = [Row(tokens=[*question, choice, 9], first=203) for question in questions for choice in (1, 2, 5)]
    scorer.log_likelihoods(rows)
    assert ran == [200, 2 * 2, 2 * 3 * 2]  # of 6 x 204 inputs


@pytest.mark.skipif(not has_kernels(), reason="a mesh shares nothing")
def test_out_of_memory_halves_the_batch_and_every_row_is_scored_once(monkeypatch):
    scorer, sizes = make_scorer(64), []

    def of_little_memory(batch, *_):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return [(number, number) for branch in batch for number in branch.rows]

    monkeypatch.setattr(scorer, "_score_branches", of_little_memory)
    notices.begin(strict=())
    found = list(scorer.score(rows_that_begin_alike()))
    assert sorted(number for number, _ in found) == list(range(15))
    assert notices.counts()["batch-halved"] >= 1 and max(sizes) > 2
