"""The sequence-length curriculum: which phase a step is in, how long, how many sequences, which tokens.

The one home of the variable-sequence-length facts. Pure host integers; nothing here touches JAX.
BTLM trains 75 % of its tokens at 2,048 and the rest at 8,192, at 3,932,160 tokens a step throughout
(arXiv 2309.11568; the published configs `params_btlm_2p7b_{2k,8k}.yaml`).
"""

from __future__ import annotations

import dataclasses

_MOST_STEPS, _MOST_TOKENS = 2**26, 2**62  # a run keeps a learning rate for each step; tokens are int64 of NumPy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of steps with one sequence length and one global batch size (in sequences)."""

    index: int
    seq_len: int
    batch_size: int
    first_step: int
    num_steps: int

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.tokens_per_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
    """The phases of a run, in order, at a constant number of tokens a step."""

    phases: tuple[Phase, ...]

    @property
    def num_steps(self) -> int:
        return self.phases[-1].end_step

    @property
    def tokens_per_step(self) -> int:
        return self.phases[0].tokens_per_step

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.tokens_per_step

    @property
    def block_len(self) -> int:
        """Tokens in a block of the store that serves every phase: the longest sequence."""
        return max(phase.seq_len for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """Return the phase that trains `step`; the last phase also answers for the end of the run."""
        if step < 0:
            raise ValueError(f"step={step} is negative")
        return next((phase for phase in self.phases if step < phase.end_step), self.phases[-1])

    def longest_trained(self, step: int) -> int:
        """Return the longest sequence length of the first `step` steps, in tokens; of none, that of the first phase."""
        return max(phase.seq_len for phase in self.phases if phase.index == 0 or phase.first_step < step)

    def tokens_seen(self, step: int) -> int:
        """Return the exact number of tokens the first `step` steps train on."""
        return step * self.tokens_per_step


def make_curriculum(
    *, seq_len: tuple[int, ...], batch_size: tuple[int, ...], num_tokens: tuple[int, ...]
) -> Curriculum:
    """Make the phase table from three equally long tuples, one entry a phase.

    Raises:
      ValueError: lengths differ, a number is not positive, a length does not divide the longest,
        the tokens per step differ between phases, a phase is not a whole number of steps, or there are too many.
    """
    if not len(seq_len) == len(batch_size) == len(num_tokens) >= 1:
        raise ValueError(
            "curriculum.seq_len, curriculum.batch_size and curriculum.num_tokens need one entry a phase: "
            f"got {len(seq_len)}, {len(batch_size)} and {len(num_tokens)} entries"
        )
    for name, values in (("seq_len", seq_len), ("batch_size", batch_size), ("num_tokens", num_tokens)):
        if any(value <= 0 for value in values):
            raise ValueError(f"curriculum.{name}={values} must be positive in every phase")
    longest = max(seq_len)
    phases: list[Phase] = []
    first_step = 0
    for index, (length, batch, tokens) in enumerate(zip(seq_len, batch_size, num_tokens, strict=True)):
        if longest % length:
            raise ValueError(
                f"curriculum.seq_len={seq_len}: {length} does not divide the longest length {longest}; "
                "windows are cut from blocks of the longest length, so choose a divisor"
            )
        per_step = length * batch
        if per_step != seq_len[0] * batch_size[0]:
            raise ValueError(
                f"phase {index + 1} has {length} x {batch} = {per_step:,} tokens a step, but phase 1 has "
                f"{seq_len[0]} x {batch_size[0]} = {seq_len[0] * batch_size[0]:,}: tokens per step must be equal "
                f"in all phases (curriculum.seq_len x curriculum.batch_size)"
            )
        num_steps = tokens // per_step
        if tokens % per_step:
            raise ValueError(
                f"curriculum.num_tokens of phase {index + 1} is {tokens:,}, not a whole number of steps of "
                f"{per_step:,} tokens; the nearest are {num_steps * per_step:,} and {(num_steps + 1) * per_step:,}"
            )
        phases.append(Phase(index=index, seq_len=length, batch_size=batch, first_step=first_step, num_steps=num_steps))
        first_step += num_steps
    if first_step >= _MOST_STEPS or sum(num_tokens) >= _MOST_TOKENS:
        raise ValueError(
            f"curriculum.num_tokens={num_tokens} are {first_step:,} steps and {sum(num_tokens):,} tokens; both are "
            f"counted up to {_MOST_STEPS - 1:,} and {_MOST_TOKENS - 1:,}"
        )
    return Curriculum(phases=tuple(phases))
