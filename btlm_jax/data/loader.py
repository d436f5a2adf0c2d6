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

from btlm_jax import notices
from btlm_jax.data import store as store_format
from btlm_jax.data.order import make_order
from btlm_jax.data.reader import SplitReader, TokenStore
from btlm_jax.recipe.config import DataConfig
from btlm_jax.recipe.curriculum import Curriculum

MAX_READ_THREADS = 8

Index = tuple[slice, ...]
Rows = dict[str, np.ndarray]  # inputs_BT, targets_BT, and starts_BT with a document mask: int32; weights_BT: float32
Batch = dict[str, jax.Array]  # the same keys and dtypes


class TrainLoader:
    """The training batches of a run.

    A batch's leaves are [A, B/A, T]; row (a, r) of step k is sequence `(k - first_step)*B + a*(B/A) + r` of the step's
    phase, whose B and T these are. `shardings` place such leaves, one for each phase, for example P(None, "fsdp").
    `most_documents` is that of `read_rows`.

    Raises:
      ValueError: the store does not serve the curriculum, or the mesh does not divide a batch.
    """

    def __init__(
        self,
        token_store: TokenStore,
        *,
        curriculum: Curriculum,
        data: DataConfig,
        accumulation: int,
        shardings: Sequence[NamedSharding],
        most_documents: int = 0,
    ):
        self._reader = token_store.split(store_format.TRAIN)
        self.order = make_order(token_store.manifest, curriculum=curriculum, data=data)
        self.use = self.order.check_capacity(max_epochs=data.max_epochs)
        self._prefetch = data.prefetch
        self._most_documents = most_documents
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
        steps = range(first_step, self.order.curriculum.num_steps)
        with contextlib.closing(read_ahead(self._read_step, steps, prefetch=self._prefetch)) as rows_of_steps:
            for step, rows in zip(steps, rows_of_steps, strict=True):
                yield step, self._placement(step).place(rows)

    def _read_step(self, step: int) -> Rows:
        """Read this process's rows of a step's batch."""
        phase = self.order.curriculum.phase_at(step)
        first = (step - phase.first_step) * phase.batch_size
        sequences = [first + number for number in self._placement(step).row_numbers.tolist()]
        windows = self.order.windows(phase, sequences=sequences)
        starts = [(window.block, window.window * phase.seq_len) for window in windows]
        return read_rows(self._reader, starts, seq_len=phase.seq_len, most_documents=self._most_documents)

    def _placement(self, step: int) -> Placement:
        return self._placements[self.order.curriculum.phase_at(step).index]


def read_rows(reader: SplitReader, starts: Sequence[tuple[int, int]], *, seq_len: int, most_documents: int = 0) -> Rows:
    """Read one row for each (block, first target in the block): int32 inputs and targets, float32 weights, [rows, T].

    A target's weight is 1, or 0 in the padding of a stream's last block, and where examples are not trained. With
    `most_documents` > 0 there is starts_BT too, see `document_starts`.
    """
    tokens_BT = np.zeros((len(starts), seq_len + 1), np.int32)
    num_targets_B = np.zeros(len(starts), np.int64)
    marks_BT = np.zeros(tokens_BT.shape, np.uint8)
    blocks = reader.read_many([number for number, _ in starts])
    for row, (block, (_, start)) in enumerate(zip(blocks, starts, strict=True)):
        tokens_BT[row] = block.tokens[start : start + seq_len + 1]
        num_targets_B[row] = block.num_targets - start
        if block.marks is not None:
            marks_BT[row] = block.marks[start : start + seq_len + 1]
    rows = {
        "inputs_BT": tokens_BT[:, :-1],
        "targets_BT": tokens_BT[:, 1:],
        "weights_BT": (np.arange(seq_len) < num_targets_B[:, None]).astype(np.float32),
    }
    if reader.has_marks:
        rows["weights_BT"] = (marks_BT[:, 1:] & store_format.TRAINED > 0).astype(np.float32)
    if not most_documents:
        return rows
    if reader.has_marks:
        begins_BT = marks_BT[:, :-1] & store_format.BEGINS > 0
        return {**rows, "starts_BT": starts_of(begins_BT, most=most_documents)}
    starts_BT = document_starts(rows["inputs_BT"], num_targets_B, eos_id=reader.eos_id, most=most_documents)
    return {**rows, "starts_BT": starts_BT}


def document_starts(inputs_BT: np.ndarray, num_targets_B: np.ndarray, *, eos_id: int, most: int) -> np.ndarray:
    """Return the position at which the document of each position begins, int32 [B, T]: 0, or that of its EOS.

    An EOS belongs to the document that it opens; as a target it ends the one before. Padding, of which there is no
    target, opens none. Of more than `most` documents in a row those beyond are one with the last, which is reported.
    """
    position_T = np.arange(inputs_BT.shape[1])
    return starts_of((inputs_BT == eos_id) & (position_T <= num_targets_B[:, None]), most=most)


def starts_of(begins_BT: np.ndarray, *, most: int) -> np.ndarray:
    """Return the position of the last true at or before each position, int32 [B, T]; position 0 counts as true.

    Of more than `most` in a row those beyond do not count, which is reported.
    """
    position_T = np.arange(begins_BT.shape[1])
    begins_BT = begins_BT | (position_T == 0)
    number_BT = begins_BT.cumsum(1)
    if joined := int((number_BT[:, -1] - most).clip(0).sum()):
        message = (
            f"a window of {len(position_T):,} tokens has more than the {most} documents that attention keeps apart"
        )
        notices.report("documents-joined", f"{message} here; those beyond are one", count=joined)
    return np.maximum.accumulate(np.where(begins_BT & (number_BT <= most), position_T, 0), axis=1).astype(np.int32)


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
