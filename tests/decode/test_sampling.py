"""Drawing tokens against the definitions of temperature, top-k, top-p, min-p and the repetition penalty."""

import numpy as np
import pytest

from btlm_jax.decode.sampling import GREEDY, Sampling, draw, make_generator

PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
LOGITS = np.log([0.4, 0.3, 0.2, 0.06, 0.04])[[3, 0, 4, 1, 2]]  # probabilities .06 .4 .04 .3 .2


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, [0.06, 0.4, 0.04, 0.3, 0.2]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),
        ({"min_p": 0.45}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),
        ({"temperature": 0.5}, np.square([0.06, 0.4, 0.04, 0.3, 0.2]) / 0.2952),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_definition_says(changes, want):
    sampling = Sampling(**{"temperature": 1.0, **PLAIN, **changes})
    generator = np.random.default_rng(0)
    drawn = [draw(LOGITS, history=[], sampling=sampling, generator=generator) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 4000, want, atol=0.03)
    assert not set(drawn) & set(np.flatnonzero(np.equal(want, 0)))


def test_the_repetition_penalty_moves_seen_tokens_down_whatever_their_sign():
    sampling = Sampling(**{**PLAIN, "temperature": 0.0, "repetition_penalty": 2.0})
    generator = np.random.default_rng(0)
    assert draw(np.array([3.0, 2.0, 1.0]), history=[0, 0], sampling=sampling, generator=generator) == 1
    assert draw(np.array([-1.0, -1.5, -9.0]), history=[0], sampling=sampling, generator=generator) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-320},
    ],
    ids=str,
)
def test_impossible_sampling_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Sampling(**{"temperature": 1.0, **PLAIN, **changes})


def plainly(logits_V, sampling):
    """The probabilities by sorting everything, rule after rule."""
    order = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))
    order = order[: sampling.top_k or None]
    weights = {token: np.exp(logits_V[token] / sampling.temperature) for token in order}
    kept, total, so_far = {}, sum(weights.values()), 0.0
    for token in order:
        if not kept or so_far < sampling.top_p * total:
            kept[token] = weights[token]
        so_far += weights[token]
    least = sampling.min_p * max(kept.values())
    kept = {token: weight for token, weight in kept.items() if weight >= least}
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


class Recorder:
    """Stands in for a generator and keeps what it was asked to choose from."""

    def choice(self, tokens, p):
        self.asked = {int(token): share for token, share in zip(tokens, p, strict=True) if share > 0}
        return tokens[0]


def test_what_is_drawn_from_is_what_sorting_everything_gives():
    random = np.random.default_rng(0)
    for _ in range(300):
        logits_V = random.choice([0.0, 1.5, 2.0, 7.0], 37) + random.choice([0.0, 1e-3], 37) * random.random(37)
        sampling = Sampling(
            temperature=random.choice([0.3, 1.0, 2.5]),
            top_k=int(random.choice([0, 1, 5, 36, 37, 90])),
            top_p=random.choice([0.01, 0.5, 0.91, 1.0]),
            min_p=random.choice([0.0, 0.2, 1.0]),
            repetition_penalty=1.0,
        )
        recorder = Recorder()
        draw(logits_V, history=[], sampling=sampling, generator=recorder)
        want = plainly(logits_V, sampling)
        assert recorder.asked.keys() == want.keys()
        assert all(abs(recorder.asked[token] - want[token]) < 1e-12 for token in want)


def test_random_numbers_differ_by_seed_sample_and_prompt_and_by_nothing_else():
    def first(seed, sample, prompt):
        return make_generator(seed, sample=sample, prompt=prompt).random()

    known = [first(*key) for key in ((1, 0, [5, 6]), (2, 0, [5, 6]), (1, 1, [5, 6]), (1, 0, [6, 5]), (1, 0, [5]))]
    assert len(set(known)) == 5
    assert first(1, 0, np.array([5, 6], np.int32)) == known[0]


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="logits after 2 tokens are not finite: its weights are damaged"):
        draw(np.array([1.0, np.nan]), history=[0, 1], sampling=GREEDY, generator=np.random.default_rng(0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_extreme_settings_draw_a_token_without_a_warning(temperature, penalty):
    logits_V = np.array([3.0, -2.0, 80.0, 79.0], np.float32)
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=penalty)
    token = draw(logits_V, history=[2], sampling=sampling, generator=np.random.default_rng(0))
    assert token == (2 if penalty < 1 else 3) or temperature > 1
