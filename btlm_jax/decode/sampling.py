"""Draw the next token from logits, on the host: temperature, top-k, top-p, min-p, repetition penalty, seeds."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Temperature 0 takes the likeliest token; then only the penalty has an effect besides."""

    temperature: float
    top_k: int  # draw from so many likeliest tokens; 0: from all
    top_p: float  # from the fewest likeliest tokens with this much probability together; 1: from all
    min_p: float  # from tokens at least this fraction as likely as the likeliest; 0: from all
    repetition_penalty: float  # logits of tokens seen in the row are divided by it, or multiplied if negative; 1: none

    def __post_init__(self):
        for name, allowed, is_allowed in (
            ("temperature", "0 or more", 0 <= self.temperature < np.inf),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "above 0 and up to 1", 0 < self.top_p <= 1),
            ("min_p", "from 0 up to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "from 1e-6 to 1e6", 1e-6 <= self.repetition_penalty <= 1e6),
        ):
            if not is_allowed:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be {allowed}")


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def make_generator(seed: int, *, sample: int, prompt: Sequence[int]) -> np.random.Generator:
    """Return the random numbers of one sample of a prompt, which do not depend on its batch or its row."""
    digest = hashlib.sha256(np.asarray(prompt, "<i8").tobytes()).digest()
    return np.random.default_rng((seed, sample, int.from_bytes(digest, "big")))


def draw(logits_V: np.ndarray, *, history: Sequence[int], sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw the next token of a row whose tokens so far are `history`.

    Penalty as in Keskar et al. 2019 (CTRL, arXiv:1909.05858) with the sign rule of Hugging Face's processor; then
    temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751) and min-p (Nguyen et al. 2024, arXiv:2407.01082),
    each applied to the tokens that the ones before it left.

    Raises:
      ValueError: a logit is not finite.
    """
    logits_V = logits_V.astype(np.float64)
    if not np.isfinite(logits_V).all():
        raise ValueError(f"the model's logits after {len(history):,} tokens are not finite: its weights are damaged")
    penalty = sampling.repetition_penalty
    if penalty != 1:
        seen = np.unique(np.asarray(history, np.int64))
        logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    with np.errstate(over="ignore"):  # to -inf, at a temperature near 0
        scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    candidates = _likeliest(scaled_V, sampling.top_k)
    weights = _normalized(np.exp(scaled_V[candidates]))
    for chosen in (_nucleus(weights, sampling.top_p), weights >= sampling.min_p * weights.max()):
        weights = np.where(chosen, weights, 0)
    return int(generator.choice(candidates, p=_normalized(weights)))


def _likeliest(scaled_V: np.ndarray, top_k: int) -> np.ndarray:
    """Return the ids of the `top_k` largest, among equal ones the first."""
    if not 0 < top_k < len(scaled_V):
        return np.arange(len(scaled_V))
    least = np.partition(scaled_V, -top_k)[-top_k]
    above, equal = np.flatnonzero(scaled_V > least), np.flatnonzero(scaled_V == least)
    return np.concatenate([above, equal[: top_k - len(above)]])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Mark the fewest largest weights that sum to `top_p`, among equal ones the first.

    Only candidates are sorted: all weights up to (1 - p) / 2n sum to less than 1 - p, so the larger ones sum to p or
    more.
    """
    chosen = np.ones(len(weights), bool)
    if top_p < 1:
        candidates = np.flatnonzero(weights > (1 - top_p) / (2 * len(weights)))
        order = candidates[np.argsort(-weights[candidates], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        chosen[:] = False
        chosen[order[(before < top_p) | (np.arange(len(order)) == 0)]] = True
    return chosen


def _normalized(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()
