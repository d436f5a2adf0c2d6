"""Continue texts: prefill the prompts in pieces, then decode token by token over a cache of keys and values.

Logits come from the device, tokens are drawn on the host: every process draws the same ones from the same seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.loss import logits
from btlm_jax.model import Btlm, KVCache, extend, make_cache
from btlm_jax.sharding import FSDP

PREFILL_PIECE = 256  # tokens of a prompt that run at a time: scores take this times the cache's slots
MIN_SLOTS = 128  # caches are powers of two from here, so that few shapes are ever compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn; temperature 0 takes the likeliest, and then the rest has no effect but the penalty."""

    temperature: float
    top_k: int  # of so many likeliest tokens; 0: of all
    top_p: float  # of the fewest likeliest tokens that have this much probability together; 1: of all
    min_p: float  # of tokens at least this share as likely as the likeliest; 0: of all
    repetition_penalty: float  # logits of tokens seen in the row are divided by it, or multiplied if negative; 1: none

    def __post_init__(self):
        for name, allowed, good in (
            ("temperature", "0 or more", self.temperature >= 0),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "above 0 and up to 1", 0 < self.top_p <= 1),
            ("min_p", "from 0 up to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be {allowed}")


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def generate(
    model: Btlm,
    params: dict,
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

    A row's tokens depend on its own prompt, place and the seed, not on the other rows' prompts.

    Raises:
      ValueError: there is no prompt, or one is empty or has a token outside the vocabulary.
    """
    _check_prompts(prompts, vocab_size=model.config.vocab_size)
    num_rows = len(prompts) + -len(prompts) % mesh.shape[FSDP]
    histories = [list(prompts[min(row, len(prompts) - 1)]) for row in range(num_rows)]
    generators = [np.random.default_rng((seed, row)) for row in range(len(prompts))]
    num_slots = _bucket(max(map(len, histories)) + num_tokens)
    decoder = _Decoder(model, params, mesh, num_rows=num_rows, num_slots=num_slots, cache_dtype=cache_dtype)
    logits_BV = decoder.prefill(histories)
    going = set(range(len(prompts)))
    for step in range(num_tokens):
        drawn = {}
        for row in sorted(going):
            token = draw(logits_BV[row], history=histories[row], sampling=sampling, generator=generators[row])
            if token == stop_id:
                going.remove(row)
            else:
                histories[row].append(token)
                drawn[row] = token
        if drawn:
            yield drawn
        if not going or step == num_tokens - 1:
            return
        logits_BV = decoder.decode(histories)


def continue_tokens(
    model: Btlm,
    params: dict,
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


def draw(logits_V: np.ndarray, *, history: Sequence[int], sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw the next token of a row whose tokens so far are `history`.

    Penalty as in Keskar et al. 2019 (CTRL, arXiv:1909.05858) with the sign rule of Hugging Face's processor; then
    temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751) and min-p (Nguyen et al. 2024, arXiv:2407.01082),
    each over what the ones before it left.
    """
    logits_V = logits_V.astype(np.float64)
    seen = np.unique(np.asarray(history, np.int64))
    penalty = sampling.repetition_penalty
    logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    order = np.argsort(-logits_V, kind="stable")
    order = order[: sampling.top_k or len(order)]
    scaled = logits_V[order] / sampling.temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    kept = (before < sampling.top_p) & (weights >= sampling.min_p * weights[0])
    kept[0] = True
    weights = np.where(kept, weights, 0)
    return int(generator.choice(order, p=weights / weights.sum()))


class _Decoder:
    """The cache on the devices, and the step over it, compiled once for every shape it meets in the process."""

    def __init__(self, model: Btlm, params: dict, mesh: Mesh, *, num_rows: int, num_slots: int, cache_dtype: str):
        self._model, self._params, self._mesh = model, params, mesh
        self._rows = NamedSharding(mesh, PartitionSpec(FSDP))
        self._cache = make_cache(model, mesh, batch_size=num_rows, num_slots=num_slots, dtype=cache_dtype)

    def prefill(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run the prompts; return the float32 logits_BV after each row's last token."""
        lengths_B = np.array([len(history) for history in histories])
        found = [None] * len(histories)
        width = min(PREFILL_PIECE, _bucket(int(lengths_B.max())))
        for start in range(0, int(lengths_B.max()), width):
            pieces_BT = np.zeros((len(histories), width), np.int32)
            for row, history in enumerate(histories):
                piece = history[start : start + width]
                pieces_BT[row, : len(piece)] = piece
            last_B = lengths_B - 1 - start
            logits_BV = self._run(pieces_BT, np.full(len(histories), start), np.clip(last_B, 0, width - 1))
            for row in np.flatnonzero((last_B >= 0) & (last_B < width)):
                found[row] = logits_BV[row]
        return np.stack(found)

    def decode(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run each row's newest token; return the float32 logits_BV after it."""
        newest_B1 = np.array([[history[-1]] for history in histories])
        starts_B = np.array([len(history) - 1 for history in histories])
        return self._run(newest_B1, starts_B, np.zeros_like(starts_B))

    def _run(self, inputs_BT: np.ndarray, starts_B: np.ndarray, last_B: np.ndarray) -> np.ndarray:
        def place(values):
            values = values.astype(np.int32)
            return jax.make_array_from_callback(values.shape, self._rows, lambda index: values[index])

        with jax.set_mesh(self._mesh):
            logits_BV, self._cache = _extend_and_read(
                self._model, self._params, self._cache, place(inputs_BT), place(starts_B), place(last_B)
            )
        return np.asarray(logits_BV)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend_and_read(model: Btlm, params: dict, cache: KVCache, inputs_BT, starts_B, last_B):
    hidden_BTD, cache = extend(model, params, cache, inputs_BT=inputs_BT, starts_B=starts_B)
    hidden_BTD = jax.sharding.reshard(hidden_BTD, PartitionSpec(None, None, None))
    last_B = jax.sharding.reshard(last_B, PartitionSpec(None))
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    table_VD = jax.sharding.reshard(params["embedding"]["embedding"], PartitionSpec(None, None))
    return logits(hidden_B1D, table_VD, output_scale=model.parametrization.output_scale)[:, 0], cache


def _bucket(length: int) -> int:
    return max(MIN_SLOTS, 1 << (length - 1).bit_length())


def _check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row + 1} is empty: give at least one token to continue from")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {row + 1} has a token outside the vocabulary of {vocab_size}")
