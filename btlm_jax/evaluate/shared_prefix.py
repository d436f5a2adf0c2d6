"""Score rows that begin alike, such as the choices of a question, and compute what they have in common once.

A row's tokens before the last one that is not scored are its context. Equal contexts run once, and their keys and
values are copied to the rows that go on from them; contexts that begin alike, as with few-shot examples, go on from one
row of what they share. Rows of one context with the same inputs, such as one-token choices, are one row.

Weights in the kernels' tiles run so whatever they share. On a mesh each device has contexts of its own and the rows
that go on from them, so that no keys and values are exchanged, and what contexts share runs on every device; rows that
share nothing run without a cache (scorer.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.decode import cpu_cache, kv_cache
from btlm_jax.decode.cpu_cache import MAX_PIECE
from btlm_jax.decode.cpu_forward import extend_hidden, padded_size, score_hidden
from btlm_jax.decode.decoder import bucket
from btlm_jax.evaluate.scorer import HEAD_ROWS, Row, Scorer, Scores, scores_of_hidden
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm
from btlm_jax.parallel.mesh import FSDP

SHORTEST_CONTEXT = 8  # tokens; shorter ones run with each of their rows
SHORTEST_SHARED = 32  # tokens that contexts must have in common to run them once
NARROWEST = 8  # tokens of the narrowest inputs
CACHE_BYTES, DEVICE_CACHE_BYTES = 1 << 30, 4 << 30  # of a batch's keys and values: in this machine's memory; a device's

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


def make_families(rows: Sequence[Row], *, least_saved: int, lanes: int) -> list[Family]:
    """Return every row in a branch of a family; those that share nothing are one family, the longest first.

    Contexts are a family if running what they share once in each of so many lanes saves `least_saved` tokens of each.
    """
    inputs_of: dict[Tokens, dict[Tokens, list[int]]] = {}
    for number, row in enumerate(rows):
        tokens = tuple(int(token) for token in row.tokens)
        context, inputs = tokens[: row.first - 1], tokens[row.first - 1 : -1]
        inputs_of.setdefault(context, {}).setdefault(inputs, []).append(number)
    branches_of = {context: _branches(context, found) for context, found in inputs_of.items()}
    families, alone = [], []
    for num_shared, contexts in _begin_alike(sorted(branches_of)):
        if num_shared * (len(contexts) - lanes) >= max(1, least_saved * lanes):
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


class _Engine(Protocol):
    """What runs rows over a cache: `lanes` groups of equally many rows, each with contexts of its own."""

    lanes: int
    is_packed: bool  # padding takes part in no product

    def make_layout(self, length: int) -> Any:
        """Return the layout of a cache for rows of up to `length` tokens."""
        ...

    def most_rows(self, layout: Any) -> int:
        """Return how many rows of a lane may have a cache at a time."""
        ...

    def make_cache(self, layout: Any, num_rows: int) -> Any:
        """Return an empty cache for so many rows, of all lanes."""
        ...

    def extend(self, cache: Any, layout: Any, *, inputs_BT, starts_B, counts_B, lengths_B) -> tuple[jax.Array, Any]:
        """Run new inputs; return their normed hidden_BTD and the cache, of which the old one is given up."""
        ...

    def take_rows(self, cache: Any, parents_WB: np.ndarray) -> Any:
        """Return a cache whose row b of lane w is that lane's row parents_WB[w, b]."""
        ...

    def scores_at(self, hidden_BTD: jax.Array, at_WP: np.ndarray, targets_WP: np.ndarray) -> tuple[Any, Any]:
        """Return losses_WP of targets after positions b * T + t of each lane, and whether each is the likeliest."""
        ...


