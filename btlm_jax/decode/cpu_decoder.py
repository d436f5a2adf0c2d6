"""Prefill and decode on a CPU: the cache, and the step over it, compiled once for every shape it meets."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from btlm_jax.decode.cpu_cache import MAX_PIECE, grown, make_cache, make_layout
from btlm_jax.decode.cpu_forward import extend
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm


class CpuDecoder:
    """Rows of tokens that grow: `prefill` once, then `decode` token by token.

    `lost` bounds the share of any head's attention that lay outside the windows of the cache so far (cache.py).
    """

    def __init__(self, model: Btlm, weights: Weights, *, num_rows: int, num_slots: int, cache_dtype: str):
        self._model, self._weights, self.lost = model, weights, 0.0
        self._layout = make_layout(model.config, length=num_slots)
        self._cache = make_cache(model.config, self._layout, batch_size=num_rows, dtype=cache_dtype)

    def prefill(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run the prompts; return the float32 logits_BV after each row's last token."""
        lengths_B = np.array([len(history) for history in histories])
        found: list = [None] * len(histories)
        for start in range(0, int(lengths_B.max()), MAX_PIECE):
            counts_B = np.clip(lengths_B - start, 0, MAX_PIECE)
            width = 1 << (int(counts_B.max()) - 1).bit_length()
            pieces_BT = np.zeros((len(histories), width), np.int32)
            for row, history in enumerate(histories):
                pieces_BT[row, : counts_B[row]] = history[start : start + counts_B[row]]
            logits_BV = self._run(pieces_BT, np.full(len(histories), start), counts_B)
            for row in np.flatnonzero((counts_B > 0) & (lengths_B <= start + MAX_PIECE)):
                found[row] = logits_BV[row]
        return np.stack(found)

    def decode(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run each row's newest token; return the float32 logits_BV after it."""
        newest_B1 = np.array([[history[-1]] for history in histories])
        starts_B = np.array([len(history) - 1 for history in histories])
        return self._run(newest_B1, starts_B, np.ones_like(starts_B))

    def grow(self, num_slots: int) -> None:
        """Make room for longer rows."""
        layout = make_layout(self._model.config, length=num_slots)
        self._cache = jax.jit(grown, static_argnums=(1, 2))(self._cache, self._layout, layout)
        self._layout = layout

    def _run(self, inputs_BT: np.ndarray, starts_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
        logits_BV, self._cache, lost = extend(
            self._model,
            self._weights,
            self._cache,
            layout=self._layout,
            inputs_BT=inputs_BT.astype(np.int32),
            starts_B=starts_B.astype(np.int32),
            counts_B=counts_B.astype(np.int32),
        )
        self.lost = max(self.lost, float(lost))
        return np.asarray(logits_BV)
