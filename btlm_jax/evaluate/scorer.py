"""Log-likelihoods of given tokens, which every evaluation is made of: rows of any lengths in padded batches.

Rows are sorted by length and padded to few lengths, so that few programs compile. Logits exist only at the positions
that are asked for, and only of a few of them at a time. Out of memory halves the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax import notices
from btlm_jax.decode.cpu_cache import DROPPED_ATTENTION, MAX_PIECE, make_cache, make_layout
from btlm_jax.decode.cpu_forward import extend_hidden, padded_size, score_hidden
from btlm_jax.evaluate.processes import wait_for_halving
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm
from btlm_jax.model.loss import token_scores
from btlm_jax.parallel.mesh import FSDP

SHORTEST = 16  # the shortest padded length
HEAD_ROWS = 1024  # positions of a device whose logits exist at a time


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Tokens of which those from number `first` on are scored, each given all before it; first is 1 or more."""

    tokens: Sequence[int] | np.ndarray
    first: int

    @property
    def num_scored(self) -> int:
        """Return how many tokens are scored."""
        return len(self.tokens) - self.first


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What a model gives the scored tokens of a row."""

    log_p_T: np.ndarray  # float64, nats
    is_greedy_T: np.ndarray  # bool: it is the likeliest token, of equals the first


class DroppedAttention:
    """Says what share of a head's attention belongs to keys that a cache drops, and again when it is ten times that."""

    def __init__(self):
        self._said = 0.0

    def note(self, bound: float) -> None:
        """Take a bound on the share; one above 1 says no more than 1."""
        bound = min(bound, 1.0)
        if bound > DROPPED_ATTENTION and bound >= 10 * self._said:
            notices.report(
                "attention-dropped", f"up to {bound:.1e} of a head's attention belongs to keys that its cache drops"
            )
            self._said = bound


