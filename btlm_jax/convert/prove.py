"""Prove a conversion: the logits of what was read and of what was written, on the same tokens.

The forward pass here reads one tensor at a time, in float32 NumPy, so that a model of any size is proven in little
memory, and it shares no code with the JAX model nor with the PyTorch file that goes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

PROBE = (
    "The cat sat on the mat. def area(radius):\n    return 3.14159 * radius ** 2\n"
    "In 1865 he wrote: \u201cWhat is not measured, is not known.\u201d \u00c9t\u00e9 \u2014 \u6570\u5b66 \U0001f600\n"
)
MAX_PROBE_LENGTH = 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """How far two sets of logits are apart."""

    what: str  # what was compared
    num_tokens: int
    largest: float  # |source - target|
    scale: float  # largest |source|
    tolerance: float  # of largest, relative to scale
    same_top: float  # share of positions whose likeliest token is the same

    @property
    def holds(self) -> bool:
        return bool(self.largest <= self.tolerance * self.scale)  # not so for NaN

    def __str__(self) -> str:
        sign = "within" if self.holds else "ABOVE"
        return (
            f"{self.what}: largest difference of logits {self.largest:.2e} (logits up to {self.scale:.3g}, "
            f"{self.num_tokens} tokens, same likeliest token at {100 * self.same_top:.1f} %), "
            f"{sign} the tolerance of {self.tolerance * self.scale:.2e}"
        )


def compare(what: str, source_TV: np.ndarray, target_TV: np.ndarray, *, tolerance: float) -> Proof:
    """Compare two sets of logits; `tolerance` is relative to the largest logit."""
    return Proof(
        what=what,
        num_tokens=len(source_TV),
        largest=float(np.abs(source_TV - target_TV).max()),
        scale=float(np.abs(source_TV).max()),
        tolerance=tolerance,
        same_top=float((source_TV.argmax(-1) == target_TV.argmax(-1)).mean()),
    )


def probe_ids(text_ids: Sequence[int], *, vocab_size: int) -> np.ndarray:
    """Return the tokens to compare on: those of a text, or drawn ones when the model came without a tokenizer."""
    if len(text_ids):
        return np.asarray(text_ids[:MAX_PROBE_LENGTH], np.int64)
    return np.random.default_rng(0).integers(0, vocab_size, MAX_PROBE_LENGTH)
