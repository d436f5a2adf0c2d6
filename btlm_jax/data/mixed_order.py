"""The order of training data where sources have weights: each source's stream in an order of its own. No state.

Which source sequence j of a phase is of, and how many of its windows came before, say the `Turns` of recipe/mixture.py.
With that number a source's stream is read as order.py reads a store that has no other: positions over all epochs, each
epoch another permutation, a stretch of positions for each phase. A stretch is whole blocks, so that the next phase can
cut the others into windows of its own length; up to a block less one window of each source stays unread where a phase
ends.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from btlm_jax.data.order import Stretch, Window, check_windows
from btlm_jax.data.store import SOURCES, TRAIN, Manifest, describe_repetition, streams_of
from btlm_jax.recipe.curriculum import Curriculum, Phase
from btlm_jax.recipe.mixture import Turns, weights_of

_MUCH_PADDING = 0.01  # of a source's targets; it is said


class Stream(NamedTuple):
    """The blocks of a source."""

    source: str
    first_block: int
    num_blocks: int
    num_tokens: int  # targets, the padding of the last block not counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedOrder:
    """The order of a whole run with weights, a pure function of its fields.

    Raises:
      ValueError: as of `order.TrainingOrder`, but that phases need not be whole blocks.
    """

    curriculum: Curriculum
    streams: tuple[Stream, ...]
    weights: tuple[tuple[int, ...], ...]  # of the streams, of each phase
    block_len: int
    seed: int

    def __post_init__(self):
        for stream in self.streams:
            check_windows(self.curriculum, num_blocks=stream.num_blocks, block_len=self.block_len)
        _ = self._stretches

    @functools.cached_property
    def turns(self) -> tuple[Turns, ...]:
        """The sources' turns in each phase."""
        return tuple(Turns(weights=weights) for weights in self.weights)

    @functools.cached_property
    def _stretches(self) -> tuple[tuple[Stretch, ...], ...]:
        """What each phase reads of each stream."""
        starts = [0 for _ in self.streams]
        stretches = []
        for phase in self.curriculum.phases:
            per_block = self.block_len // phase.seq_len
            counts = self.turns[phase.index].counts(phase.num_steps * phase.batch_size)
            ends = [start + -(-count // per_block) for start, count in zip(starts, counts, strict=True)]
            is_last = phase == self.curriculum.phases[-1]
            stretches.append(
                tuple(
                    Stretch(
                        start=start,
                        end=None if is_last else end,
                        num_blocks=stream.num_blocks,
                        per_block=per_block,
                        seed=self.seed,
                        phase_index=phase.index,
                        source=(stream.source,),
                    )
                    for stream, start, end in zip(self.streams, starts, ends, strict=True)
                )
            )
            starts = ends
        return tuple(stretches)

    def windows(self, phase: Phase, *, sequences: Iterable[int]) -> list[Window]:
        """Return the window of each sequence number; as of `order.TrainingOrder`."""
        turns, stretches = self.turns[phase.index], self._stretches[phase.index]
        windows = []
        for sequence in sequences:
            number, of_source = turns.at(sequence)
            window = stretches[number].window(of_source)
            windows.append(dataclasses.replace(window, block=self.streams[number].first_block + window.block))
        return windows

    def epochs_seen(self, step: int) -> dict[str, float]:
        """Return how many times the first `step` steps read each source, as metrics by their names."""
        phase = self.curriculum.phase_at(step)
        counts = self.turns[phase.index].counts((step - phase.first_step) * phase.batch_size)
        epochs = {}
        for stream, stretch, count in zip(self.streams, self._stretches[phase.index], counts, strict=True):
            blocks = stretch.start + count / stretch.per_block
            epochs[f"epochs/{stream.source}"] = blocks / stream.num_blocks
        return epochs

    def check_capacity(self, *, max_epochs: int) -> MixtureUse:
        """Check that the run fits into the epochs allowed of each source, and return how much of each it uses.

        Raises:
          ValueError: of a source more is read.
        """
        epochs = self.epochs_seen(self.curriculum.num_steps)
        tokens = [self._num_tokens(phase) for phase in self.curriculum.phases]
        uses = [
            SourceUse(
                source=stream.source,
                num_tokens=sum(of_source),
                tokens_per_epoch=stream.num_blocks * self.block_len,
                padding=stream.num_blocks * self.block_len - stream.num_tokens,
                epochs=epochs[f"epochs/{stream.source}"],
            )
            for stream, *of_source in zip(self.streams, *tokens, strict=True)
        ]
        if over := [use for use in uses if use.epochs > max_epochs]:
            times = ", ".join(f"{use.source} {use.epochs:.2f} times" for use in over)
            raise ValueError(
                f"the curriculum and data.weights read {times}, and data.max_epochs={max_epochs}: raise it to "
                f"{max(math.ceil(use.epochs) for use in over)}, lower these weights, or lower curriculum.num_tokens"
            )
        return MixtureUse(
            shares=tuple(self._describe_shares(phase) for phase in self.curriculum.phases),
            sources=tuple(uses),
            num_unread=sum(-number % self.block_len for of_phase in tokens[:-1] for number in of_phase),
            max_epochs=max_epochs,
        )

    def _num_tokens(self, phase: Phase) -> list[int]:
        """Return how many targets of each stream a phase reads."""
        counts = self.turns[phase.index].counts(phase.num_steps * phase.batch_size)
        return [count * phase.seq_len for count in counts]

    def _describe_shares(self, phase: Phase) -> str:
        weights = self.weights[phase.index]
        return ", ".join(
            f"{stream.source} {weight / sum(weights):.2%}" if weight else f"no {stream.source}"
            for stream, weight in zip(self.streams, weights, strict=True)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceUse:
    """How much of a source a run reads, in targets."""

    source: str
    num_tokens: int
    tokens_per_epoch: int
    padding: int  # of an epoch's, at the end of its last block
    epochs: float  # with what stays unread at phases' ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureUse:
    """How much of each source a run reads."""

    shares: tuple[str, ...]  # a text a phase
    sources: tuple[SourceUse, ...]
    num_unread: int  # tokens that phases leave unread where they end
    max_epochs: int

    def __str__(self) -> str:
        total = sum(use.num_tokens for use in self.sources)
        lines = [f"{total:,} tokens by data.weights, of each source at most data.max_epochs={self.max_epochs} epochs"]
        lines += [f"  phase {number}: {text}" for number, text in enumerate(self.shares, start=1)]
        for use in self.sources:
            if not use.num_tokens:
                lines.append(f"  {use.source}: none of its {use.tokens_per_epoch:,} tokens")
                continue
            share = use.padding / use.tokens_per_epoch
            padding = f" ({share:.0%} of it padding: the source is small for blocks)" if share >= _MUCH_PADDING else ""
            lines.append(
                f"  {use.source}: {use.num_tokens:,} tokens ({use.num_tokens / total:.2%}) = {use.epochs:.3f} epochs "
                f"of {use.tokens_per_epoch:,}{padding}{describe_repetition(use.epochs)}"
            )
        if self.num_unread:
            lines.append(f"  {self.num_unread:,} tokens of blocks that phases end in stay unread in their epoch")
        return "\n".join(lines)

    def to_json(self) -> dict:
        return {
            "sources": {
                use.source: {"tokens": use.num_tokens, "epochs": use.epochs, "tokens_per_epoch": use.tokens_per_epoch}
                for use in self.sources
            }
        }


def make_mixed_order(
    manifest: Manifest, *, curriculum: Curriculum, weights: tuple[dict[str, int], ...], seed: int
) -> MixedOrder:
    """Make the order of a run on a store with one stream a source; `weights` are of all phases, or of each.

    Raises:
      ValueError: the store has one stream of all sources, the weights name other sources than it has, or it does not
        serve the curriculum.
    """
    if SOURCES not in manifest.features:
        raise ValueError(
            "data.weights needs a stream of training blocks for each source, and this token store, of format 1, has "
            "one of all. The command that makes it anew, SPLIT being what btlm corpus split wrote, and TOKENIZER that "
            "of this store or its directory:\n  btlm corpus tokenize --by_source --input=SPLIT --tokenizer=TOKENIZER "
            f"--block_len={manifest.block_len} --output=NEW_STORE"
        )
    streams = tuple(
        Stream(source, part.first_block, part.num_blocks, part.num_tokens)
        for source, part in streams_of(manifest.splits[TRAIN])
    )
    sizes = {stream.source: stream.num_blocks for stream in streams}
    by_phase = weights * len(curriculum.phases) if len(weights) == 1 else weights
    return MixedOrder(
        curriculum=curriculum,
        streams=streams,
        weights=tuple(weights_of(given, sizes, of="the token store") for given in by_phase),
        block_len=manifest.block_len,
        seed=seed,
    )
