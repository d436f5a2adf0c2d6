"""The loss of texts, by source and of all: nats a token, perplexity, bits a byte, with intervals over documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from btlm_jax.evaluate.bootstrap import interval_of, resampled_sums
from btlm_jax.evaluate.documents import Document
from btlm_jax.evaluate.results import Work
from btlm_jax.evaluate.scorer import Scorer
from btlm_jax.evaluate.windows import rows_of
from btlm_jax.train.heldout import SourceLoss

NATS, TOKENS, BYTES = range(3)  # columns of a source's array of documents
_UNIT_TOKENS = 1 << 16  # documents are scored, and kept, about so many tokens at a time


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextLoss:
    """The loss of documents: of each source an array of (nats, tokens, bytes), float64 [documents, 3]."""

    documents: dict[str, np.ndarray]

    def to_json(self) -> dict:
        """Return the losses with their intervals, and those of each document, as JSON's numbers, lists and dicts.

        A source of one document, and what it is part of, has null as interval: nothing can be resampled.
        """
        sums = {source: array.sum(0) for source, array in self.documents.items()}
        resamples = resampled_sums(list(self.documents.values()))
        losses = resamples[..., NATS] / resamples[..., TOKENS]
        counts = list(map(len, self.documents.values()))
        has_interval = min(counts) > 1
        return {
            **_loss_json(sum(sums.values(), np.zeros(3)), resamples.sum(1), has_interval=has_interval),
            "documents": sum(counts),
            "mean_of_sources": float(np.mean([each[NATS] / each[TOKENS] for each in sums.values()])),
            "mean_of_sources_interval": interval_of(losses.mean(1)).to_json() if has_interval else None,
            "sources": {
                source: _loss_json(each, resamples[:, number], has_interval=count > 1) | {"documents": count}
                for number, ((source, each), count) in enumerate(zip(sums.items(), counts, strict=True))
            },
            "of_documents": {
                source: {name: array[:, column].tolist() for name, column in _COLUMNS.items()}
                for source, array in self.documents.items()
            },
        }


_COLUMNS = {"nats": NATS, "tokens": TOKENS, "bytes": BYTES}


def documents_of(result: dict) -> dict[str, np.ndarray]:
    """Return `TextLoss.documents` of what its `to_json` gave."""
    return {
        source: np.stack([np.asarray(columns[name], np.float64) for name in _COLUMNS], axis=1)
        for source, columns in result["of_documents"].items()
    }


def measure_text_loss(
    scorer: Scorer, documents: Sequence[Document], *, length: int, overlap: int, work: Work
) -> TextLoss:
    """Return the loss of documents in windows of `length` tokens; `work` keeps what is done, and shows progress.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    units = list(_units(documents))
    work.begin([sum(len(documents[index].tokens) - 1 for index in unit) for unit in units], unit_name="tokens")
    nats = np.zeros(len(documents))
    for number, unit in enumerate(units):
        if (done := work.done(number)) is None:
            chosen = [documents[index] for index in unit]
            done = _score_documents(scorer, chosen, length=length, overlap=overlap, work=work)
            for document, loss in zip(chosen, done, strict=True):
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss of a document of source {document.source!r} is {loss}")
            work.add(number, done)
        nats[unit] = done
    by_source: dict[str, list[tuple[float, int, int]]] = {}
    for document, loss in zip(documents, nats.tolist(), strict=True):
        by_source.setdefault(document.source, []).append((loss, document.num_targets, document.num_bytes))
    return TextLoss(documents={source: np.array(rows, np.float64) for source, rows in by_source.items()})


def _units(documents: Sequence[Document]) -> Iterator[list[int]]:
    """Yield the numbers of documents, in order, in groups of about _UNIT_TOKENS tokens."""
    unit, size = [], 0
    for index, document in enumerate(documents):
        unit.append(index)
        size += len(document.tokens)
        if size >= _UNIT_TOKENS:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _score_documents(
    scorer: Scorer, documents: Sequence[Document], *, length: int, overlap: int, work: Work
) -> list[float]:
    """Return the nats of each document's counted tokens."""
    rows = [rows_of(document, length=length, overlap=overlap) for document in documents]
    all_rows = [row for of_document in rows for row in of_document]
    scores = iter(scorer.log_likelihoods(all_rows, on_scored=lambda row: work.advance(row.num_scored)))
    nats = []
    for document, of_document in zip(documents, rows, strict=True):
        log_p = np.concatenate([next(scores).log_p_T for _ in of_document])
        nats.append(float(-log_p[document.is_counted].sum()))
    return nats


def _loss_json(sums: np.ndarray, resamples: np.ndarray, *, has_interval: bool) -> dict:
    """Return one loss from its sums of (nats, tokens, bytes), with intervals from [resamples, 3]."""
    part = SourceLoss(nats=float(sums[NATS]), num_tokens=round(sums[TOKENS]), num_bytes=float(sums[BYTES]))

    def interval(values: np.ndarray) -> list[float] | None:
        return interval_of(values).to_json() if has_interval else None

    values = {
        "loss": part.loss,
        "loss_interval": interval(resamples[:, NATS] / resamples[:, TOKENS]),
        "perplexity": part.perplexity,
        "tokens": part.num_tokens,
        "bytes": round(part.num_bytes),
    }
    if part.num_bytes:  # special tokens alone have no text
        bits = resamples[:, NATS] / np.maximum(resamples[:, BYTES], 1) / math.log(2)
        values |= {"bits_per_byte": part.bits_per_byte, "bits_per_byte_interval": interval(bits)}
    return values
