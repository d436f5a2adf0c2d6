"""Rows that begin alike: how they are grouped, and their log-likelihoods against the published code's logits."""

import functools

import jax
import numpy as np
import pytest
from support.published_files import ORACLES, oracle_array

from btlm_jax import notices
from btlm_jax.evaluate import shared_prefix
from btlm_jax.evaluate.scorer import Row
from btlm_jax.evaluate.shared_prefix import PrefixScorer, make_families
from btlm_jax.generate.loading import load_for_generation
from btlm_jax.hub.given_model import open_given_model, placed_params
from btlm_jax.kernels.build import has_kernels
from btlm_jax.parallel.make_mesh import make_mesh

IDS_BT = oracle_array("tiny", "input_ids")
LOG_P_BTV = np.asarray(jax.nn.log_softmax(oracle_array("tiny", "logits").astype(np.float64), axis=-1))


@functools.cache
def network():
    return open_given_model(ORACLES / "tiny", step=0).metadata.network()


def make_scorer(batch_tokens, *, num_devices=0):
    """A scorer on a mesh of so many devices, or with weights in tiles."""
    if not num_devices:
        model = load_for_generation(ORACLES / "tiny", as_int4=False)
        return PrefixScorer(model.metadata.network(), model.params, model.mesh, batch_tokens=batch_tokens)
    given, mesh = open_given_model(ORACLES / "tiny", step=0), mesh_of(num_devices)
    return PrefixScorer(given.metadata.network(), placed_params(given, mesh), mesh, batch_tokens=batch_tokens)


def mesh_of(num_devices):
    return make_mesh(devices=jax.devices()[:num_devices], tensor=1)


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
    assert len(make_families(rows, least_saved=81, lanes=1)) == 1
    assert [len(make_families(rows, least_saved=saved, lanes=2)) for saved in (20, 21)] == [2, 1]  # 2 of 3 run it
    shared, rest = make_families(rows, least_saved=80, lanes=1)
    assert shared.num_shared == 40
    assert [(branch.context, branch.inputs, branch.rows) for branch in shared.branches] == [
        ((*few_shot, number, 8), (9,), (2 * number, 2 * number + 1)) for number in range(3)
    ]
    assert rest.num_shared == 0
    assert [(branch.rows, branch.skip, len(branch.context)) for branch in rest.branches] == [
        ((8,), 0, 19), ((9,), 0, 19), ((6, 7), 20, 0),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("batch_tokens", "num_devices"), [(20, 0), (4096, 0), (16, 2)])
def test_scores_are_those_of_the_original_logits(batch_tokens, num_devices, monkeypatch):
    if num_devices:
        monkeypatch.setattr(shared_prefix, "MAX_PIECE", 16)  # longer inputs run in pieces
    rows, of_oracle = rows_that_begin_alike(), [0] * 8 + [1] * 7
    if num_devices:  # those that share something: others run without a cache
        rows, of_oracle = [*rows[:8], *rows[-2:]], [*of_oracle[:8], *of_oracle[-2:]]
    found = make_scorer(batch_tokens, num_devices=num_devices).log_likelihoods(rows)
    for b, row, scores in zip(of_oracle, rows, found, strict=True):
        at, targets = np.arange(row.first, len(row.tokens)), np.asarray(row.tokens)[row.first :]
        np.testing.assert_allclose(scores.log_p_T, LOG_P_BTV[b, at - 1, targets], atol=2e-5)
        np.testing.assert_array_equal(scores.is_greedy_T, LOG_P_BTV[b, at - 1].argmax(-1) == targets)


class CountingEngine:
    """Runs nothing, and keeps what it is asked for; the hidden state of a position is where it is."""

    is_packed = False

    def __init__(self, lanes):
        self.lanes, self.ran, self.parents = lanes, [], []

    def make_layout(self, length):
        return length

    def most_rows(self, layout):
        return 100

    def make_cache(self, layout, num_rows):
        return num_rows

    def extend(self, cache, layout, *, inputs_BT, starts_B, counts_B, lengths_B):
        assert (lengths_B == starts_B + counts_B).all() and (inputs_BT[0, : counts_B[0]] >= 0).all()
        self.ran.append(counts_B.reshape(self.lanes, -1).tolist())
        return np.zeros((*inputs_BT.shape, 1)), cache

    def take_rows(self, cache, parents_WB):
        self.parents.append(parents_WB.tolist())

    def scores_at(self, hidden_BTD, at_WP, targets_WP):
        return -at_WP.astype(float), targets_WP == 1


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_rows_share_runs_once_in_each_lane(lanes):
    scorer = PrefixScorer(network(), {}, mesh_of(lanes), batch_tokens=128)
    scorer._engine = engine = CountingEngine(lanes)
    questions = [[*range(256), number, 6, 7] for number in (3, 4, 5)]
    rows = [Row(tokens=[*question, choice, 9], first=259) for question in questions for choice in (1, 2, 5)]
    found = scorer.log_likelihoods(rows)
    if lanes == 1:
        assert engine.ran == [[[256]], [[2, 2, 2, 0]], [[2] * 9 + [0] * 7]]  # of 9 x 260 inputs
        assert engine.parents == [[[0] * 4], [[0, 0, 0, 1, 1, 1, 2, 2, 2] + [0] * 7]]
    else:  # one has two of the contexts, and the other one
        assert engine.ran == [[[256], [256]], [[2, 2], [2, 0]], [[2] * 6 + [0] * 2, [2] * 3 + [0] * 5]]
        assert engine.parents == [[[0, 0], [0, 0]], [[0, 0, 0, 1, 1, 1, 0, 0], [0] * 8]]
    assert [scores.is_greedy_T.tolist() for scores in found] == [[True, False], [False, False], [False, False]] * 3
    width = 8
    own = [[b * width, b * width + 1] for b in ([*range(9)] if lanes == 1 else [*range(6), *range(3)])]
    assert [scores.log_p_T.tolist() for scores in found] == own


def test_rows_that_share_nothing_run_without_a_cache_on_a_mesh(monkeypatch):
    scorer = PrefixScorer(network(), {}, mesh_of(2), batch_tokens=64)
    scorer._engine = engine = CountingEngine(2)
    monkeypatch.setattr(scorer, "_score_batch", lambda rows: [row.tokens[0] for row in rows])
    alone = [Row(tokens=range(4 * n, 4 * n + 12), first=1) for n in range(3)]
    assert scorer.log_likelihoods(alone) == [0, 4, 8] and engine.ran == []
    letters = [Row(tokens=[*range(12), letter], first=12) for letter in (1, 2)]  # the same inputs: one row
    found = scorer.log_likelihoods([alone[1], *letters])
    assert found[0] == 4 and engine.ran == [[[12], [0]]]
    assert [scores.is_greedy_T.tolist() for scores in found[1:]] == [[True], [False]]


@pytest.mark.skipif(not has_kernels(), reason="it is about weights in tiles")
def test_out_of_memory_halves_the_batch_and_every_row_is_scored_once(monkeypatch):
    scorer, sizes = make_scorer(64), []

    def of_little_memory(lanes, *_):
        (batch,) = lanes
        sizes.append(len(batch))
        if len(batch) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return [(number, number) for branch in batch for number in branch.rows]

    monkeypatch.setattr(scorer, "_score_branches", of_little_memory)
    notices.begin(strict=())
    found = list(scorer.score(rows_that_begin_alike()))
    assert sorted(number for number, _ in found) == list(range(15))
    assert notices.counts()["batch-halved"] >= 1 and max(sizes) > 2
