import collections

import numpy as np
import pytest
from grain.experimental import index_shuffle
from hypothesis import given, settings
from hypothesis import strategies as st

from btlm_jax.data.order import TrainingOrder, derived_seed
from btlm_jax.recipe.curriculum import Curriculum, make_curriculum


def make_order(curriculum: Curriculum, *, num_blocks: int, block_len: int, seed: int) -> TrainingOrder:
    return TrainingOrder(curriculum=curriculum, num_blocks=num_blocks, block_len=block_len, seed=seed)


def targets_of_run(order: TrainingOrder, *, first_step: int, end_step: int) -> np.ndarray:
    """Return every target (its place in the stream) of the steps, in training order."""
    targets = []
    for step in range(first_step, end_step):
        phase = order.curriculum.phase_at(step)
        first = (step - phase.first_step) * phase.batch_size
        for window in order.windows(phase, sequences=range(first, first + phase.batch_size)):
            assert 0 <= window.block < order.num_blocks and 0 <= window.window < order.block_len // phase.seq_len
            start = window.block * order.block_len + window.window * phase.seq_len
            targets.append(np.arange(start, start + phase.seq_len))
    return np.concatenate(targets) if targets else np.zeros(0, np.int64)


@st.composite
def runs(draw):
    """Draw (order, max_epochs) of 1 to 3 phases that fit into 1 or 2 epochs, sometimes on a longer block length."""
    lengths = draw(st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=3))
    block_len = max(lengths) * draw(st.sampled_from([1, 2]))
    tokens_per_step = 8 * draw(st.integers(1, 3))
    steps_per_whole_blocks = np.lcm(block_len, tokens_per_step) // tokens_per_step
    num_steps = [int(steps_per_whole_blocks) * draw(st.integers(1, 3)) for _ in lengths]
    num_steps[-1] += draw(st.integers(0, 3))
    max_epochs = draw(st.sampled_from([1, 2]))
    least_blocks = -(-sum(num_steps) * tokens_per_step // (block_len * max_epochs))
    order = make_order(
        make_curriculum(
            seq_len=tuple(lengths),
            batch_size=tuple(tokens_per_step // length for length in lengths),
            num_tokens=tuple(steps * tokens_per_step for steps in num_steps),
        ),
        num_blocks=least_blocks + draw(st.integers(0, 5)),
        block_len=block_len,
        seed=draw(st.integers(0, 1)),
    )
    return order, max_epochs


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(runs())
def test_every_token_is_a_target_once_an_epoch(run):
    order, max_epochs = run
    use = order.check_capacity(max_epochs=max_epochs)
    targets = targets_of_run(order, first_step=0, end_step=order.curriculum.num_steps)
    assert len(targets) == use.curriculum_tokens == use.capacity_tokens - use.unused_tokens
    assert use.unused_tokens == use.spare_steps * use.tokens_per_step + use.tail_tokens
    per_epoch = order.num_blocks * order.block_len
    for epoch in range(max_epochs):
        in_epoch = targets[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert len(np.unique(in_epoch)) == len(in_epoch)
    if use.unused_tokens == 0:
        assert set(collections.Counter(targets.tolist()).values()) == {max_epochs}
        assert len(np.unique(targets)) == per_epoch


@settings(max_examples=40, deadline=None)
@given(runs(), st.integers(1, 4))
def test_a_longer_last_phase_continues_the_same_order(run, more_steps):
    order, max_epochs = run
    phases = order.curriculum.phases
    longer = make_order(
        make_curriculum(
            seq_len=tuple(phase.seq_len for phase in phases),
            batch_size=tuple(phase.batch_size for phase in phases),
            num_tokens=(
                *(phase.num_tokens for phase in phases[:-1]),
                phases[-1].num_tokens + more_steps * order.curriculum.tokens_per_step,
            ),
        ),
        num_blocks=order.num_blocks,
        block_len=order.block_len,
        seed=order.seed,
    )
    num_steps = order.curriculum.num_steps
    before = targets_of_run(order, first_step=0, end_step=num_steps)
    extended = targets_of_run(longer, first_step=0, end_step=num_steps + more_steps)
    np.testing.assert_array_equal(extended[: len(before)], before)
    per_epoch = order.num_blocks * order.block_len
    for start in range(0, len(extended), per_epoch):
        assert len(np.unique(extended[start : start + per_epoch])) == len(extended[start : start + per_epoch])


def two_phases() -> Curriculum:
    return make_curriculum(seq_len=(4, 16), batch_size=(8, 2), num_tokens=(10 * 32, 4 * 32))


@pytest.mark.parametrize("per_block", [2, 4])
def test_the_order_is_the_documented_composition_of_permutations(per_block):
    length = 16 // per_block
    curriculum = make_curriculum(seq_len=(length, 16), batch_size=(32 // length, 2), num_tokens=(10 * 32, 4 * 32))
    order = make_order(curriculum, num_blocks=31, block_len=16, seed=7)
    first, last = order.curriculum.phases
    assert order.first_position(last) == 20
    num_windows = 20 * per_block
    for sequence in (0, 1, 37, num_windows - 1):
        window_seed, block_seed = derived_seed("windows", 7, 0, 0), derived_seed("blocks", 7, 0)
        index = index_shuffle(index=sequence, max_index=num_windows - 1, seed=window_seed, rounds=4)
        block = index_shuffle(index=index // per_block, max_index=30, seed=block_seed, rounds=4)
        [window] = order.windows(first, sequences=[sequence])
        assert (window.block, window.window) == (block, index % per_block)
    with pytest.raises(AssertionError, match=f"sequence {num_windows} is not of phase 1"):
        order.windows(first, sequences=[num_windows])
    for sequence, position in ((0, 20), (10, 30)):
        block = index_shuffle(index=position, max_index=30, seed=derived_seed("blocks", 7, 0), rounds=4)
        [window] = order.windows(last, sequences=[sequence])
        assert (window.block, window.window) == (block, 0)
    [second_epoch] = order.windows(last, sequences=[11])
    assert second_epoch.block == index_shuffle(index=0, max_index=30, seed=derived_seed("blocks", 7, 1), rounds=4)


def test_the_order_stays_the_same_between_versions():
    """A resumed run reads on in the order it began in, so these numbers may never change, under a new Grain either."""
    order = make_order(two_phases(), num_blocks=31, block_len=16, seed=7)
    first, last = order.curriculum.phases
    windows = order.windows(first, sequences=range(6)) + order.windows(last, sequences=range(4))
    assert [(window.block, window.window) for window in windows] == [
        (18, 1),
        (24, 2),
        (9, 1),
        (8, 0),
        (6, 2),
        (2, 3),
        (3, 0),
        (21, 0),
        (16, 0),
        (15, 0),
    ]


def test_windows_of_a_block_are_spread_over_batches():
    curriculum = make_curriculum(seq_len=(4, 16), batch_size=(64, 16), num_tokens=(16 * 256, 256))
    order = make_order(curriculum, num_blocks=272, block_len=16, seed=3)
    batch = order.windows(curriculum.phases[0], sequences=range(64))
    assert len({window.block for window in batch}) > 50  # 16 if the four windows of a block stayed together


def test_seed_and_epoch_change_the_order():
    curriculum = make_curriculum(seq_len=(16,), batch_size=(2,), num_tokens=(320,))
    order = make_order(curriculum, num_blocks=10, block_len=16, seed=3)
    other = make_order(curriculum, num_blocks=10, block_len=16, seed=4)
    phase = curriculum.phases[0]
    epoch_0, epoch_1 = order.windows(phase, sequences=range(10)), order.windows(phase, sequences=range(10, 20))
    assert epoch_0 != epoch_1 and sorted(w.block for w in epoch_0) == sorted(w.block for w in epoch_1)
    assert epoch_0 != other.windows(phase, sequences=range(10))


def test_capacity_error_gives_numbers_and_remedies():
    order = make_order(two_phases(), num_blocks=27, block_len=16, seed=7)
    with pytest.raises(
        ValueError, match="wants 448 tokens.* 27 blocks x 16 x 1 epochs = 432: .* 416 .*max_epochs to 2"
    ):
        order.check_capacity(max_epochs=1)
    assert order.check_capacity(max_epochs=2).spare_steps == (2 * 432 - 448) // 32


def test_capacity_reports_the_tail():
    use = make_order(two_phases(), num_blocks=31, block_len=16, seed=7).check_capacity(max_epochs=1)
    assert (use.unused_tokens, use.spare_steps, use.tail_tokens) == (48, 1, 16)
    assert "448 tokens = 0.903 epochs of 496" in str(use) and "tail of 16" in str(use)


def test_length_must_divide_the_block():
    with pytest.raises(ValueError, match="seq_len=4 of phase 1 does not divide .* 10"):
        make_order(two_phases(), num_blocks=31, block_len=10, seed=7)


def test_only_the_last_phase_may_end_inside_a_block():
    curriculum = make_curriculum(seq_len=(4, 16), batch_size=(8, 2), num_tokens=(9 * 32, 3 * 32))
    make_order(curriculum, num_blocks=31, block_len=32, seed=7)
    with pytest.raises(ValueError, match="phase 1 trains 288 tokens.*blocks of 64.*multiple of 64,"):
        make_order(curriculum, num_blocks=31, block_len=64, seed=7)
    with pytest.raises(ValueError, match="phase 1 trains 320 tokens.*blocks of 48.*multiple of 96,"):  # of steps too
        make_order(two_phases(), num_blocks=31, block_len=48, seed=7)


def test_more_windows_than_32_bits_are_refused():
    curriculum = make_curriculum(seq_len=(4, 16), batch_size=(8, 2), num_tokens=(320, 128))
    make_order(curriculum, num_blocks=1 << 30, block_len=16, seed=7)
    with pytest.raises(ValueError, match="4,294,967,296 windows of 4"):
        make_order(curriculum, num_blocks=(1 << 30) + 1, block_len=16, seed=7)
