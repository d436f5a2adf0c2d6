"""Held-out loss by source, in nats per token and bits per byte, and by position; sums are float64, on the host.

The compiled function that they are sums of, eval_step, is here too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from btlm_jax.data.store import HELDOUT, Manifest
from btlm_jax.model import Btlm
from btlm_jax.model.loss import token_losses

RISE = 0.02  # nats by which the loss of a later bin must exceed the lowest before it to count as a rise
PADDING = ""  # the source of a row that only fills its batch
MAX_EXPONENT = 700.0  # e^710 exceeds float64, and JSON has no infinity


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceLoss:
    """The loss of one source: nats summed over `num_tokens` targets, whose text has `num_bytes` UTF-8 bytes."""

    nats: float
    num_tokens: int
    num_bytes: float

    @property
    def loss(self) -> float:
        """Return the mean loss in nats a token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Return e^loss, limited to e^700."""
        return math.exp(min(self.loss, MAX_EXPONENT))

    @property
    def bits_per_byte(self) -> float:
        """Return nats / ln 2 / bytes; unlike nats a token, it can be compared between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionBin:
    """The loss over targets at positions first..last; position p is predicted from p tokens of context."""

    first: int
    last: int
    loss: float  # nats a token
    standard_error: float  # of loss, from the scatter of the positions in the bin; 0 for a bin of one position
    num_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeldoutResult:
    """The held-out loss by source, and the summed loss and weight at each position."""

    sources: dict[str, SourceLoss]
    loss_T: np.ndarray  # float64, nats summed over rows
    weight_T: np.ndarray  # float64, targets counted

    def __str__(self) -> str:
        rows = [f"{name} {part.loss:.4f} ({part.bits_per_byte:.4f} bits/byte)" for name, part in self.sources.items()]
        return f"loss {self.total.loss:.4f} nats/token: {', '.join(rows)}"

    @property
    def total(self) -> SourceLoss:
        """Return the loss over all sources together: every token has the same weight."""
        parts = self.sources.values()
        return SourceLoss(
            nats=math.fsum(part.nats for part in parts),
            num_tokens=sum(part.num_tokens for part in parts),
            num_bytes=math.fsum(part.num_bytes for part in parts),
        )

    @property
    def mean_of_sources(self) -> float:
        """Return the mean of the sources' losses in nats a token: every source has the same weight."""
        return math.fsum(part.loss for part in self.sources.values()) / len(self.sources)

    @property
    def bins(self) -> tuple[PositionBin, ...]:
        """Return the loss in bins of positions 1, 2, 3-4, 5-8, ...; bins without targets are omitted."""
        edges = [0]
        while edges[-1] < len(self.weight_T):
            edges.append(min(max(2 * edges[-1], 1), len(self.weight_T)))
        parts = [slice(start, end) for start, end in zip(edges, edges[1:], strict=False)]
        return tuple(position_bin(self.loss_T, self.weight_T, part) for part in parts if self.weight_T[part].sum())

    @property
    def first_rise(self) -> int:
        """Return the first position at which the loss has risen, see `first_rise`, or 0."""
        return first_rise(self.bins)

    def to_json(self) -> dict:
        """Return the losses as JSON's numbers, lists and dicts; by position only the bins."""
        total = self.total
        return {
            "loss": total.loss,
            "perplexity": total.perplexity,
            "bits_per_byte": total.bits_per_byte,
            "heldout_tokens": total.num_tokens,
            "mean_of_sources": self.mean_of_sources,
            "sources": {
                name: {
                    "loss": part.loss,
                    "perplexity": part.perplexity,
                    "bits_per_byte": part.bits_per_byte,
                    "tokens": part.num_tokens,
                    "bytes": part.num_bytes,
                }
                for name, part in self.sources.items()
            },
            "positions": {
                "first": [bin_.first for bin_ in self.bins],
                "last": [bin_.last for bin_ in self.bins],
                "loss": [bin_.loss for bin_ in self.bins],
                "tokens": [bin_.num_tokens for bin_ in self.bins],
            },
            "first_rise": self.first_rise,
        }


def first_rise(bins: Sequence[PositionBin]) -> int:
    """Return the first position of the first bin whose loss has risen, or 0.

    A bin has risen if its loss is above the lowest bin before it by more than RISE and by more than two standard errors
    of the difference: with few blocks, neighbouring bins differ by more than RISE by chance. Bins of one position are
    ignored, because their error is unknown.
    """
    wide = [bin_ for bin_ in bins if bin_.first < bin_.last]
    if not wide:
        return 0
    lowest = wide[0]
    for bin_ in wide[1:]:
        error = math.hypot(bin_.standard_error, lowest.standard_error)
        if bin_.loss - lowest.loss > max(RISE, 2 * error):
            return bin_.first
        lowest = min(lowest, bin_, key=lambda candidate: candidate.loss)
    return 0


