"""The phase table against arithmetic done by hand and by enumeration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import config_dict

from btlm_jax.recipe.config import train_config_from
from btlm_jax.recipe.curriculum import make_curriculum


def test_btlm_numbers():
    table = train_config_from(config_dict("btlm_3b_8k")).curriculum.table
    assert [phase.num_steps for phase in table.phases] == [119_727, 39_909]
    assert [phase.tokens_per_step for phase in table.phases] == [3_932_160, 3_932_160]
    assert table.num_steps == 159_636
    assert table.num_tokens == 627_714_293_760  # 627.71 B
    assert table.phases[0].num_tokens / table.num_tokens == 0.75
    assert table.block_len == 8192
    assert hash(table) == hash(train_config_from(config_dict("btlm_3b_8k")).curriculum.table)


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 9)), min_size=1, max_size=4))
def test_phase_at_equals_enumeration(spec):
    longest = max(length for length, _ in spec)
    batch = [8 * longest // length for length, _ in spec]
    per_step = 8 * longest
    table = make_curriculum(
        seq_len=tuple(length for length, _ in spec),
        batch_size=tuple(batch),
        num_tokens=tuple(steps * per_step for _, steps in spec),
    )
    enumerated = [index for index, (_, steps) in enumerate(spec) for _ in range(steps)]
    assert [table.phase_at(step).index for step in range(table.num_steps)] == enumerated
    lengths = [length for length, steps in spec for _ in range(steps)]
    for step in range(1, table.num_steps + 1):
        assert table.longest_trained(step) == max(lengths[:step])
    assert table.longest_trained(0) == lengths[0]
    assert table.phase_at(table.num_steps).index == len(spec) - 1
    assert table.tokens_seen(table.num_steps) == table.num_tokens == sum(phase.num_tokens for phase in table.phases)
    assert [phase.end_step for phase in table.phases[:-1]] == [phase.first_step for phase in table.phases[1:]]


@pytest.mark.parametrize(
    "seq_len, batch_size, num_tokens, message",
    [
        ((4, 8), (6, 3), (24,), "need one entry a phase: got 2, 2 and 1 entries"),
        ((), (), (), "need one entry a phase"),
        ((4, 8), (6, 4), (24, 32), "phase 2 has 8 x 4 = 32 tokens a step, but phase 1 has 4 x 6 = 24"),
        ((3, 8), (8, 3), (24, 24), "3 does not divide the longest length 8"),
        ((4, 8), (2, 1), (8, 8 * (2**26 - 1)), "are 67,108,864 steps and .* counted up to 67,108,863"),
        ((2**31,), (2**30,), (2**62,), r"are 2 steps and 4,611,686,018,427,387,904 tokens; .* counted up to"),
        (
            (4, 8),
            (6, 3),
            (24, 30),
            "phase 2 is 30, not a whole number of steps of 24 tokens; the nearest are 24 and 48",
        ),
        ((0, 8), (6, 3), (24, 24), r"curriculum.seq_len=\(0, 8\) must be positive in every phase"),
        ((4, 8), (6, -3), (24, 24), r"curriculum.batch_size=\(6, -3\) must be positive"),
        ((4, 8), (6, 3), (0, 24), r"curriculum.num_tokens=\(0, 24\) must be positive"),
    ],
)
def test_an_impossible_table_is_refused(seq_len, batch_size, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        make_curriculum(seq_len=seq_len, batch_size=batch_size, num_tokens=num_tokens)


def test_a_negative_step_is_refused():
    table = make_curriculum(seq_len=(4,), batch_size=(2,), num_tokens=(8,))
    with pytest.raises(ValueError, match="step=-1"):
        table.phase_at(-1)
