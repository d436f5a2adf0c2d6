"""Score rows that begin alike, such as the choices of a question, and compute what they have in common once.

A row's tokens before the last one that is not scored are its context. Equal contexts run once, and their keys and
values are copied to the rows that go on from them; contexts that begin alike, as with few-shot examples, go on from one
row of what they share. Rows of one context with the same inputs, such as one-token choices, are one row. This is for
weights in the kernels' tiles, whose cache is that of decode/cpu_cache.py; on a mesh a row runs by itself (scorer.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.decode.cpu_cache import MAX_PIECE, Cache, CacheLayout, make_cache, make_layout
from btlm_jax.decode.cpu_forward import extend_hidden, read_out
from btlm_jax.decode.decoder import bucket
from btlm_jax.evaluate.scorer import HEAD_ROWS, Row, Scorer, Scores
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm
from btlm_jax.model.loss import score_logits

SHORTEST_CONTEXT = 8  # tokens; shorter ones run with each of their rows
SHORTEST_SHARED = 32  # tokens that contexts must have in common to run them once
NARROWEST = 8  # tokens of the narrowest inputs
CACHE_BYTES = 1 << 30  # of the keys and values of a batch

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """What rows have after their context: the inputs from which they are scored."""

    context: Tokens
    inputs: Tokens  # after the context, at least one
    skip: int  # of the inputs, so many do not predict a scored token
    rows: tuple[int, ...]  # numbers of the rows that have these inputs

    @property
    def length(self) -> int:
        return len(self.context) + len(self.inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Branches whose contexts all begin with the same `num_shared` tokens, those of one context side by side."""

    num_shared: int
    branches: tuple[Branch, ...]


def make_families(rows: Sequence[Row], *, least_saved: int) -> list[Family]:
    """Return every row in a branch of a family; those that share nothing are one family, the longest first.

    Contexts are a family if running what they share once saves `least_saved` tokens.
    """
    inputs_of: dict[Tokens, dict[Tokens, list[int]]] = {}
    for number, row in enumerate(rows):
        tokens = tuple(int(token) for token in row.tokens)
        context, inputs = tokens[: row.first - 1], tokens[row.first - 1 : -1]
        inputs_of.setdefault(context, {}).setdefault(inputs, []).append(number)
    branches_of = {context: _branches(context, found) for context, found in inputs_of.items()}
    families, alone = [], []
    for num_shared, contexts in _begin_alike(sorted(branches_of)):
        if num_shared * (len(contexts) - 1) >= max(1, least_saved):
            members = sorted(contexts, key=lambda context: -max(branch.length for branch in branches_of[context]))
            branches = tuple(branch for context in members for branch in branches_of[context])
            families.append(Family(num_shared=num_shared, branches=branches))
            continue
        for branches in map(branches_of.__getitem__, contexts):
            alone += branches if len(branches) > 1 else map(_whole, branches)
    alone.sort(key=lambda branch: (-_longest(branches_of, branch), branch.context))
    return [*families, *([Family(num_shared=0, branches=tuple(alone))] if alone else [])]


def _branches(context: Tokens, rows_of: dict[Tokens, list[int]]) -> list[Branch]:
    branches = [Branch(context=context, inputs=inputs, skip=0, rows=tuple(rows)) for inputs, rows in rows_of.items()]
    return branches if len(context) >= SHORTEST_CONTEXT else [_whole(branch) for branch in branches]


def _whole(branch: Branch) -> Branch:
    """Return a branch with its context among its inputs."""
    inputs = branch.context + branch.inputs
    return dataclasses.replace(branch, context=(), inputs=inputs, skip=branch.skip + len(branch.context))


def _longest(branches_of: dict[Tokens, list[Branch]], branch: Branch) -> int:
    """Return the length of the longest branch of the same context, so that they stay side by side."""
    return max(other.length for other in (branches_of[branch.context] if branch.context else [branch]))


