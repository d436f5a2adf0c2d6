"""Prefill and decode on a CPU: the cache, and the step over it, compiled once per shape."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from btlm_jax.decode.cpu_cache import MAX_PIECE, make_cache, make_layout, resize_cache
from btlm_jax.decode.cpu_forward import extend
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm


class CpuDecoder:
    """A decoder (decoder.py) over tiled weights: `prefill` once, then `decode` token by token.

    `dropped_attention_bound` bounds the share of any head's attention outside the windows of the cache so far
    (cpu_cache.py).
    """

    def __init__(self, model: Btlm, weights: Weights, *, num_rows: int, num_slots: int, cache_dtype: str):
        self._model, self._weights, self.dropped_attention_bound = model, weights, 0.0
        self._layout = make_layout(model.config, length=num_slots, alibi_train_len=model.alibi_train_len)
        self._cache = make_cache(model.config, self._layout, batch_size=num_rows, dtype=cache_dtype)

    def prefill(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run the prompts; return the float32 logits_BV after each row's last token."""
        lengths_B = np.array([len(history) for history in histories])
        last_logits: dict[int, np.ndarray] = {}
        for start in range(0, int(lengths_B.max()), MAX_PIECE):
            counts_B = np.clip(lengths_B - start, 0, MAX_PIECE)
            width = 1 << (int(counts_B.max()) - 1).bit_length()
            pieces_BT = np.zeros((len(histories), width), np.int32)
            for row, history in enumerate(histories):
                pieces_BT[row, : counts_B[row]] = history[start : start + counts_B[row]]
            logits_BV = self._run(pieces_BT, np.full(len(histories), start), counts_B, lengths_B)
            for row in np.flatnonzero((counts_B > 0) & (lengths_B <= start + MAX_PIECE)):
                last_logits[int(row)] = logits_BV[row]
        return np.stack([last_logits[row] for row in range(len(histories))])

    def decode(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Run each row's newest token; return the float32 logits_BV after it."""
        newest_B1 = np.array([[history[-1]] for history in histories])
        starts_B = np.array([len(history) - 1 for history in histories])
        return self._run(newest_B1, starts_B, np.ones_like(starts_B), starts_B + 1)

    def grow(self, num_slots: int) -> None:
        """Copy the cache into one for rows of up to `num_slots` tokens, more than it has."""
        model = self._model
        layout = make_layout(model.config, length=num_slots, alibi_train_len=model.alibi_train_len)
        self._cache = jax.jit(resize_cache, static_argnums=(1, 2))(self._cache, self._layout, layout)
        self._layout = layout

    def _run(
        self, inputs_BT: np.ndarray, starts_B: np.ndarray, counts_B: np.ndarray, lengths_B: np.ndarray
    ) -> np.ndarray:
        logits_BV, self._cache, dropped = extend(
            self._model,
            self._weights,
            self._cache,
            layout=self._layout,
            inputs_BT=inputs_BT.astype(np.int32),
            starts_B=starts_B.astype(np.int32),
            counts_B=counts_B.astype(np.int32),
            lengths_B=lengths_B.astype(np.int32),
        )
        self.dropped_attention_bound = max(self.dropped_attention_bound, float(dropped))
        return np.asarray(logits_BV)