class PrefixScorer(Scorer):
    """A scorer that computes common beginnings once."""

    def __init__(self, model: Btlm, params: dict | Weights, mesh: Mesh, *, batch_tokens: int):
        super().__init__(model, params, mesh, batch_tokens=batch_tokens)
        self._engine: _Engine
        if isinstance(params, Weights):
            self._engine = _TilesEngine(model, params, note_dropped=self._note_dropped)
        else:
            self._engine = _MeshEngine(model, params, mesh)

    def score(self, rows: Sequence[Row]) -> Iterator[tuple[int, Scores]]:
        """Yield (index, scores) of every row, a batch at a time; raises as `Scorer.score`."""
        train_len = self.model.alibi_train_len
        if train_len and max((len(row.tokens) for row in rows), default=0) > train_len:  # slopes differ by row
            yield from super().score(rows)
            return
        for number, row in enumerate(rows):
            self._check(row, number)
        is_tiled = isinstance(self._params, Weights)
        for family in make_families(rows, least_saved=self.batch_tokens, lanes=self._engine.lanes):
            shares = [is_tiled or branch.context or len(branch.rows) > 1 for branch in family.branches]
            alone = [branch.rows[0] for branch, does in zip(family.branches, shares, strict=True) if not does]
            for index, scores in super().score([rows[number] for number in alone]):
                yield alone[index], scores
            branches = tuple(branch for branch, does in zip(family.branches, shares, strict=True) if does)
            if branches:
                yield from self._score_family(dataclasses.replace(family, branches=branches), rows)

    def _score_family(self, family: Family, rows: Sequence[Row]) -> Iterator[tuple[int, Scores]]:
        engine, shared = self._engine, None
        waiting = list(family.branches)
        layout = engine.make_layout(bucket(max(branch.length for branch in waiting)))
        while waiting:
            if not family.num_shared:
                layout = engine.make_layout(bucket(max(branch.length for branch in waiting)))
            lanes = self._next_branches(waiting, family, layout)
            num_branches = sum(map(len, lanes))
            try:
                if shared is None and family.num_shared:
                    inputs = [[lanes[0][0].context[: family.num_shared]]] * engine.lanes
                    shared, _ = self._extend(
                        engine.make_cache(layout, engine.lanes), layout, inputs=inputs, starts=[[0]] * engine.lanes,
                        num_rows=1,
                    )  # fmt: skip
                scores = self._score_branches(lanes, family, layout, shared, rows)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                self._halve(error, num_rows=num_branches)
                continue
            waiting = waiting[num_branches:]
            yield from scores

    def _next_branches(self, waiting: Sequence[Branch], family: Family, layout: Any) -> list[list[Branch]]:
        """Return the first of the waiting branches for each lane: as many as fit into a batch, and fair shares."""
        lanes: list[list[Branch]] = []
        first, num_lanes = 0, self._engine.lanes
        for lane in range(num_lanes):
            share = -(-(len(waiting) - first) // (num_lanes - lane))
            lanes.append(self._next_of_lane(waiting[first:], family, layout, share=share))
            first += len(lanes[-1])
        return lanes

    def _next_of_lane(self, waiting: Sequence[Branch], family: Family, layout: Any, *, share: int) -> list[Branch]:
        """Return the first of the waiting branches: about `share`, so that none is parted from others of its context.

        They are as many as fit into a batch, but at least one.
        """
        most = self._engine.most_rows(layout)
        batch: list[Branch] = []
        contexts: set[Tokens] = set()
        longest_inputs = longest_context = num_inputs = num_of_contexts = 0
        for branch in waiting:
            if len(batch) >= share and (not branch.context or branch.context not in contexts):
                break
            rest = len(branch.context) - family.num_shared
            num_of_contexts += rest * (branch.context not in contexts)
            num_inputs += len(branch.inputs)
            contexts.add(branch.context)
            longest_inputs, longest_context = max(longest_inputs, len(branch.inputs)), max(longest_context, rest)
            num_padded = max(
                _width_of(longest_inputs) * _power_from(len(batch) + 1),
                _width_of(longest_context) * _power_from(len(contexts)),
            )
            # Products leave padding out; attention and the cache do not.
            num_tokens = max(num_inputs, num_of_contexts, num_padded // 2) if self._engine.is_packed else num_padded
            if batch and (num_tokens > self.batch_tokens or len(batch) + len(contexts) >= most):
                break
            batch.append(branch)
        return batch

    def _score_branches(
        self, lanes: Sequence[Sequence[Branch]], family: Family, layout: Any, shared: Any, rows: Sequence[Row]
    ) -> list[tuple[int, Scores]]:
        contexts = [list(dict.fromkeys(branch.context for branch in lane)) for lane in lanes]
        num_rows = _power_from(max(map(len, lanes)))
        if any(map(any, contexts)):
            cache = self._run_contexts(contexts, family, layout, shared)
            parents_WB = np.zeros((len(lanes), num_rows), np.int32)
            for lane, its_contexts, parents_B in zip(lanes, contexts, parents_WB, strict=True):
                number_of = {context: number for number, context in enumerate(its_contexts)}
                parents_B[: len(lane)] = [number_of[branch.context] for branch in lane]
            cache = self._engine.take_rows(cache, parents_WB)
        else:
            cache = self._engine.make_cache(layout, len(lanes) * num_rows)
        _, hidden_BTD = self._extend(
            cache, layout, inputs=[[branch.inputs for branch in lane] for lane in lanes],
            starts=[[len(branch.context) for branch in lane] for lane in lanes], num_rows=num_rows,
        )  # fmt: skip
        return self._read(lanes, rows, hidden_BTD)

    def _run_contexts(self, contexts: Sequence[Sequence[Tokens]], family: Family, layout: Any, shared: Any) -> Any:
        """Return a cache with a row for each context of each lane, going on from what the family shares."""
        num_rows = _power_from(max(map(len, contexts)))
        if shared is None:
            cache = self._engine.make_cache(layout, len(contexts) * num_rows)
        else:
            cache = self._engine.take_rows(shared, np.zeros((len(contexts), num_rows), np.int32))
        rests = [[context[family.num_shared :] for context in its] for its in contexts]
        if any(map(any, rests)):
            starts = [[family.num_shared] * len(its) for its in contexts]
            cache, _ = self._extend(cache, layout, inputs=rests, starts=starts, num_rows=num_rows)
        return cache

    def _extend(
        self, cache: Any, layout: Any, *, inputs: Sequence[Sequence[Tokens]], starts: Sequence[Sequence[int]],
        num_rows: int,
    ) -> tuple[Any, jax.Array]:  # fmt: skip
        """Run each row's new inputs, lane by lane; return the cache and hidden_BTD of all of them."""
        width = _width_of(max(len(row) for lane in inputs for row in lane))
        size = len(inputs) * num_rows
        inputs_BT, counts_B = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        starts_B = np.zeros(size, np.int32)
        for w, (lane, its_starts) in enumerate(zip(inputs, starts, strict=True)):
            for b, (row, start) in enumerate(zip(lane, its_starts, strict=True), w * num_rows):
                inputs_BT[b, : len(row)], counts_B[b], starts_B[b] = row, len(row), start
        pieces = []
        for first in range(0, width, MAX_PIECE):
            piece_BT = inputs_BT[:, first : first + MAX_PIECE]
            hidden_BTD, cache = self._engine.extend(
                cache, layout, inputs_BT=piece_BT, starts_B=starts_B + np.minimum(counts_B, first),
                counts_B=np.clip(counts_B - first, 0, piece_BT.shape[1]).astype(np.int32),
                lengths_B=starts_B + counts_B,
            )  # fmt: skip
            pieces.append(hidden_BTD)
        return cache, pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)

    def _read(
        self, lanes: Sequence[Sequence[Branch]], rows: Sequence[Row], hidden_BTD: jax.Array
    ) -> list[tuple[int, Scores]]:
        T, at, targets = hidden_BTD.shape[1], [], []
        for lane in lanes:
            found = [(b, branch.skip, rows[number]) for b, branch in enumerate(lane) for number in branch.rows]
            at.append([b * T + skip + t for b, skip, row in found for t in range(row.num_scored)])
            targets.append([token for _, _, row in found for token in row.tokens[row.first :]])
        longest = max(map(len, at))
        chunk = min(HEAD_ROWS, _power_from(max(64, longest)))
        padded_2WP = np.zeros((2, len(lanes), -(-longest // chunk) * chunk), np.int32)
        for values_WP, lists in zip(padded_2WP, (at, targets), strict=True):
            for values_P, its in zip(values_WP, lists, strict=True):
                values_P[: len(its)] = its
        scores = [
            self._engine.scores_at(hidden_BTD, *padded_2WP[:, :, first : first + chunk])
            for first in range(0, padded_2WP.shape[2], chunk)
        ]
        losses_WP, is_greedy_WP = (np.concatenate([np.asarray(one[part]) for one in scores], axis=1) for part in (0, 1))
        scored = []
        for lane, losses_P, is_greedy_P in zip(lanes, losses_WP, is_greedy_WP, strict=True):
            begin = 0
            for number in (number for branch in lane for number in branch.rows):
                end = begin + rows[number].num_scored
                log_p_T = -losses_P[begin:end].astype(np.float64)
                scored.append((number, Scores(log_p_T=log_p_T, is_greedy_T=is_greedy_P[begin:end])))
                begin = end
        return scored


class _TilesEngine:
    """Weights in the kernels' tiles over the cache of decode/cpu_cache.py, in one lane."""

    lanes, is_packed = 1, True

    def __init__(self, model: Btlm, weights: Weights, *, note_dropped: Callable[[float], None]):
        self._model, self._weights, self._note_dropped = model, weights, note_dropped

    def make_layout(self, length: int) -> cpu_cache.CacheLayout:
        return cpu_cache.make_layout(self._model.config, length=length, alibi_train_len=self._model.alibi_train_len)

    def most_rows(self, layout: cpu_cache.CacheLayout) -> int:
        config = self._model.config
        return max(1, CACHE_BYTES // (2 * 4 * config.num_layers * config.head_dim * layout.num_slots))

    def make_cache(self, layout: cpu_cache.CacheLayout, num_rows: int) -> cpu_cache.Cache:
        return cpu_cache.make_cache(self._model.config, layout, batch_size=num_rows, dtype="float32")

    def extend(self, cache: cpu_cache.Cache, layout, *, inputs_BT, starts_B, counts_B, lengths_B):
        hidden_BTD, cache, dropped = extend_hidden(
            self._model, self._weights, cache, layout=layout, inputs_BT=inputs_BT, starts_B=starts_B,
            counts_B=counts_B, lengths_B=lengths_B,
        )  # fmt: skip
        self._note_dropped(float(dropped))
        return hidden_BTD, cache

    def take_rows(self, cache: cpu_cache.Cache, parents_WB: np.ndarray) -> cpu_cache.Cache:
        return _take_rows(cache, parents_WB[0])

    def scores_at(self, hidden_BTD: jax.Array, at_WP: np.ndarray, targets_WP: np.ndarray):
        return _scores_at(self._model, self._weights, hidden_BTD, at_WP, targets_WP)


class _MeshEngine:
    """Parameters on a mesh over the cache of decode/kv_cache.py: each device is a lane."""

    is_packed = False

    def __init__(self, model: Btlm, params: dict, mesh: Mesh):
        self._model, self._params, self._mesh = model, params, mesh
        self._rows = NamedSharding(mesh, PartitionSpec(FSDP))
        self.lanes = mesh.shape[FSDP]

    def make_layout(self, length: int) -> int:
        return length

    def most_rows(self, layout: int) -> int:
        config = self._model.config
        width = config.num_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
        is_cpu = self._mesh.devices.flat[0].platform == "cpu"
        of_device = CACHE_BYTES // self.lanes if is_cpu else DEVICE_CACHE_BYTES
        return max(1, of_device // (2 * config.num_layers * width * layout))

    def make_cache(self, layout: int, num_rows: int) -> kv_cache.KVCache:
        dtype = self._model.config.dtype
        return kv_cache.make_cache(self._model, self._mesh, batch_size=num_rows, num_slots=layout, dtype=dtype)

    def extend(self, cache: kv_cache.KVCache, layout, *, inputs_BT, starts_B, counts_B, lengths_B):
        del layout, counts_B  # what follows a row's tokens is overwritten before they see it
        placed = map(self._place, (inputs_BT, starts_B, lengths_B))
        with jax.set_mesh(self._mesh):
            return _extend_on_mesh(self._model, self._params, cache, *placed)

    def take_rows(self, cache: kv_cache.KVCache, parents_WB: np.ndarray) -> kv_cache.KVCache:
        with jax.set_mesh(self._mesh):
            return _take_rows_of_lanes(cache, self._place(parents_WB.reshape(-1)))

    def scores_at(self, hidden_BTD: jax.Array, at_WP: np.ndarray, targets_WP: np.ndarray):
        with jax.set_mesh(self._mesh):
            return _scores_at_of_lanes(
                self._model, self._params, hidden_BTD, self._place(at_WP), self._place(targets_WP)
            )

    def _place(self, values: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(values.shape, self._rows, lambda index: values[index])


def _width_of(longest: int) -> int:
    """Return the width of inputs whose longest has a length: few are compiled, and a quarter or less is padding."""
    if longest > MAX_PIECE:
        return -(-longest // (MAX_PIECE // 2)) * (MAX_PIECE // 2)
    return padded_size(longest, least=NARROWEST)


def _power_from(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


@jax.jit
def _take_rows(cache: cpu_cache.Cache, parents_B) -> cpu_cache.Cache:
    """Return a cache whose row b is row parents_B[b]."""
    return dataclasses.replace(
        cache,
        k_LBSH=jnp.take(cache.k_LBSH, parents_B, axis=1),
        v_LBSH=jnp.take(cache.v_LBSH, parents_B, axis=1),
        longest_key_LBN=jnp.take(cache.longest_key_LBN, parents_B, axis=1),
    )


@functools.partial(jax.jit, static_argnames="model")
def _scores_at(model: Btlm, weights: Weights, hidden_BTD, at_WP, targets_WP) -> tuple[jax.Array, jax.Array]:
    hidden_PD = jnp.take(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), at_WP[0], axis=0)
    losses_P, is_greedy_P = score_hidden(model, weights, hidden_PD, targets_WP[0])
    return losses_P[None], is_greedy_P[None]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _extend_on_mesh(model: Btlm, params: dict, cache: kv_cache.KVCache, inputs_BT, starts_B, lengths_B):
    return kv_cache.extend(model, params, cache, inputs_BT=inputs_BT, starts_B=starts_B, lengths_B=lengths_B)


@jax.jit
def _take_rows_of_lanes(cache: kv_cache.KVCache, parents_B) -> kv_cache.KVCache:
    """Return a cache whose row b of each device is row parents_B[b] of that device."""
    cached, rows = kv_cache.cache_spec(), PartitionSpec(FSDP)

    def take(cached_LBSNH, parents_B):
        return jnp.take(cached_LBSNH, parents_B, axis=1)

    take_own = jax.shard_map(take, in_specs=(cached, rows), out_specs=cached)
    return jax.tree.map(lambda cached_LBSNH: take_own(cached_LBSNH, parents_B), cache)


@functools.partial(jax.jit, static_argnames="model")
def _scores_at_of_lanes(model: Btlm, params: dict, hidden_BTD, at_WP, targets_WP) -> tuple[jax.Array, jax.Array]:
    rows = PartitionSpec(FSDP)

    def take(hidden_BTD, at_WP):  # a device has one lane
        return jnp.take(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), at_WP[0], axis=0)[None]

    take_own = jax.shard_map(take, in_specs=(rows, rows), out_specs=rows)
    hidden_WPD = take_own(jax.sharding.reshard(hidden_BTD, rows), at_WP)
    return scores_of_hidden(model, params, hidden_WPD, targets_WP)
