"""The arithmetic that sizes a run: against the laws as published, and as configs that are valid and fill the time."""

import dataclasses
import math

import pytest
from support.tiny import config_dict

from btlm_jax.data.store import Source, Split
from btlm_jax.recipe import sizes
from btlm_jax.recipe.config import train_config_from
from btlm_jax.train import sizing
from btlm_jax.train.size_run import _num_blocks

LENGTHS = sizing.Lengths(short=128, block=512)


def chosen(**changes):
    wanted = {"flops": 1e13, "tokens_per_epoch": 10**7, "seq_len": 224, "max_parameters": 1e12} | changes
    return sizing.choose_shape(vocab_size=4096, **wanted)


def test_the_loss_is_the_published_law():
    once = sizing.predicted_loss(num_parameters=70e9, tokens=1.4e12, tokens_per_epoch=1.4e12)
    assert once == pytest.approx(1.69 + 0.0837 + 0.1628, abs=1e-3)  # Chinchilla: 1.936 (arXiv 2203.15556, eq. 10)
    four = sizing.predicted_loss(num_parameters=70e9, tokens=4e9, tokens_per_epoch=1e9)
    new = sizing.predicted_loss(num_parameters=70e9, tokens=4e9, tokens_per_epoch=4e9)
    assert four - new < 0.02 < sizing.predicted_loss(num_parameters=70e9, tokens=1e9, tokens_per_epoch=1e9) - new
    many = sizing.predicted_loss(num_parameters=70e9, tokens=1e15, tokens_per_epoch=1e9)
    assert many == pytest.approx(sizing.predicted_loss(num_parameters=70e9, tokens=16.4e9, tokens_per_epoch=16.4e9))


def test_the_shape_is_the_best_of_all_and_grows_with_the_time():
    shapes = [chosen(flops=flops, tokens_per_epoch=10**12) for flops in (1e12, 1e14, 1e16, 1e18, 1e20)]
    counts = [shape.num_parameters for shape in shapes]
    assert counts == sorted(counts) and len(set(counts)) > 3
    # With the optimum of the law itself, N = G (C/6)^(beta/(alpha+beta)); the ladder's steps are factors of about 2.
    optimum = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (1e18 / 6) ** (0.28 / 0.62)
    assert 0.4 < counts[3] / optimum < 2.5


def test_no_shape_is_too_large_for_the_memory_or_for_the_text():
    assert chosen(flops=1e20, max_parameters=0) == sizes.shape_of(d_model=128, num_layers=2, vocab_size=4096)
    assert chosen(flops=1e20, max_parameters=3e6).num_parameters <= 3e6
    of_little = chosen(flops=1e20, tokens_per_epoch=100_000)
    assert of_little.num_parameters <= sizing.MAX_PARAMETERS_A_TOKEN * sizing.MAX_EPOCHS * 100_000


@pytest.mark.parametrize("shape", sizing.SHAPES)
@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_shape_gives_a_valid_config(shape, num_devices):
    values = config_dict("local_cpu")
    values["model"] |= dataclasses.asdict(sizes.shape_of(d_model=shape[1], num_layers=shape[0], vocab_size=4096))
    step = sizing.tokens_per_step_for(1e7, block_len=512, num_devices=num_devices)
    for section, more in sizing.run_values(
        lengths=LENGTHS, tokens_per_step=step, num_steps=1234, tokens_per_epoch=10**6, peak=0.006, step_seconds=0.1
    ).items():
        values[section] |= more
    config = train_config_from(values)
    table = config.curriculum.table
    assert table.num_steps == 1234 and table.phases[0].num_steps == 926  # 75 %
    assert all(phase.batch_size % num_devices == 0 for phase in table.phases)
    assert table.phases[0].num_tokens % table.block_len == 0
    assert config.data.max_epochs == math.ceil(1234 * step / 10**6)
    assert config.model.head_dim % 8 == 0 and config.optimizer.schedule == "wsd"


@pytest.mark.parametrize("num_steps", [1, 40, 41, 399, 10_000])
def test_the_schedule_of_any_length_fits(num_steps):
    values = config_dict("local_cpu")
    for section, more in sizing.run_values(
        lengths=LENGTHS, tokens_per_step=1024, num_steps=num_steps, tokens_per_epoch=10**6, peak=0.006, step_seconds=9
    ).items():
        values[section] |= more
    assert train_config_from(values).curriculum.table.num_steps == max(num_steps, sizing.MIN_STEPS)


def test_the_batch_doubles_while_steps_are_left():
    def steps(tokens):
        return tokens / sizing.tokens_per_step_for(tokens, block_len=512, num_devices=1)

    assert sizing.tokens_per_step_for(10_000, block_len=256, num_devices=1) == 1024
    assert all(sizing.STEPS <= steps(10**power) < 2 * sizing.STEPS for power in range(7, 12))
    assert sizing.tokens_per_step_for(10_000, block_len=512, num_devices=3) == 1536


def test_vocabulary_and_lengths_grow_with_the_text():
    for values in (
        [sizing.vocab_size_for(10**power, is_accelerator=False) for power in range(4, 14)],
        [sizing.lengths_for(10**power, is_accelerator=True).block for power in range(4, 14)],
    ):
        assert values == sorted(values) and len(set(values)) > 3
    assert sizing.lengths_for(64_000, is_accelerator=False) == sizing.Lengths(short=64, block=256)
    # The smallest text fills at least one block of what is held out: 16 kB, at no more than 8 bytes a token.
    assert 16_000 / 8 > sizing.lengths_for(64_000, is_accelerator=False).block


def test_lengths_stay_within_what_a_model_was_trained_at():
    lengths = sizing.Lengths(short=128, block=512)
    assert lengths.at_most(8192) == lengths
    assert [lengths.at_most(n) for n in (511, 48, 1)] == [
        sizing.Lengths(short=s, block=b) for s, b in ((64, 256), (8, 32), (1, 1))
    ]


def test_weighted_sources_are_what_there_is_to_train_on():
    sources = {
        name: Source(num_documents=1, num_bytes=1, num_tokens=1, first_block=first, num_blocks=count)
        for name, first, count in (("a", 0, 5), ("b", 5, 3))
    }
    train = Split(num_blocks=8, num_tokens=9, shards=(), sources=sources)
    assert [
        _num_blocks(train, weights)
        for weights in ((), ({"a": 1, "b": 0},), ({"a": 1, "b": 0}, {"a": 0, "b": 1}), ({"a": 1, "b": 0}, {}))
    ] == [
        *(8, 5, 8, 8),
    ]
    with pytest.raises(ValueError, match="data.weights names 'c', which the token store does not have"):
        _num_blocks(train, ({"a": 1, "b": 1, "c": 1},))
