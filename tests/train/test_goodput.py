"""The ledger of wall seconds against a clock that only moves when told."""

import pytest

from btlm_jax.train.metric_writer import GoodputLedger


class Clock:
    """Seconds that pass only by assignment."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_ledger_counts_each_second_once():
    clock = Clock()
    ledger = GoodputLedger(clock)
    clock.now += 1
    with ledger.measure("step"):
        clock.now += 20
        with ledger.measure("checkpoint"):
            clock.now += 300
        clock.now += 4000
    with ledger.measure("step"):
        clock.now += 50_000
    assert ledger.seconds() == {"step": 54_020, "checkpoint": 300, "total": 54_321}


def test_ledger_counts_the_category_that_is_running():
    clock = Clock()
    ledger = GoodputLedger(clock)
    with ledger.measure("step"):
        clock.now += 3
        assert ledger.seconds() == {"step": 3, "total": 3}
        clock.now += 4
    assert ledger.seconds() == {"step": 7, "total": 7}


def test_ledger_counts_a_category_that_raised():
    clock = Clock()
    ledger = GoodputLedger(clock)
    with pytest.raises(OSError), ledger.measure("corpus"):
        clock.now += 5
        raise OSError
    clock.now += 7
    assert ledger.seconds() == {"corpus": 5, "total": 12}


def test_ledger_describes_shares_largest_first():
    clock = Clock()
    ledger = GoodputLedger(clock)
    for name, seconds in (("data wait", 36), ("step", 3168)):
        with ledger.measure(name):
            clock.now += seconds
    clock.now += 396
    assert ledger.describe() == "Time 1:00:00: step 88.0%, other 11.0%, data wait 1.0%"