class Scorer:
    """Scores rows of tokens with a model: a parameter tree on a mesh, or weights in tiles on a CPU.

    All processes of a mesh must score the same rows, and get the same scores.
    """

    def __init__(self, model: Btlm, params: dict | Weights, mesh: Mesh, *, batch_tokens: int):
        """Score about `batch_tokens` tokens of each device at a time."""
        assert batch_tokens > 0, batch_tokens
        self.model, self._params, self._mesh = model, params, mesh
        self.batch_tokens = batch_tokens
        self._note_dropped = DroppedAttention().note

    def with_model(self, model: Btlm) -> Scorer:
        """Return a scorer of the same weights with another network, such as one with other slopes of ALiBi."""
        return Scorer(model, self._params, self._mesh, batch_tokens=self.batch_tokens)

    def log_likelihoods(
        self, rows: Sequence[Row], *, on_scored: Callable[[Row], None] = lambda row: None
    ) -> list[Scores]:
        """Return the scores of each row; call `on_scored` with each once it is scored."""
        found: dict[int, Scores] = {}
        for index, scores in self.score(rows):
            found[index] = scores
            on_scored(rows[index])
        return [found[index] for index in range(len(rows))]

    def score(self, rows: Sequence[Row]) -> Iterator[tuple[int, Scores]]:
        """Yield (index, scores) of every row, a batch at a time, the longest rows first.

        Raises:
          ValueError: a row has no token to score, or an id that the model has not.
          MemoryError: a single row of each device is too much for its memory.
        """
        for number, row in enumerate(rows):
            self._check(row, number)
        waiting = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
        while waiting:
            batch = self._next_batch(waiting, rows)
            chosen = [rows[index] for index in batch]
            try:
                scores = self._score_batch(chosen)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                self._halve(error, num_rows=len(batch))
                continue
            waiting = waiting[len(batch) :]
            yield from zip(batch, scores, strict=True)

    def padded_length(self, length: int) -> int:
        """Return the length to which inputs of a length are padded: 16, 24, 32, 48, 64, ...

        Under dynamic scaling ALiBi's slopes follow the length, so there is no padding beyond the trained one.
        """
        train_len = self.model.alibi_train_len
        padded = padded_size(length, least=SHORTEST)
        if not train_len or padded <= train_len:
            return padded
        return max(length, train_len)

    def _check(self, row: Row, number: int) -> None:
        tokens, size = np.asarray(row.tokens), self.model.config.vocab_size
        if not 1 <= row.first < len(tokens):
            raise ValueError(
                f"row {number} has {len(tokens)} tokens, to be scored from number {row.first} on: at least one of "
                "them, with at least one before it, is needed"
            )
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise ValueError(f"row {number} has the id {tokens.max()}; the model has {size:,}, from 0 on")

    def _next_batch(self, waiting: Sequence[int], rows: Sequence[Row]) -> list[int]:
        """Return the first of the waiting rows, of one padded length, and no more than fit into a batch."""
        ways = self._mesh.shape[FSDP]
        length = self.padded_length(len(rows[waiting[0]].tokens) - 1)
        most = ways * _power_below(max(1, self.batch_tokens // length))
        same = (index for index in waiting[:most] if self.padded_length(len(rows[index].tokens) - 1) == length)
        return list(same)

    def _score_batch(self, rows: Sequence[Row]) -> list[Scores]:
        ways = self._mesh.shape[FSDP]
        B = ways * _power_from(-(-len(rows) // ways))
        T = self.padded_length(len(rows[0].tokens) - 1)
        counts = [row.num_scored for row in rows]
        S = min(T, max(8, _power_from(max(counts))))
        inputs_BT, lengths_B = np.zeros((B, T), np.int32), np.ones(B, np.int32)
        positions_BS, targets_BS = np.zeros((B, S), np.int32), np.zeros((B, S), np.int32)
        for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
            tokens = np.asarray(row.tokens, np.int32)
            lengths_B[b] = len(tokens) - 1
            inputs_BT[b, : len(tokens) - 1] = tokens[:-1]
            positions_BS[b, :count] = np.arange(row.first - 1, len(tokens) - 1)
            targets_BS[b, :count] = tokens[row.first :]
        run = self._run_tiles if isinstance(self._params, Weights) else self._run_mesh
        losses_BS, is_greedy_BS = run(inputs_BT, lengths_B, positions_BS, targets_BS)
        return [
            Scores(log_p_T=-losses_BS[b, :count].astype(np.float64), is_greedy_T=is_greedy_BS[b, :count])
            for b, count in enumerate(counts)
        ]

    def _run_mesh(self, inputs_BT, lengths_B, positions_BS, targets_BS) -> tuple[np.ndarray, np.ndarray]:
        del lengths_B  # what follows a row's tokens is not seen by them
        sharding = NamedSharding(self._mesh, PartitionSpec(FSDP))

        def place(values):
            return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

        placed = (place(values) for values in (inputs_BT, positions_BS, targets_BS))
        with jax.set_mesh(self._mesh):
            losses_BS, is_greedy_BS = _scores_on_mesh(self.model, self._params, *placed)
        return np.asarray(losses_BS), np.asarray(is_greedy_BS)

    def _run_tiles(self, inputs_BT, lengths_B, positions_BS, targets_BS) -> tuple[np.ndarray, np.ndarray]:
        weights, (B, T) = cast(Weights, self._params), inputs_BT.shape
        layout = make_layout(self.model.config, length=T, alibi_train_len=self.model.alibi_train_len)
        cache = make_cache(self.model.config, layout, batch_size=B, dtype="float32")
        pieces, dropped_bounds = [], []
        for start in range(0, T, MAX_PIECE):
            piece_BT = inputs_BT[:, start : start + MAX_PIECE]
            counts_B = np.clip(lengths_B - start, 0, piece_BT.shape[1]).astype(np.int32)
            starts_B = np.full(B, start, np.int32)
            hidden_BTD, cache, dropped = extend_hidden(
                self.model, weights, cache, layout=layout, inputs_BT=piece_BT, starts_B=starts_B, counts_B=counts_B,
                lengths_B=lengths_B,
            )  # fmt: skip
            pieces.append(hidden_BTD)
            dropped_bounds.append(dropped)
        self._note_dropped(max(map(float, dropped_bounds)))
        hidden_BTD = jnp.concatenate(pieces, axis=1)
        losses_BS, is_greedy_BS = _scores_of_tiles(self.model, weights, hidden_BTD, positions_BS, targets_BS)
        return np.asarray(losses_BS), np.asarray(is_greedy_BS)

    def _halve(self, error: Exception, *, num_rows: int) -> None:
        """Halve the batch after an error of memory; raise any other."""
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise error
        if num_rows <= self._mesh.shape[FSDP]:
            raise MemoryError("a single row of each device is too long for its memory; score shorter ones") from error
        wait_for_halving()
        self.batch_tokens = max(1, self.batch_tokens // 2)
        notices.report("batch-halved", f"out of memory with {num_rows:,} rows: {self.batch_tokens:,} tokens at a time")


def _power_from(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def _power_below(number: int) -> int:
    """Return the largest power of two that is not above a number."""
    return 1 << (number.bit_length() - 1)


@functools.partial(jax.jit, static_argnames="model")
def _scores_on_mesh(model: Btlm, params: dict, inputs_BT, positions_BS, targets_BS) -> tuple[jax.Array, jax.Array]:
    hidden_BTD = cast(jax.Array, model.apply({"params": params}, inputs_BT))
    rows = PartitionSpec(FSDP)
    take = jax.shard_map(_take_positions, in_specs=(rows, rows), out_specs=rows)
    return scores_of_hidden(model, params, take(jax.sharding.reshard(hidden_BTD, rows), positions_BS), targets_BS)


def scores_of_hidden(model: Btlm, params: dict, hidden_BSD, targets_BS) -> tuple[jax.Array, jax.Array]:
    """Return the losses_BS of targets and whether each is the likeliest, whole on every device, in a jitted function.

    hidden_BSD, after the last norm, is split over FSDP; logits of HEAD_ROWS positions of a device exist at a time.
    """
    rows_of_device = hidden_BSD.shape[0] // jax.sharding.get_abstract_mesh().shape[FSDP]
    scores = token_scores(
        hidden_BSD, params["embedding"]["embedding"], targets_BS, output_scale=model.parametrization.output_scale,
        chunk=max(1, HEAD_ROWS // rows_of_device), rules=model.rules,
    )  # fmt: skip
    return jax.tree.map(lambda x_BS: jax.sharding.reshard(x_BS, PartitionSpec(None, None)), scores)


@functools.partial(jax.jit, static_argnames="model")
def _scores_of_tiles(model: Btlm, weights: Weights, hidden_BTD, positions_BS, targets_BS):
    hidden_BSD = _take_positions(hidden_BTD, positions_BS)
    B, S, D = hidden_BSD.shape
    chunk = min(HEAD_ROWS, B * S)
    missing = -(B * S) % chunk
    hidden_CRD = jnp.pad(hidden_BSD.reshape(B * S, D), ((0, missing), (0, 0))).reshape(-1, chunk, D)
    targets_CR = jnp.pad(targets_BS.reshape(B * S), (0, missing)).reshape(-1, chunk)

    def score(chunk_arrays):
        hidden_RD, targets_R = chunk_arrays
        return score_hidden(model, weights, hidden_RD, targets_R)

    scores = jax.lax.map(score, (hidden_CRD, targets_CR))
    return jax.tree.map(lambda x_CR: x_CR.reshape(-1)[: B * S].reshape(B, S), scores)


def _take_positions(hidden_BTD, positions_BS):
    return jnp.take_along_axis(hidden_BTD, positions_BS[..., None], axis=1)
