"""Continue batches of prompts: prefill in pieces, then decode token by token over a cache of keys and values.

Logits come from the device and tokens are drawn on the host (sampling.py): every process draws the same from a seed.
Only token ids here; text is in generate/.
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

INITIAL_CACHE_TOKENS = 128  # new tokens that a cache is made for at first; its size doubles when it is full


class FinishReason(enum.StrEnum):
    """Why a row ended."""

    LENGTH = "length"
    END_OF_DOCUMENT = "end of document"
    STOP_STRING = "stop string"


@dataclasses.dataclass(kw_only=True)
class Timings:
    """Seconds of compilation, prefill and decode, and the tokens of the latter two.

    A decode call that compiles counts as compilation, without its tokens. Of a prefill call, the seconds that JAX
    reports as compilation are taken out.
    """

    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @contextlib.contextmanager
    def measure_prefill(self, num_tokens: int) -> Iterator[None]:
        """Time this block as prefill."""
        start = time.perf_counter()
        with _compilation() as compiled:
            yield
        seconds = time.perf_counter() - start
        self.compile_seconds += min(seconds, sum(compiled))
        self.prefill_seconds += max(0.0, seconds - sum(compiled))
        self.prefill_tokens += num_tokens

    @contextlib.contextmanager
    def measure_decode(self, num_tokens: int) -> Iterator[None]:
        """Time this block as decode."""
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
    """Collect the seconds of every tracing, lowering and compilation in this block."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Batch:
    """Prompts of any lengths that are continued together until each has ended.

    A row's tokens depend on its prompt and its random numbers, not on the other rows, except that matrix products of
    another size round differently.
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
        num_ids: int,
        stop_id: int,
        cache_dtype: str,
        timings: Timings,
    ):
        """Make a batch of at least `num_rows` rows, so that batches have one shape: the last prompt fills it up.

        Only ids below `num_ids`, which the tokenizer has, are drawn; the model may have more rows in its embedding.

        Raises:
          ValueError: there is no prompt, one is empty or has an id that is none of `num_ids`, or a number is too small
            or too large.
        """
        if not 0 < num_ids <= model.config.vocab_size:
            raise ValueError(
                f"num_ids={num_ids:,} is not allowed; it must be 1 to the {model.config.vocab_size:,} ids of the model"
            )
        _check_prompts(prompts, num_ids=num_ids)
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens} is not allowed; it must be 1 or more")
        if cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={cache_dtype!r} is not allowed; it must be one of {', '.join(CACHE_DTYPES)}")
        self._sampling, self._generators, self._stop_id, self._timings = sampling, generators, stop_id, timings
        self._num_ids = num_ids
        num_rows = max(num_rows, len(prompts))
        num_rows += -num_rows % mesh.shape[FSDP]
        self._histories = [list(prompts[min(row, len(prompts) - 1)]) for row in range(num_rows)]
        self._ends = [len(prompt) + num_tokens for prompt in prompts]
        longest = max(map(len, prompts))
        self._num_slots = bucket(longest + min(num_tokens, INITIAL_CACHE_TOKENS))
        self._decoder = make_decoder(
            model, params, mesh, num_rows=num_rows, num_slots=self._num_slots, cache_dtype=cache_dtype
        )
        self._is_prefilled = False
        self.active_rows = set(range(len(prompts)))
        self.finish_reasons: dict[int, FinishReason] = {}  # of the rows that have ended

    @property
    def dropped_attention_bound(self) -> float:
        """Return a bound on the share of any head's attention that belongs to keys dropped from the cache."""
        return self._decoder.dropped_attention_bound

    def step(self) -> dict[int, int]:
        """Decode one token of each active row; return {row: token}, without the id that ends a document."""
        logits_BV = self._decode() if self._is_prefilled else self._prefill()
        drawn = {}
        with self._timings.measure_decode(0):
            for row in sorted(self.active_rows):
                token = self._draw(row, logits_BV[row])
                if token != self._stop_id:
                    drawn[row] = token
        return drawn

    def finish(self, row: int, reason: FinishReason) -> None:
        """Decode no more tokens of a row."""
        self.active_rows.discard(row)
        self.finish_reasons[row] = reason

    def _prefill(self) -> np.ndarray:
        self._is_prefilled = True
        with self._timings.measure_prefill(sum(len(self._histories[row]) for row in self.active_rows)):
            return self._decoder.prefill(self._histories)

    def _draw(self, row: int, logits_V: np.ndarray) -> int:
        history = self._histories[row]
        token = draw(
            logits_V[: self._num_ids], history=history, sampling=self._sampling, generator=self._generators[row]
        )
        if token == self._stop_id:
            self.finish(row, FinishReason.END_OF_DOCUMENT)
        else:
            history.append(token)
            if len(history) == self._ends[row]:
                self.finish(row, FinishReason.LENGTH)
        return token

    def _decode(self) -> np.ndarray:
        with self._timings.measure_decode(len(self.active_rows)):
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
    num_ids: int,
    stop_id: int,
    cache_dtype: str,
) -> Iterator[dict[int, int]]:
    """Yield up to `num_tokens` times {row: new token} of the active rows; `stop_id` ends a row and is not yielded.

    Tokens are of the ids below `num_ids`, which the tokenizer has. A row's tokens depend on its prompt and the seed, so
    equal prompts have equal continuations.

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
        num_ids=num_ids,
        stop_id=stop_id,
        cache_dtype=cache_dtype,
        timings=Timings(),
    )
    while batch.active_rows:
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
    num_ids: int,
    stop_id: int,
) -> list[int]:
    """Return up to `num_tokens` ids after one prompt; see `generate`."""
    steps = generate(
        model,
        params,
        mesh,
        prompts=[prompt],
        num_tokens=num_tokens,
        sampling=sampling,
        seed=seed,
        num_ids=num_ids,
        stop_id=stop_id,
        cache_dtype=model.config.dtype,
    )
    return [tokens[0] for tokens in steps]


def _check_prompts(prompts: Sequence[Sequence[int]], *, num_ids: int) -> None:
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row + 1} is empty: give at least one token to continue from")
        if not 0 <= min(prompt) <= max(prompt) < num_ids:
            raise ValueError(f"prompt {row + 1} has an id that is none of the {num_ids:,} of the vocabulary")
