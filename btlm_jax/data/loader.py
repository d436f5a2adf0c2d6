"""Batches as global `jax.Array`s: token store + order -> `{inputs, targets, weights}`, read ahead on Grain's threads.

Batch k is a function of (store, curriculum, seed, k) alone. Hosts, mesh, accumulation and threads decide only which
process reads which row, so a run may be resumed from any step on any mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from btlm_jax.data import store as store_format
from btlm_jax.data.order import TrainingOrder, check_capacity
from btlm_jax.data.reader import SplitReader, TokenStore
from btlm_jax.recipe.curriculum import Curriculum

MAX_READ_THREADS = 8

Index = tuple[slice, ...]
Rows = dict[str, np.ndarray]  # inputs_BT, targets_BT: int32; weights_BT: float32
Batch = dict[str, jax.Array]  # the same keys and dtypes


class TrainLoader:
    """The training batches of a run.

    A batch's leaves are [A, B/A, T]; row (a, r) of step k is sequence `(k - first_step)*B + a*(B/A) + r` of the step's
    phase, whose B and T these are. `shardings` place such leaves, one for each phase, for example P(None, "fsdp").

    Raises:
      ValueError: the store does not serve the curriculum, or the mesh does not divide a batch.
    """

    def __init__(
        self,
        token_store: TokenStore,
        *,
        curriculum: Curriculum,
        seed: int,
        max_epochs: int,
        accumulation: int,
        prefetch: int,
        shardings: Sequence[NamedSharding],
    ):
        self._reader = token_store.split(store_format.TRAIN)
        self._order = TrainingOrder(
            curriculum=curriculum,
            num_blocks=len(self._reader),
            block_len=self._reader.block_len,
            seed=seed,
        )
        self.use = check_capacity(self._order, max_epochs=max_epochs)
        self._prefetch = prefetch
        self._placements = [
            make_placement(
                sharding,
                rows_shape=(accumulation, phase.batch_size // accumulation),
                seq_len=phase.seq_len,
            )
            for phase, sharding in zip(curriculum.phases, shardings, strict=True)
        ]

    def batches(self, *, first_step: int) -> Generator[tuple[int, Batch]]:
        """Yield (step, batch) from `first_step` to the curriculum's end; closing the generator stops its threads."""
        steps = range(first_step, self._order.curriculum.num_steps)
        with contextlib.closing(read_ahead(self._read_step, steps, prefetch=self._prefetch)) as rows_of_steps:
            for step, rows in zip(steps, rows_of_steps, strict=True):
                yield step, self._placement(step).place(rows)

    def _read_step(self, step: int) -> Rows:
        """Read this process's rows of a step's batch."""
        phase = self._order.curriculum.phase_at(step)
        first = (step - phase.first_step) * phase.batch_size
        sequences = [first + number for number in self._placement(step).row_numbers.tolist()]
        windows = self._order.windows(phase, sequences=sequences)
        starts = [(window.block, window.window * phase.seq_len) for window in windows]
        return read_rows(self._reader, starts, seq_len=phase.seq_len)

    def _placement(self, step: int) -> Placement:
        return self._placements[self._order.curriculum.phase_at(step).index]


def read_rows(reader: SplitReader, starts: Sequence[tuple[int, int]], *, seq_len: int) -> Rows:
    """Read one row for each (block, first target in the block): int32 inputs and targets, float32 weights, [rows, T].

    A target's weight is 1, or 0 in the padding of a stream's last block.
    """
    tokens_BT = np.zeros((len(starts), seq_len + 1), np.int32)
    num_targets_B = np.zeros(len(starts), np.int64)
    blocks = reader.read_many([number for number, _ in starts])
    for row, (block, (_, start)) in enumerate(zip(blocks, starts, strict=True)):
        tokens_BT[row] = block.tokens[start : start + seq_len + 1]
        num_targets_B[row] = block.num_targets - start
    return {
        "inputs_BT": tokens_BT[:, :-1],
        "targets_BT": tokens_BT[:, 1:],
        "weights_BT": (np.arange(seq_len) < num_targets_B[:, None]).astype(np.float32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Which rows of a global batch this process reads, and which of them go to which of its devices."""

    sharding: NamedSharding
    shape: tuple[int, ...]  # of a leaf, T last
    row_numbers: np.ndarray  # int64 [rows read], ascending; rows are numbered in C order of shape[:-1]
    slot_of_row: np.ndarray  # int64, shape[:-1]: index into row_numbers; -1 for rows that only other processes read

    def place(self, rows: Rows) -> Batch:
        """Make the global arrays from this process's rows, in the order of row_numbers."""
        return {
            name: jax.make_array_from_callback(
                self.shape, self.sharding, lambda index, leaf=leaf: self._part(leaf, index)
            )
            for name, leaf in rows.items()
        }

    def _part(self, leaf: np.ndarray, index: Index | None) -> np.ndarray:
        assert index is not None  # which JAX allows for devices of other processes only
        return leaf[self.slot_of_row[index[:-1]]][..., index[-1]]


def make_placement(sharding: NamedSharding, *, rows_shape: tuple[int, ...], seq_len: int) -> Placement:
    """Make the placement of leaves [*rows_shape, seq_len] for this process.

    Raises:
      ValueError: the mesh does not divide the shape.
    """
    shape = (*rows_shape, seq_len)
    sharding.shard_shape(shape)
    indices = [index for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
    row_numbers = needed_rows(indices, rows_shape=rows_shape)
    slot_of_row = np.full(rows_shape, -1)
    slot_of_row.reshape(-1)[row_numbers] = np.arange(len(row_numbers))
    return Placement(sharding=sharding, shape=shape, row_numbers=row_numbers, slot_of_row=slot_of_row)


def needed_rows(indices: Iterable[Index], *, rows_shape: tuple[int, ...]) -> np.ndarray:
    """Return the sorted, distinct numbers of the rows that devices with the parts `indices` of a batch need."""
    is_needed = np.zeros(rows_shape, bool)
    for index in indices:
        is_needed[index[:-1]] = True
    return np.flatnonzero(is_needed)


def read_ahead(read: Callable[[int], Rows], numbers: range, *, prefetch: int) -> Generator[Rows]:
    """Yield read(n) of each number in order, up to `prefetch` ahead on threads; errors are raised to the consumer."""
    options = grain.ReadOptions(num_threads=min(prefetch, MAX_READ_THREADS), prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(numbers).map(read).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