def evaluate_heldout(
    eval_step: Callable[[dict, dict], dict],
    params: dict,
    batches: Iterable[tuple[list[str], dict]],
    *,
    manifest: Manifest,
) -> HeldoutResult:
    """Return the loss over `batches` of (source of each row, batch); rows of source "" are padding of zero weight.

    eval_step(params, batch) returns sums of the loss in nats and of the weights, by row and by position: loss_B,
    weight_B, loss_T, weight_T. A source's bytes are those of the manifest, in proportion to the tokens evaluated.

    Raises:
      ValueError: there was nothing to evaluate.
      FloatingPointError: the loss of a source is not finite.
    """
    nats: dict[str, float] = {}
    num_tokens: dict[str, float] = {}
    loss_T, weight_T = np.zeros(()), np.zeros(())
    for sources, sums in _one_late(eval_step, params, batches):
        loss_T = loss_T + sums["loss_T"]
        weight_T = weight_T + sums["weight_T"]
        for source, loss, weight in zip(sources, sums["loss_B"].tolist(), sums["weight_B"].tolist(), strict=True):
            nats[source] = nats.get(source, 0.0) + loss
            num_tokens[source] = num_tokens.get(source, 0.0) + weight
    evaluated = [source for source, count in num_tokens.items() if source != PADDING and count > 0]
    if not evaluated:
        raise ValueError("there is no held-out text to evaluate: rebuild the token store with held-out documents")
    for source in evaluated:
        if not math.isfinite(nats[source]):
            raise FloatingPointError(f"the held-out loss of source {source!r} is {nats[source]}")
    entries = manifest.splits[HELDOUT].sources
    return HeldoutResult(
        sources={
            source: SourceLoss(
                nats=nats[source],
                num_tokens=round(num_tokens[source]),
                num_bytes=entries[source].num_bytes * (num_tokens[source] / entries[source].num_tokens),
            )
            for source in evaluated
        },
        loss_T=loss_T,
        weight_T=weight_T,
    )


def _one_late(
    eval_step: Callable[[dict, dict], dict], params: dict, batches: Iterable[tuple[list[str], dict]]
) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    """Yield (sources, sums in float64) of each batch, fetched while the device computes the next one."""
    pending: list[tuple[list[str], dict]] = []
    for sources, batch in batches:
        pending.append((sources, eval_step(params, batch)))
        if len(pending) > 1:
            yield _fetch(*pending.pop(0))
    for sources, sums in pending:
        yield _fetch(sources, sums)


def _fetch(sources: list[str], sums: dict) -> tuple[list[str], dict[str, np.ndarray]]:
    return sources, {name: np.asarray(x, np.float64) for name, x in sums.items()}


def position_bin(loss_T: np.ndarray, weight_T: np.ndarray, part: slice) -> PositionBin:
    """Return the loss over a part of the positions, from the sums of losses and weights at each."""
    loss_P, weight_P = loss_T[part], weight_T[part]
    loss = loss_P.sum() / weight_P.sum()
    # The contribution of each position to the error of a ratio of sums: (loss - mean * weight) / total weight.
    error_P = (loss_P - loss * weight_P) / weight_P.sum()
    num_positions = len(weight_P)
    return PositionBin(
        first=part.start + 1,
        last=part.stop,
        loss=float(loss),
        standard_error=math.sqrt(float(np.square(error_P).sum()) * num_positions / max(num_positions - 1, 1)),
        num_tokens=round(float(weight_P.sum())),
    )


def make_eval_step(model: Btlm, *, loss_chunk: int) -> Callable:
    """Make eval_step(params, batch) -> sums of the weighted losses, replicated: loss_B, weight_B, loss_T, weight_T.

    T is the position in the window, or in the document as far as it is in the window where batch has "starts_BT".
    """

    def eval_step(params: dict, batch: dict) -> dict:
        losses_BT = token_losses(
            _hidden(model, params, batch),
            params["embedding"]["embedding"],
            batch["targets_BT"],
            output_scale=model.parametrization.output_scale,
            chunk=loss_chunk,
            rules=model.rules,
        )
        losses_BT, weights_BT = _replicated(losses_BT), _replicated(batch["weights_BT"])
        losses_BT = losses_BT * weights_BT
        return {
            "loss_B": losses_BT.sum(1),
            "weight_B": weights_BT.sum(1),
            "loss_T": _sum_by_position(losses_BT, batch),
            "weight_T": _sum_by_position(weights_BT, batch),
        }

    return eval_step


def _hidden(model: Btlm, params: dict, batch: dict) -> jax.Array:
    """Return the network's output, hidden_BTD."""
    hidden_BTD = model.apply({"params": params}, batch["inputs_BT"], batch.get("starts_BT"))
    return cast(jax.Array, hidden_BTD)  # a tuple only with mutable collections


def _sum_by_position(x_BT: jax.Array, batch: dict) -> jax.Array:
    if "starts_BT" not in batch:
        return x_BT.sum(0)
    position_BT = jnp.arange(x_BT.shape[1])[None] - _replicated(batch["starts_BT"])
    return jnp.zeros(x_BT.shape[1:], x_BT.dtype).at[position_BT].add(x_BT)


def _replicated(x_BT):
    return jax.sharding.reshard(x_BT, PartitionSpec(None, None))