def _begin_alike(contexts: Sequence[Tokens]) -> Iterator[tuple[int, list[Tokens]]]:
    """Yield (tokens that they share, contexts) of runs of sorted contexts; a run of one shares nothing."""
    run: list[Tokens] = []
    shared = 0
    for context in contexts:
        common = _num_common(run[-1], context) if run else 0
        joins = common >= max(SHORTEST_SHARED, shared // 2)
        if run and not joins:
            yield (shared if len(run) > 1 else 0), run
            run, shared = [], 0
        shared = common if len(run) == 1 else min(shared, common)
        run.append(context)
    if run:
        yield (shared if len(run) > 1 else 0), run


def _num_common(a: Tokens, b: Tokens) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class PrefixScorer(Scorer):
    """A scorer that computes common beginnings once, where its weights are in tiles."""

    def score(self, rows: Sequence[Row]) -> Iterator[tuple[int, Scores]]:
        """Yield (index, scores) of every row, a batch at a time; raises as `Scorer.score`."""
        train_len = self.model.alibi_train_len
        is_scaled = train_len and max((len(row.tokens) for row in rows), default=0) > train_len  # slopes differ by row
        if is_scaled or not isinstance(self._params, Weights):
            yield from super().score(rows)
            return
        for number, row in enumerate(rows):
            self._check(row, number)
        for family in make_families(rows, least_saved=self.batch_tokens):
            yield from self._score_family(family, rows)

    def _score_family(self, family: Family, rows: Sequence[Row]) -> Iterator[tuple[int, Scores]]:
        shared = None
        waiting = list(family.branches)
        layout = self._layout(max(branch.length for branch in waiting))
        while waiting:
            if not family.num_shared:
                layout = self._layout(max(branch.length for branch in waiting))
            batch = self._next_branches(waiting, family, layout)
            try:
                if shared is None and family.num_shared:
                    shared, _ = self._extend(
                        make_cache(self.model.config, layout, batch_size=1, dtype="float32"), layout,
                        inputs=[batch[0].context[: family.num_shared]], starts=[0], num_rows=1,
                    )  # fmt: skip
                scores = self._score_branches(batch, family, layout, shared, rows)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                self._halve(error, num_rows=len(batch))
                continue
            waiting = waiting[len(batch) :]
            yield from scores

    def _layout(self, length: int) -> CacheLayout:
        return make_layout(self.model.config, length=bucket(length), alibi_train_len=self.model.alibi_train_len)

    def _next_branches(self, waiting: Sequence[Branch], family: Family, layout: CacheLayout) -> list[Branch]:
        """Return the first of the waiting branches: as many as fit into a batch, but at least one."""
        config = self.model.config
        row_bytes = 2 * 4 * config.num_layers * config.head_dim * layout.num_slots
        most = max(1, CACHE_BYTES // row_bytes)
        batch: list[Branch] = []
        contexts: set[Tokens] = set()
        longest_inputs = longest_context = 0
        for branch in waiting:
            contexts.add(branch.context)
            longest_inputs = max(longest_inputs, len(branch.inputs))
            longest_context = max(longest_context, len(branch.context) - family.num_shared)
            num_tokens = max(
                _width_of(longest_inputs) * _power_from(len(batch) + 1),
                _width_of(longest_context) * _power_from(len(contexts)),
            )
            if batch and (num_tokens > self.batch_tokens or len(batch) + len(contexts) >= most):
                break
            batch.append(branch)
        return batch

    def _score_branches(
        self, batch: Sequence[Branch], family: Family, layout: CacheLayout, shared: Cache | None, rows: Sequence[Row]
    ) -> list[tuple[int, Scores]]:
        contexts = list(dict.fromkeys(branch.context for branch in batch))
        num_rows = _power_from(len(batch))
        if any(contexts):
            cache = self._run_contexts(contexts, family, layout, shared)
            number_of = {context: number for number, context in enumerate(contexts)}
            parents = [number_of[branch.context] for branch in batch]
            cache = _take_rows(cache, np.array(parents + [0] * (num_rows - len(batch)), np.int32))
        else:
            cache = make_cache(self.model.config, layout, batch_size=num_rows, dtype="float32")
        _, hidden_BTD = self._extend(
            cache, layout, inputs=[branch.inputs for branch in batch],
            starts=[len(branch.context) for branch in batch], num_rows=num_rows,
        )  # fmt: skip
        return self._read(batch, rows, hidden_BTD)

    def _run_contexts(
        self, contexts: Sequence[Tokens], family: Family, layout: CacheLayout, shared: Cache | None
    ) -> Cache:
        """Return a cache with a row for each context, going on from what the family shares."""
        num_rows = _power_from(len(contexts))
        if shared is None:
            cache = make_cache(self.model.config, layout, batch_size=num_rows, dtype="float32")
        else:
            cache = _take_rows(shared, np.zeros(num_rows, np.int32))
        rests = [context[family.num_shared :] for context in contexts]
        if any(rests):
            starts = [family.num_shared] * len(contexts)
            cache, _ = self._extend(cache, layout, inputs=rests, starts=starts, num_rows=num_rows)
        return cache

    def _extend(
        self, cache: Cache, layout: CacheLayout, *, inputs: Sequence[Tokens], starts: Sequence[int], num_rows: int
    ) -> tuple[Cache, jax.Array]:
        """Run each row's new inputs; return the cache and hidden_BTD of all of them."""
        width = _width_of(max(map(len, inputs)))
        inputs_BT, counts_B = np.zeros((num_rows, width), np.int32), np.zeros(num_rows, np.int32)
        starts_B = np.zeros(num_rows, np.int32)
        for b, (row, start) in enumerate(zip(inputs, starts, strict=True)):
            inputs_BT[b, : len(row)], counts_B[b], starts_B[b] = row, len(row), start
        pieces, dropped_bounds = [], []
        for first in range(0, width, MAX_PIECE):
            piece_BT = inputs_BT[:, first : first + MAX_PIECE]
            hidden_BTD, cache, dropped = extend_hidden(
                self.model, cast(Weights, self._params), cache, layout=layout, inputs_BT=piece_BT,
                starts_B=starts_B + np.minimum(counts_B, first),
                counts_B=np.clip(counts_B - first, 0, piece_BT.shape[1]).astype(np.int32),
                lengths_B=starts_B + counts_B,
            )  # fmt: skip
            pieces.append(hidden_BTD)
            dropped_bounds.append(dropped)
        self._note_dropped(max(map(float, dropped_bounds)))
        return cache, pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)

    def _read(self, batch: Sequence[Branch], rows: Sequence[Row], hidden_BTD: jax.Array) -> list[tuple[int, Scores]]:
        found = [(b, branch.skip, number) for b, branch in enumerate(batch) for number in branch.rows]
        targets = [np.asarray(rows[number].tokens[rows[number].first :], np.int32) for _, _, number in found]
        T = hidden_BTD.shape[1]
        at_P = np.concatenate(
            [b * T + skip + np.arange(len(its)) for (b, skip, _), its in zip(found, targets, strict=True)]
        )
        chunk = min(HEAD_ROWS, _power_from(max(64, len(at_P))))
        padded = np.zeros((2, -(-len(at_P) // chunk) * chunk), np.int32)
        padded[:, : len(at_P)] = at_P, np.concatenate(targets)
        scores = [
            _scores_at(self.model, cast(Weights, self._params), hidden_BTD, *padded[:, first : first + chunk])
            for first in range(0, padded.shape[1], chunk)
        ]
        losses_P, is_greedy_P = (np.concatenate([np.asarray(each[part]) for each in scores]) for part in (0, 1))
        ends = np.cumsum([len(its) for its in targets])
        return [
            (
                number,
                Scores(
                    log_p_T=-losses_P[end - len(its) : end].astype(np.float64),
                    is_greedy_T=is_greedy_P[end - len(its) : end],
                ),
            )
            for (_, _, number), its, end in zip(found, targets, ends, strict=True)
        ]


def _width_of(longest: int) -> int:
    """Return the width of inputs whose longest has a length: few are compiled, and a quarter or less is padding."""
    if longest > MAX_PIECE:
        return -(-longest // (MAX_PIECE // 2)) * (MAX_PIECE // 2)
    power = max(NARROWEST, _power_from(longest))
    return power * 3 // 4 if NARROWEST < longest <= power * 3 // 4 else power


def _power_from(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


@jax.jit
def _take_rows(cache: Cache, parents_B) -> Cache:
    """Return a cache whose row b is row parents_B[b]."""
    return dataclasses.replace(
        cache,
        k_LBSH=jnp.take(cache.k_LBSH, parents_B, axis=1),
        v_LBSH=jnp.take(cache.v_LBSH, parents_B, axis=1),
        longest_key_LBN=jnp.take(cache.longest_key_LBN, parents_B, axis=1),
    )


@functools.partial(jax.jit, static_argnames="model")
def _scores_at(model: Btlm, weights: Weights, hidden_BTD, at_P, targets_P) -> tuple[jax.Array, jax.Array]:
    hidden_PD = jnp.take(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), at_P, axis=0)
    return score_logits(read_out(model, weights, hidden_PD), targets_P)
