"""The order of training data, as arithmetic: which window of which block is sequence j of a phase. No I/O, no state.

Positions 0, 1, 2, ... enumerate blocks in training order over all epochs: with N blocks in the train split, position p
is in epoch e = p // N and is block pi_e(p mod N), where pi_e is Grain's `index_shuffle` (a Feistel permutation).
Each phase owns a contiguous range of positions; the last phase owns all from its first position on, so a run whose last
phase gets more tokens continues in the same order. The windows of a phase's positions within one epoch (a segment) are
permuted again, so that the windows of one block are not in one batch. With data.weights each source has positions of
its own: mixed_order.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from grain.experimental import index_shuffle

from btlm_jax.data.store import TRAIN, Manifest, StoreUse
from btlm_jax.recipe.config import DataConfig
from btlm_jax.recipe.curriculum import Curriculum, Phase

if TYPE_CHECKING:
    from btlm_jax.data.mixed_order import MixedOrder

FEISTEL_ROUNDS = 4
MAX_INDICES = 1 << 32  # index_shuffle computes in 32 bits and wraps silently beyond


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """`seq_len` targets of one block: those from `window * seq_len` on."""

    block: int
    window: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """The positions of a stream of blocks that a phase owns, from `start` to before `end`; without an end all."""

    start: int
    end: int | None
    num_blocks: int  # of the stream, and so positions of an epoch
    per_block: int  # windows of a block
    seed: int
    phase_index: int
    source: tuple[str, ...]  # whose stream it is, or () of the stream of all

    def window(self, sequence: int) -> Window:
        """Return the window of a sequence number, counted from the stretch's first."""
        epoch = (self.start + sequence // self.per_block) // self.num_blocks
        epoch_start = epoch * self.num_blocks
        segment_start = max(self.start, epoch_start)
        segment_end = epoch_start + self.num_blocks
        if self.end is not None:
            segment_end = min(segment_end, self.end)
        index = (self.start - segment_start) * self.per_block + sequence
        num_windows = (segment_end - segment_start) * self.per_block
        assert 0 <= index < num_windows, f"sequence {sequence} is not of phase {self.phase_index + 1}"
        if self.per_block > 1:
            seed = derived_seed("windows", self.seed, self.phase_index, epoch, *self.source)
            index = _permuted(index, length=num_windows, seed=seed)
        in_epoch = segment_start + index // self.per_block - epoch_start
        block_seed = derived_seed("blocks", self.seed, epoch, *self.source)
        block = _permuted(in_epoch, length=self.num_blocks, seed=block_seed)
        return Window(block=block, window=index % self.per_block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOrder:
    """The order of a whole run, a pure function of its fields.

    Raises:
      ValueError: a phase's length does not divide block_len, a phase but the last is not whole blocks, or the
        split has more windows than a 32-bit permutation can order.
    """

    curriculum: Curriculum
    num_blocks: int  # N, of the train split
    block_len: int  # targets in a block
    seed: int

    def __post_init__(self):
        phases = self.curriculum.phases
        check_windows(self.curriculum, num_blocks=self.num_blocks, block_len=self.block_len)
        for phase in phases:
            number = phase.index + 1
            if phase != phases[-1] and phase.num_tokens % self.block_len:
                nearest = math.lcm(self.block_len, phase.tokens_per_step)
                raise ValueError(
                    f"phase {number} trains {phase.num_tokens:,} tokens, which is not a whole number of the token "
                    f"store's blocks of {self.block_len:,}; make curriculum.num_tokens of phase {number} a multiple "
                    f"of {nearest:,}, or build the store with block length {self.curriculum.block_len:,}"
                )

    def windows_per_block(self, phase: Phase) -> int:
        """Return how many windows of the phase's length a block holds."""
        return self.block_len // phase.seq_len

    def first_position(self, phase: Phase) -> int:
        """Return the first of the positions that the phase owns."""
        return sum(earlier.num_tokens for earlier in self.curriculum.phases[: phase.index]) // self.block_len

    def windows(self, phase: Phase, *, sequences: Iterable[int]) -> list[Window]:
        """Return the window of each sequence number, counted from the phase's first sequence.

        In the last phase numbers past its end are allowed too: they are what a longer run would read.
        """
        start = self.first_position(phase)
        stretch = Stretch(
            start=start,
            end=None if phase == self.curriculum.phases[-1] else start + phase.num_tokens // self.block_len,
            num_blocks=self.num_blocks,
            per_block=self.windows_per_block(phase),
            seed=self.seed,
            phase_index=phase.index,
            source=(),
        )
        return [stretch.window(sequence) for sequence in sequences]

    def epochs_seen(self, step: int) -> dict[str, float]:
        """Return how many times the first `step` steps read the store, as a metric by its name."""
        return {"epochs": self.curriculum.tokens_seen(step) / (self.num_blocks * self.block_len)}

    def check_capacity(self, *, max_epochs: int) -> StoreUse:
        """Check that the run fits into the epochs allowed, and return how much of the store it uses.

        Raises:
          ValueError: the curriculum wants more tokens than the store gives in `max_epochs` epochs.
        """
        use = StoreUse(
            curriculum_tokens=self.curriculum.num_tokens,
            tokens_per_step=self.curriculum.tokens_per_step,
            tokens_per_epoch=self.num_blocks * self.block_len,
            max_epochs=max_epochs,
        )
        if use.curriculum_tokens > use.capacity_tokens:
            fitting = use.capacity_tokens // use.tokens_per_step * use.tokens_per_step
            raise ValueError(
                f"the curriculum wants {use.curriculum_tokens:,} tokens, but the token store gives {self.num_blocks:,} "
                f"blocks x {self.block_len:,} x {max_epochs} epochs = {use.capacity_tokens:,}: lower "
                f"curriculum.num_tokens to {fitting:,} in all, take a store with more tokens, or raise "
                f"data.max_epochs to {-(-use.curriculum_tokens // use.tokens_per_epoch)}"
            )
        return use


def check_windows(curriculum: Curriculum, *, num_blocks: int, block_len: int) -> None:
    """Check that blocks give whole windows of every phase, and not more than can be ordered.

    Raises:
      ValueError: they do not.
    """
    for phase in curriculum.phases:
        if block_len % phase.seq_len:
            raise ValueError(
                f"curriculum.seq_len={phase.seq_len} of phase {phase.index + 1} does not divide the token store's "
                f"block length {block_len}; choose a divisor, or build the store for this curriculum"
            )
        if num_blocks * (block_len // phase.seq_len) > MAX_INDICES:
            raise ValueError(
                f"{num_blocks:,} blocks of {block_len:,} have more than {MAX_INDICES:,} windows of {phase.seq_len}, "
                "the most a 32-bit permutation orders; use longer sequences or fewer blocks"
            )


def make_order(manifest: Manifest, *, curriculum: Curriculum, data: DataConfig) -> TrainingOrder | MixedOrder:
    """Make the order of a run on a token store, by sources with data.weights.

    Raises:
      ValueError: the store does not serve the curriculum or the weights.
    """
    if data.weights:
        from btlm_jax.data.mixed_order import make_mixed_order  # a run without weights needs none of it

        weights = data.weights_by_phase
        return make_mixed_order(manifest, curriculum=curriculum, weights=weights, seed=data.seed)
    return TrainingOrder(
        curriculum=curriculum,
        num_blocks=manifest.splits[TRAIN].num_blocks,
        block_len=manifest.block_len,
        seed=data.seed,
    )


@functools.lru_cache(maxsize=1024)
def derived_seed(purpose: str, *of: int | str) -> int:
    """Return a 32-bit seed: the first 4 bytes, little-endian, of blake2b over the JSON list `[purpose, *of]`."""
    text = json.dumps([purpose, *of])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


# Grain permutes a domain of at least 2**16 and repeats until the result is below `length`, so that a call takes
# milliseconds for a store of a few blocks (4 us from 2**16 on). The cache holds whole permutations of such a store.
@functools.lru_cache(maxsize=1 << 14)
def _permuted(index: int, *, length: int, seed: int) -> int:
    return index_shuffle(index, length - 1, seed, FEISTEL_ROUNDS)
