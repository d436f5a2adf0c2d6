"""Weights as a config writes them, and the turns that sources take by them."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_config

from btlm_jax.recipe.mixture import MAX_TURNS, Turns, natural_weights, parse_weights, weights_of


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40) | st.sampled_from([1, 97]), min_size=1, max_size=9).filter(any))
def test_after_any_number_of_turns_each_source_is_within_one_of_its_share(weights):
    turns, total = Turns(weights=tuple(weights)), sum(weights)
    had = [0] * len(weights)
    for turn in range(2 * total + 3):
        assert turns.counts(turn) == had
        for weight, count in zip(weights, had, strict=True):
            assert abs(count - Fraction(turn * weight, total)) < 1
        source, before = turns.at(turn)
        assert before == had[source]
        had[source] += 1


def test_two_sources_take_turns_as_the_quotas_say():
    assert [Turns(weights=(3, 1)).at(turn) for turn in range(8)] == [
        *((0, 0), (0, 1), (0, 2), (1, 0)),
        *((0, 3), (0, 4), (0, 5), (1, 1)),
    ]
    far = 10**15 * 4
    assert Turns(weights=(3, 1)).at(far + 3) == (1, far // 4) and Turns(weights=(3, 1)).counts(far) == [
        3 * far // 4,
        far // 4,
    ]


def test_a_round_of_the_most_turns_is_listed_and_exact():
    weights = (1, 2, 3, 70_000, MAX_TURNS - 70_006)
    assert Turns(weights=weights).counts(MAX_TURNS) == list(weights)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web=3,books=1", ({"web": 3, "books": 1},)),
        (" books = 1 , web = 3, ", ({"web": 3, "books": 1},)),
        ("web=0.75,books=.25", None),
        ("web=0.75,books=0.250", ({"web": 3, "books": 1},)),
        ("web=1,books=0", ({"web": 1, "books": 0},)),
        ("web=6,books=2;web=2,books=2", ({"web": 3, "books": 1}, {"web": 1, "books": 1})),
        ("a,b=1,k=v=2,x=1=3,p;q=1;y=1", ({"a,b": 1, "k=v": 2, "x=1": 3, "p;q": 1}, {"y": 1})),
        ("natural", ({},)),
        (" natural ;web=2; natural=1;natural", ({}, {"web": 1}, {"natural": 1}, {})),
        ("web", None),
        ("web=", None),
        ("web=-1", None),
        ("=1", None),
        ("web=1e3", None),
        ("web=nan", None),
        ("web=\u0663", None),
    ],
    ids=str,
)
def test_weights_are_read(text, expected):
    if expected is not None:
        assert parse_weights(text) == expected
        return
    with pytest.raises(ValueError, match="cannot be read from .* on; it is SOURCE=NUMBER"):
        parse_weights(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("web=1,web=2", "names 'web' twice in one phase"),
        ("web=0,books=0", "has a phase without a weight above 0: only 'web', 'books'"),
        ("web=1/3,*=0", "has a phase without a weight above 0: only 'web=1/3,*'"),
        ("natural;", "has a phase without a weight above 0"),
        ("web=1;", "has a phase without a weight above 0"),
        ("web=0.000001,books=1", "1,000,001 together, and 100,000 is the most"),
    ],
)
def test_weights_that_mean_nothing_are_refused(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_weights(text)


def test_natural_weights_are_the_sizes_or_their_shares():
    assert natural_weights([6, 31]) == (6, 31) and natural_weights([6, 30]) == (1, 5)
    sizes = [3, 70_000, 629_997, 300_000]
    found = natural_weights(sizes)
    assert found == (1, 700, 6300, 3000)  # of 10,000; the first is more than its 0.03
    assert sum(found) <= 10_000 + len(sizes)


def test_the_sources_that_are_not_named_have_the_weight_of_the_others():
    sizes = dict.fromkeys(("books", "code", "web"), 7)

    def weights(text):
        [phase] = parse_weights(text)
        return weights_of(phase, sizes, of="the store")

    assert weights("web=4,*=2") == (1, 1, 2) and weights("web=4,*=0") == (0, 0, 1)
    assert weights("*=5") == weights("natural") == (1, 1, 1) and weights("web=1,books=2,code=0,*=9") == (2, 0, 1)
    assert weights_of({"*": 3, "web": 1}, {**sizes, "*": 1}, of="the store") == (3, 3, 1, 3)
    with pytest.raises(ValueError, match="weights of the 3 sources of the store are 0 together in a phase"):
        weights("web=0,books=0,code=0,*=1")
    assert weights("web=2,books=4,code=6,*=1") == (2, 3, 1)
    with pytest.raises(ValueError, match="are 100,001 together in a phase; they must be from 1 to 100,000"):
        weights("web=1,*=50000")


def test_a_config_has_weights_for_all_phases_or_for_each():
    prepared = {"corpus__source": "prepared"}
    for text, phases in (("", 0), ("web=1", 1), ("web=1; web=1", 2)):
        assert len(tiny_config(data__weights=text, **prepared).data.weights_by_phase) == phases
    with pytest.raises(ValueError, match="data.weights has 3 phases, curriculum has 2; give 1 or 2"):
        tiny_config(data__weights="web=1;web=1;web=1", **prepared)
    with pytest.raises(ValueError, match="corpus.source=prepared; installed_python makes one without"):
        tiny_config(data__weights="web=1")
