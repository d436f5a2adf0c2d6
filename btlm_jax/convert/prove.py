"""Prove a conversion: compare the logits of the source and of the written model on the same tokens.

The written files are computed by hub/numpy_network.py, which reads one tensor at a time, so that a model of any size is
proven in little memory, and which shares no code with the JAX model or with the exported PyTorch code.
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
    """The distance of two sets of logits."""

    subject: str  # what was compared with the source
    num_tokens: int
    largest_error: float  # max |source - target|
    scale: float  # max |source|
    tolerance: float  # of largest_error / scale
    top1_agreement: float  # share of positions with the same likeliest token

    @property
    def holds(self) -> bool:
        return bool(self.largest_error <= self.tolerance * self.scale)  # False for NaN

    def __str__(self) -> str:
        sign = "within" if self.holds else "ABOVE"
        return (
            f"{self.subject}: largest difference of logits {self.largest_error:.2e} (logits up to {self.scale:.3g}, "
            f"{self.num_tokens} tokens, same likeliest token at {100 * self.top1_agreement:.1f} %), "
            f"{sign} the tolerance of {self.tolerance * self.scale:.2e}"
        )


def compare(subject: str, source_TV: np.ndarray, target_TV: np.ndarray, *, tolerance: float) -> Proof:
    """Compare two sets of logits; `tolerance` is relative to the largest logit."""
    return Proof(
        subject=subject,
        num_tokens=len(source_TV),
        largest_error=float(np.abs(source_TV - target_TV).max()),
        scale=float(np.abs(source_TV).max()),
        tolerance=tolerance,
        top1_agreement=float((source_TV.argmax(-1) == target_TV.argmax(-1)).mean()),
    )


def probe_ids(text_ids: Sequence[int], *, vocab_size: int) -> np.ndarray:
    """Return the first ids of a text, or random ids for a model without a tokenizer."""
    if len(text_ids):
        return np.asarray(text_ids[:MAX_PROBE_LENGTH], np.int64)
    return np.random.default_rng(0).integers(0, vocab_size, MAX_PROBE_LENGTH)
