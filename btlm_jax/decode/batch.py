"""Continue texts: prefill the prompts in pieces, then decode token by token over a cache of keys and values.

Logits come from the device, tokens are drawn on the host (sampling.py): every process draws the same from a seed. Ids
only; text is in detokenize.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from btlm_jax.decode.decoder import CACHE_DTYPES, bucket, make_decoder
from btlm_jax.decode.sampling import Sampling, draw, make_generator
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm
from btlm_jax.parallel.mesh import FSDP

FIRST_STRETCH = 128  # new tokens that a cache has room for from the start; it doubles when it is full


class Ending(enum.StrEnum):
    """Why a text ended."""

    LENGTH = "length"
    END_OF_DOCUMENT = "end of document"
    STOP_STRING = "stop string"


@dataclasses.dataclass(kw_only=True)
class Speed:
    """Where the time of generating went: compilation, prompt tokens, new tokens.

    A decoding call that compiles counts as compilation, its tokens left out; of prefill, what JAX says it compiled.
    """

    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @contextlib.contextmanager
    def measure_prefill(self, num_tokens: int) -> Iterator[None]:
        """Count what happens inside as running a prompt's tokens."""
        start = time.perf_counter()
        with _compilation() as compiled:
            yield
        seconds = time.perf_counter() - start
        self.compile_seconds += min(seconds, sum(compiled))
        self.prefill_seconds += max(0.0, seconds - sum(compiled))
        self.prefill_tokens += num_tokens

    @contextlib.contextmanager
    def measure_decode(self, num_tokens: int) -> Iterator[None]:
        """Count what happens inside as making new tokens."""
        start = time.perf_counter()
        with _compilation() as compiled:
            yield
        seconds = time.perf_counter() - start
        if compiled:
            self.compile_seconds += seconds
        else:
            self.decode_seconds += seconds
            self.decode_tokens += num_tokens


@contextlib.contextmanager
def _compilation() -> Iterator[list[float]]:
    """Collect the seconds of every tracing, lowering and compiling inside."""
    seconds: list[float] = []

    def listen(name: str, duration: float, **_) -> None:
        if name.startswith("/jax/core/compile/"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Batch:
    """Prompts of any lengths that are continued together, until each has ended.

    A row's tokens depend on its prompt and its random numbers, not on the other rows, up to the rounding of matmuls of
    another size.
    """

    def __init__(
        self,
        model: Btlm,
        params: dict | Weights,
        mesh: Mesh,
        *,
        prompts: Sequence[Sequence[int]],
        generators: Sequence[np.random.Generator],
        num_rows: int,
        num_tokens: int,
        sampling: Sampling,
        stop_id: int,
        cache_dtype: str,
        speed: Speed,
    ):
        """Take at least one prompt; up to `num_rows` the batch is filled, so that batches have one shape.

        Raises:
          ValueError: there is no prompt, one is empty or has a token outside the vocabulary, or a number is too small.
        """
        _check_prompts(prompts, vocab_size=model.config.vocab_size)
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens} is not allowed; it must be 1 or more")
        if cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={cache_dtype!r} is not allowed; it must be one of {', '.join(CACHE_DTYPES)}")
        self._sampling, self._generators, self._stop_id, self._speed = sampling, generators, stop_id, speed
        num_rows = max(num_rows, len(prompts))
        num_rows += -num_rows % mesh.shape[FSDP]
        self._histories = [list(prompts[min(row, len(prompts) - 1)]) for row in range(num_rows)]
        self._ends = [len(prompt) + num_tokens for prompt in prompts]
        longest = max(map(len, prompts))
        self._num_slots = bucket(longest + min(num_tokens, FIRST_STRETCH))
        self._decoder = make_decoder(
            model, params, mesh, num_rows=num_rows, num_slots=self._num_slots, cache_dtype=cache_dtype
        )
        self._is_prefilled = False
        self.going = set(range(len(prompts)))  # the rows that have not ended
        self.endings: dict[int, Ending] = {}  # of the rows that have

    @property
    def lost(self) -> float:
        """Return a bound on the share of any head's attention that fell on keys which are no longer kept."""
        return self._decoder.lost

    def step(self) -> dict[int, int]:
        """Make one more token of each row that goes on; return those, without the id that ends a document."""
        logits_BV = self._decode() if self._is_prefilled else self._prefill()
        drawn = {}
        with self._speed.measure_decode(0):
            for row in sorted(self.going):
                token = self._draw(row, logits_BV[row])
                if token != self._stop_id:
                    drawn[row] = token
        return drawn

    def end(self, row: int, ending: Ending) -> None:
        """Make no more tokens of a row."""
        self.going.discard(row)
        self.endings[row] = ending

    def _prefill(self) -> np.ndarray:
        self._is_prefilled = True
        with self._speed.measure_prefill(sum(len(self._histories[row]) for row in self.going)):
            return self._decoder.prefill(self._histories)

    def _draw(self, row: int, logits_V: np.ndarray) -> int:
        history = self._histories[row]
        token = draw(logits_V, history=history, sampling=self._sampling, generator=self._generators[row])
        if token == self._stop_id:
            self.end(row, Ending.END_OF_DOCUMENT)
        else:
            history.append(token)
            if len(history) == self._ends[row]:
                self.end(row, Ending.LENGTH)
        return token

    def _decode(self) -> np.ndarray:
        with self._speed.measure_decode(len(self.going)):
            while max(map(len, self._histories)) > self._num_slots:
                self._num_slots *= 2
                self._decoder.grow(self._num_slots)
            return self._decoder.decode(self._histories)


def generate(
    model: Btlm,
    params: dict | Weights,
    mesh: Mesh,
    *,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampling: Sampling,
    seed: int,
    stop_id: int,
    cache_dtype: str,
) -> Iterator[dict[int, int]]:
    """Yield up to `num_tokens` times {row: new token} of the rows that go on; `stop_id` ends a row and is not yielded.

    A row's tokens depend on its prompt and the seed, so equal prompts continue equally.

    Raises:
      ValueError: as `Batch`.
    """
    batch = Batch(
        model,
        params,
        mesh,
        prompts=prompts,
        generators=[make_generator(seed, sample=0, prompt=prompt) for prompt in prompts],
        num_rows=len(prompts),
        num_tokens=num_tokens,
        sampling=sampling,
        stop_id=stop_id,
        cache_dtype=cache_dtype,
        speed=Speed(),
    )
    while batch.going:
        drawn = batch.step()
        if drawn:
            yield drawn


def continue_tokens(
    model: Btlm,
    params: dict | Weights,
    mesh: Mesh,
    *,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    seed: int,
    stop_id: int,
) -> list[int]:
    """Return up to `num_tokens` ids after one prompt; see `generate`."""
    made = generate(
        model,
        params,
        mesh,
        prompts=[prompt],
        num_tokens=num_tokens,
        sampling=sampling,
        seed=seed,
        stop_id=stop_id,
        cache_dtype=model.config.dtype,
    )
    return [tokens[0] for tokens in made]


def _check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row + 1} is empty: give at least one token to continue from")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {row + 1} has a token outside the vocabulary of {vocab_size}")
