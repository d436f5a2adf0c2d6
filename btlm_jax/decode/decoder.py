"""What runs a batch of growing rows over a cache: on a mesh of devices, or in a CPU's kernels (cpu_decoder.py)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.decode.cpu_cache import DTYPES as CACHE_DTYPES
from btlm_jax.decode.cpu_decoder import CpuDecoder
from btlm_jax.decode.kv_cache import KVCache, extend, make_cache
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm
from btlm_jax.model.loss import logits
from btlm_jax.parallel.mesh import FSDP

__all__ = ["CACHE_DTYPES", "Decoder", "ShardedDecoder", "bucket", "make_decoder"]

PREFILL_PIECE = 256  # tokens of a prompt that run at a time: memory for scores is this times the cache's slots
MIN_SLOTS = 128  # the sizes of caches are powers of two from here, so that few shapes are ever compiled


class Decoder(Protocol):
    """Runs rows of tokens over a cache of their keys and values.

    `dropped_attention_bound` bounds the share of any head's attention, so far, that belongs to keys dropped from the
    cache.
    """

    dropped_attention_bound: float

    def prefill(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run the prompts; return the float32 logits_BV after each row's last token."""
        ...

    def decode(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run each row's newest token; return the float32 logits_BV after it."""
        ...

    def grow(self, num_slots: int) -> None:
        """Copy the cache into one for rows of up to `num_slots` tokens, more than it has."""


def make_decoder(
    model: Btlm, params: dict | Weights, mesh: Mesh, *, num_rows: int, num_slots: int, cache_dtype: str
) -> Decoder:
    """Make an empty decoder: weights in tiles run without the mesh, a parameter tree runs on it.

    Raises:
      ValueError: a parameter tree with a cache of int8, which only weights in tiles have.
    """
    if isinstance(params, Weights):
        return CpuDecoder(model, params, num_rows=num_rows, num_slots=num_slots, cache_dtype=cache_dtype)
    if cache_dtype == "int8":
        raise ValueError(
            "cache_dtype='int8' is not allowed here; it is for 4-bit models, and on a CPU with a C++ compiler for any"
        )
    return ShardedDecoder(model, params, mesh, num_rows=num_rows, num_slots=num_slots, cache_dtype=cache_dtype)


def bucket(length: int) -> int:
    """Return the size of a cache for rows of a length."""
    return max(MIN_SLOTS, 1 << (length - 1).bit_length())


class ShardedDecoder:
    """The cache on the devices, and the step over it, compiled once per shape in the process."""

    def __init__(self, model: Btlm, params: dict, mesh: Mesh, *, num_rows: int, num_slots: int, cache_dtype: str):
        self._model, self._params, self._mesh = model, params, mesh
        self._num_rows, self._dtype, self.dropped_attention_bound = num_rows, cache_dtype, 0.0
        self._rows = NamedSharding(mesh, PartitionSpec(FSDP))
        self._cache = make_cache(model, mesh, batch_size=num_rows, num_slots=num_slots, dtype=cache_dtype)

    def prefill(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run the prompts; return the float32 logits_BV after each row's last token."""
        lengths_B = np.array([len(history) for history in histories])
        last_logits: dict[int, np.ndarray] = {}
        width = min(PREFILL_PIECE, bucket(int(lengths_B.max())))
        for start in range(0, int(lengths_B.max()), width):
            pieces_BT = np.zeros((len(histories), width), np.int32)
            for row, history in enumerate(histories):
                piece = history[start : start + width]
                pieces_BT[row, : len(piece)] = piece
            last_B = lengths_B - 1 - start
            starts_B = np.full(len(histories), start)
            logits_BV = self._run(pieces_BT, starts_B, lengths_B, np.clip(last_B, 0, width - 1))
            for row in np.flatnonzero((last_B >= 0) & (last_B < width)):
                last_logits[int(row)] = logits_BV[row]
        return np.stack([last_logits[row] for row in range(len(histories))])

    def decode(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run each row's newest token; return the float32 logits_BV after it."""
        newest_B1 = np.array([[history[-1]] for history in histories])
        starts_B = np.array([len(history) - 1 for history in histories])
        return self._run(newest_B1, starts_B, starts_B + 1, np.zeros_like(starts_B))

    def grow(self, num_slots: int) -> None:
        """Copy the cache into one of `num_slots`, more than it has."""
        empty = make_cache(self._model, self._mesh, batch_size=self._num_rows, num_slots=num_slots, dtype=self._dtype)
        with jax.set_mesh(self._mesh):
            self._cache = _copy_into(empty, self._cache)

    def _run(
        self, inputs_BT: np.ndarray, starts_B: np.ndarray, lengths_B: np.ndarray, last_B: np.ndarray
    ) -> np.ndarray:
        def place(values):
            values = values.astype(np.int32)
            return jax.make_array_from_callback(values.shape, self._rows, lambda index: values[index])

        with jax.set_mesh(self._mesh):
            placed = (place(values) for values in (inputs_BT, starts_B, lengths_B, last_B))
            logits_BV, self._cache = _extend_and_read(self._model, self._params, self._cache, *placed)
        return np.asarray(logits_BV)


@functools.partial(jax.jit, donate_argnums=0)
def _copy_into(larger: KVCache, smaller: KVCache) -> KVCache:
    """Copy each array to the beginning of a larger one, whichever dim is longer."""

    def copy(larger, smaller):
        return jax.lax.dynamic_update_slice(larger, smaller, (0,) * larger.ndim)

    return jax.tree.map(copy, larger, smaller)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend_and_read(model: Btlm, params: dict, cache: KVCache, inputs_BT, starts_B, lengths_B, last_B):
    hidden_BTD, cache = extend(model, params, cache, inputs_BT=inputs_BT, starts_B=starts_B, lengths_B=lengths_B)
    hidden_BTD = jax.sharding.reshard(hidden_BTD, PartitionSpec(None, None, None))
    last_B = jax.sharding.reshard(last_B, PartitionSpec(None))
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    table_VD = jax.sharding.reshard(params["embedding"]["embedding"], PartitionSpec(None, None))
    return logits(hidden_B1D, table_VD, output_scale=model.parametrization.output_scale)[:, 0], cache
