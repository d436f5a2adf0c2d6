"""From an amount of text and a measured machine to a run: vocabulary, lengths, shape, batch, tokens. Arithmetic alone.

The family is that of configs/local_cpu.py: its parametrization and optimizer, of which muP makes other widths follow.

    shape        of SHAPES the one with the least predicted loss for the FLOPs that the time allows
    loss         E + A / N^alpha + B / D^beta of N parameters and D tokens (arXiv 2203.15556, approach 3), where tokens
                 that are read again are worth less than new ones (arXiv 2305.16264)
    curriculum   75 % of the tokens at a quarter of the block length, as BTLM (arXiv 2309.11568)
    schedule     wsd, which decays in the last fifth (arXiv 2405.18392)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from btlm_jax.recipe.sizes import Shape, shape_of
from btlm_jax.train.flops import flops_per_token

MAX_EPOCHS = 8
MAX_PARAMETERS_A_TOKEN = 8  # of training, epochs counted: beyond it a model learns its text by heart
MIN_STEPS, STEPS = 40, 1500  # the fewest; the batch doubles as long as so many steps are left
MIN_TOKENS_PER_STEP = 1024
PHASE_1_SHARE, DECAY_SHARE = 0.75, 0.2
STEP_OVERHEAD = 1.02  # of the loop around a step: batches, metrics, checkpoints
END_SECONDS = 12.0  # of a run's beginning and end that nothing else counts: plots, the sample, imports
_E, _A, _ALPHA, _B, _BETA = 1.69, 406.4, 0.34, 410.7, 0.28
_REPETITIONS = 15.4  # R* of arXiv 2305.16264
_BASE_LAYERS = 4  # of configs/local_cpu.py, whose peak learning rate was tuned
# Bytes of text from which on a vocabulary of so many ids is trained; the largest where products are cheap.
_VOCABULARIES = ((0, 512), (250_000, 1024), (1_000_000, 2048), (4_000_000, 4096), (100_000_000, 8192))
_ACCELERATOR_VOCABULARIES = ((1_000_000_000, 32_000),)
# Bytes of text from which on blocks have so many tokens.
_BLOCKS = ((0, 256), (500_000, 512))
_ACCELERATOR_BLOCKS = ((50_000_000, 2048), (2_000_000_000, 8192))


# (layers, width) of the shapes that are compared; heads and d_ff follow by recipe/sizes.py.
SHAPES = (
    *((2, 128), (3, 128), (4, 192), (4, 256), (5, 320), (6, 384), (8, 512), (10, 640), (12, 768), (16, 1024)),
    *((20, 1280), (24, 1536), (24, 2048), (32, 2560)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Sequence lengths of the two phases; the second is the block length of the store."""

    short: int
    block: int

    def at_most(self, length: int) -> Lengths:
        """Return lengths whose longer one is a power of two, at most `length`."""
        block = min(self.block, 1 << length.bit_length() - 1)
        return Lengths(short=max(1, block // 4), block=block)


def vocab_size_for(num_bytes: int, *, is_accelerator: bool) -> int:
    """Return the ids of a tokenizer that is trained on so many bytes of text."""
    return _last_reached(num_bytes, (*_VOCABULARIES, *(_ACCELERATOR_VOCABULARIES if is_accelerator else ())))


def lengths_for(num_bytes: int, *, is_accelerator: bool) -> Lengths:
    """Return the lengths of the phases for so many bytes of training text."""
    block = _last_reached(num_bytes, (*_BLOCKS, *(_ACCELERATOR_BLOCKS if is_accelerator else ())))
    return Lengths(short=block // 4, block=block)


def _last_reached(num_bytes: int, steps: Sequence[tuple[int, int]]) -> int:
    return [value for least, value in steps if num_bytes >= least][-1]


def predicted_loss(*, num_parameters: float, tokens: float, tokens_per_epoch: float) -> float:
    """Return the loss by the laws above, in nats; it serves to compare shapes and foretells none."""
    repetitions = max(tokens / tokens_per_epoch - 1, 0.0)
    repeated = tokens_per_epoch * _REPETITIONS * (1 - math.exp(-repetitions / _REPETITIONS))
    return _E + _A / num_parameters**_ALPHA + _B / (min(tokens, tokens_per_epoch) + repeated) ** _BETA


def choose_shape(*, vocab_size: int, flops: float, tokens_per_epoch: int, seq_len: int, max_parameters: float) -> Shape:
    """Return the shape of the least predicted loss after `flops` of training, or MAX_EPOCHS if these take less.

    `seq_len` is a typical length. No shape has more than `max_parameters`, nor more than MAX_PARAMETERS_A_TOKEN, but
    for the smallest.
    """
    shapes = [shape_of(d_model=width, num_layers=layers, vocab_size=vocab_size) for layers, width in SHAPES]
    best, least = shapes[0], math.inf
    for shape in shapes:
        tokens = min(flops / flops_per_token(shape, seq_len=seq_len), MAX_EPOCHS * tokens_per_epoch)
        count = shape.num_parameters
        if count > min(max_parameters, MAX_PARAMETERS_A_TOKEN * tokens):
            break
        loss = predicted_loss(num_parameters=count, tokens=tokens, tokens_per_epoch=tokens_per_epoch)
        if loss < least:
            best, least = shape, loss
    return best


def depth_factor(shape: Shape) -> float:
    """Return the factor on the family's peak learning rate, which under muP falls with the root of the depth."""
    return min(1.0, math.sqrt(_BASE_LAYERS / shape.num_layers))


def tokens_per_step_for(tokens: float, *, block_len: int, num_devices: int) -> int:
    """Return the tokens of a step of a run of about `tokens`: twice as many as long as STEPS steps are left."""
    least = block_len * num_devices
    size = least * -(-MIN_TOKENS_PER_STEP // least)
    while tokens / (2 * size) >= STEPS:
        size *= 2
    return size


def run_values(
    *, lengths: Lengths, tokens_per_step: int, num_steps: int, tokens_per_epoch: int, peak: float, step_seconds: float
) -> dict[str, dict]:
    """Return the keys of the config that follow from the number of steps, by section; `peak` is the learning rate's."""
    num_steps = max(num_steps, MIN_STEPS)
    first = round(PHASE_1_SHARE * num_steps)
    warmup = max(num_steps // 20, min(40, num_steps // 10))
    return {
        "curriculum": {
            "seq_len": (lengths.short, lengths.block),
            "batch_size": (tokens_per_step // lengths.short, tokens_per_step // lengths.block),
            "num_tokens": (first * tokens_per_step, (num_steps - first) * tokens_per_step),
        },
        "optimizer": {
            "schedule": "wsd",
            "peak_learning_rate": peak,
            "end_learning_rate": peak / 100,
            "warmup_tokens": warmup * tokens_per_step,
            "decay_share": DECAY_SHARE,
        },
        "data": {"max_epochs": -(-num_steps * tokens_per_step // tokens_per_epoch)},
        "evaluation": {"every_steps": -(-num_steps // 4)},
        "checkpoint": {"every_steps": max(1, min(-(-num_steps // 5), round(60 / step_seconds)))},
        "log": {"every_steps": max(1, num_steps // 200)},
    }
