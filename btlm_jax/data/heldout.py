"""Batches of the held-out split, each row with its source, for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import numpy as np
from jax.sharding import NamedSharding

from btlm_jax.data import store as store_format
from btlm_jax.data.loader import Batch, Rows, make_placement, read_ahead, read_rows
from btlm_jax.data.reader import TokenStore
from btlm_jax.data.store import Split


def heldout_batches(
    token_store: TokenStore,
    *,
    batch_size: int,
    blocks_per_source: int,
    prefetch: int,
    sharding: NamedSharding,
    most_documents: int = 0,
) -> Generator[tuple[list[str], Batch]]:
    """Yield (source of each row, batch) over the first `blocks_per_source` held-out blocks of every source.

    Leaves are [batch_size, block_len], placed by `sharding`, for example P("fsdp"). Sources come in the order of their
    blocks; of a source with fewer blocks all are read, so the split's num_blocks reads everything. The last batch is
    filled with rows of zero weight, whose source is "". `most_documents` is that of `read_rows`.
    """
    reader = token_store.split(store_format.HELDOUT)
    blocks = heldout_blocks(reader.split, blocks_per_source=blocks_per_source)
    num_batches = -(-len(blocks) // batch_size)
    sources = [source for source, _ in blocks] + [""] * (num_batches * batch_size - len(blocks))
    placement = make_placement(sharding, rows_shape=(batch_size,), seq_len=reader.block_len)

    def read_batch(index: int) -> Rows:
        numbers = [index * batch_size + number for number in placement.row_numbers.tolist()]
        starts = [(blocks[number][1], 0) for number in numbers if number < len(blocks)]
        rows = read_rows(reader, starts, seq_len=reader.block_len, most_documents=most_documents)
        missing = len(numbers) - len(starts)
        return {name: np.pad(leaf, ((0, missing), (0, 0))) for name, leaf in rows.items()}

    with contextlib.closing(read_ahead(read_batch, range(num_batches), prefetch=prefetch)) as rows_of_batches:
        for index, rows in enumerate(rows_of_batches):
            yield sources[index * batch_size : (index + 1) * batch_size], placement.place(rows)


def heldout_blocks(split: Split, *, blocks_per_source: int) -> list[tuple[str, int]]:
    """Return (source, block) of the first `blocks_per_source` blocks of each source, in the order of the blocks."""
    return [
        (name, block)
        for name, source in store_format.streams_of(split)
        for block in range(source.first_block, source.first_block + min(blocks_per_source, source.num_blocks))
    ]
