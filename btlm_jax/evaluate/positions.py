"""The loss by position in windows of several lengths, beyond the trained one too, with and without interpolated ALiBi.

All documents, in an order drawn from a seed, stand one after the other in one stream, end-of-text ids between them, and
the stream is cut into windows: sources are mixed alike at every position, and every token is scored once. This is
how the model card of BTLM-3B-8K shows its loss at 32,768 positions. Position p is predicted from p tokens.

Interpolation divides ALiBi's slopes (arXiv 2310.13017): FIXED by the longest length over the trained one, at every
length; DYNAMIC by a window's own length over the trained one, where that is more than 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from btlm_jax import notices
from btlm_jax.evaluate.bootstrap import interval_of, resampled_sums
from btlm_jax.evaluate.documents import Corpus
from btlm_jax.evaluate.results import Work
from btlm_jax.evaluate.scorer import Row, Scorer
from btlm_jax.model import Btlm
from btlm_jax.train.heldout import PositionBin, first_rise, position_bin

PLAIN, FIXED, DYNAMIC = "none", "fixed", "dynamic"
LENGTHS = (2048, 8192, 16384, 32768)
SEED = 0  # of the order of documents
FEWEST_TOKENS = 1000  # of a bin, for its loss to be shown or to count as a rise: losses of tokens scatter by nats
_UNIT_TOKENS = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Documents one after the other."""

    tokens: np.ndarray  # int32 [n + 1]
    is_counted: np.ndarray  # bool [n]: of tokens[1:]

    @property
    def identity(self) -> str:
        """Return a hash that is equal for equal texts in equal tokens."""
        return hashlib.sha256(self.tokens.tobytes() + self.is_counted.tobytes()).hexdigest()

    def cut(self, num_tokens: int) -> Stream:
        """Return the first so many targets; 0: all."""
        if not num_tokens:
            return self
        return Stream(tokens=self.tokens[: num_tokens + 1], is_counted=self.is_counted[:num_tokens])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One curve: the length of its windows, and how ALiBi's slopes are divided."""

    length: int
    alibi: str
    factor: float  # of FIXED: what slopes are divided by; otherwise 1

    def __str__(self) -> str:
        names = {PLAIN: "", FIXED: f", slopes / {self.factor:g}", DYNAMIC: ", dynamic slopes"}
        return f"at {self.length:,}{names[self.alibi]}"

    def network(self, model: Btlm, *, trained_length: int) -> Btlm:
        """Return the model with its slopes divided so."""
        if self.alibi == FIXED:
            config = dataclasses.replace(model.config, alibi_scaling=model.config.alibi_scaling * self.factor)
            return model.clone(config=config)
        return model.clone(alibi_train_len=trained_length) if self.alibi == DYNAMIC else model


def settings_of(lengths: Sequence[int], *, trained_length: int, stream_length: int) -> list[Setting]:
    """Return the curves of windows of these lengths; those that a stream cannot fill once are left out, and said.

    At the longest length DYNAMIC is FIXED, and is not measured again.

    Raises:
      ValueError: the stream fills none.
    """
    usable = sorted(length for length in set(lengths) if length <= stream_length)
    if missing := sorted(set(lengths) - set(usable)):
        if not usable:
            raise ValueError(
                f"loss by position needs a window's tokens: the documents have {stream_length:,} in all, and the "
                f"shortest window is of {missing[0]:,}; give more text, or shorter --position_lengths"
            )
        notices.report(
            "length-left-out",
            f"no loss by position at {', '.join(f'{length:,}' for length in missing)}: the documents have only "
            f"{stream_length:,} tokens",
            count=len(missing),
        )
    longest = usable[-1]
    found = [Setting(length=length, alibi=PLAIN, factor=1.0) for length in usable]
    if longest > trained_length:
        factor = longest / trained_length
        found += [Setting(length=length, alibi=FIXED, factor=factor) for length in usable]
        found += [
            Setting(length=length, alibi=DYNAMIC, factor=1.0) for length in usable if trained_length < length < longest
        ]
    return found


def stream_of(corpus: Corpus) -> Stream:
    """Return all documents of a corpus one after the other, each after its end-of-text id, which is there once."""
    order = np.random.default_rng(SEED).permutation(len(corpus.documents))
    tokens, counted = [corpus.documents[order[0]].tokens[:1]], []
    for number in order:
        document = corpus.documents[number]
        if tokens[-1][-1] != document.tokens[0]:  # the document before did not end with it
            tokens.append(document.tokens[:1])
            counted.append(np.zeros(1, bool))
        tokens.append(document.tokens[1:])
        counted.append(document.is_counted)
    return Stream(tokens=np.concatenate(tokens), is_counted=np.concatenate(counted))


def bin_edges(length: int) -> list[int]:
    """Return the edges of bins of positions 0..length - 1, a half octave each: 0, 1, 2, 3, 4, 6, 8, 11, 16, ..."""
    edges = [0]
    for half_octave in range(2 * length.bit_length() + 1):
        edge = min(round(2 ** (half_octave / 2)), length)
        if edge > edges[-1]:
            edges.append(edge)
    return edges


def measure_positions(scorer: Scorer, stream: Stream, setting: Setting, *, trained_length: int, work: Work) -> dict:
    """Return one curve as JSON's numbers, lists and dicts.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    length = setting.length
    scorer = scorer.with_model(setting.network(scorer.model, trained_length=trained_length))
    starts = list(range(0, len(stream.is_counted), length))
    per_unit = max(1, _UNIT_TOKENS // length)
    units = [starts[first : first + per_unit] for first in range(0, len(starts), per_unit)]
    work.begin([sum(len(stream.tokens[start + 1 : start + 1 + length]) for start in unit) for unit in units],
               unit_name="tokens")  # fmt: skip
    edges = bin_edges(length)
    loss_T, weight_T = np.zeros(length), np.zeros(length)
    nats_of_windows: list[list[float]] = []
    for number, unit in enumerate(units):
        if (done := work.done(number)) is None:
            done = _score_windows(scorer, stream, unit, length=length, edges=edges, work=work)
            if not np.isfinite(done["nats"]).all():
                raise FloatingPointError(f"the loss in windows of {length:,} tokens is not finite")
            work.add(number, done)
        nats_of_windows += done["nats"]
        loss_T += np.array(done["loss_T"])
    counts_of_windows = []
    for start in starts:
        counted = stream.is_counted[start : start + length]
        weight_T[: len(counted)] += counted
        counts_of_windows.append(_sums_of_bins(counted.astype(np.float64), edges))
    windows_WK2 = np.stack([np.array(nats_of_windows), np.array(counts_of_windows)], axis=-1)
    bins = _bins(windows_WK2, loss_T, weight_T, edges)
    totals = windows_WK2.sum(1)
    resamples = resampled_sums([totals])[:, 0]
    return {
        "length": length,
        "alibi": setting.alibi,
        "factor": setting.factor,
        "windows": len(starts),
        "tokens": round(float(totals[:, 1].sum())),
        "loss": float(totals[:, 0].sum() / totals[:, 1].sum()),
        "loss_interval": interval_of(resamples[:, 0] / resamples[:, 1]).to_json() if len(starts) > 1 else None,
        "first_rise": first_rise([each for each in bins if each.num_tokens >= FEWEST_TOKENS]),
        "bins": {field.name: [getattr(each, field.name) for each in bins] for field in dataclasses.fields(PositionBin)},
        "of_windows": {"nats": totals[:, 0].tolist(), "tokens": totals[:, 1].tolist()},
        "of_positions": {"nats": loss_T.tolist(), "tokens": weight_T.astype(int).tolist()},
    }


def _score_windows(
    scorer: Scorer, stream: Stream, starts: Sequence[int], *, length: int, edges: list[int], work: Work
) -> dict:
    """Return the nats of each window's bins, and their sum over windows at each position."""
    rows = [Row(tokens=stream.tokens[start : start + length + 1], first=1) for start in starts]
    loss_T, nats = np.zeros(length), []
    scored = scorer.log_likelihoods(rows, on_scored=lambda row: work.advance(row.num_scored))
    for start, scores in zip(starts, scored, strict=True):
        losses = -scores.log_p_T * stream.is_counted[start : start + length]
        loss_T[: len(losses)] += losses
        nats.append(_sums_of_bins(losses, edges))
    return {"nats": nats, "loss_T": loss_T.tolist()}


def _sums_of_bins(values_T: np.ndarray, edges: list[int]) -> list[float]:
    cumulated = np.concatenate([[0.0], np.cumsum(values_T), np.full(edges[-1] - len(values_T), values_T.sum())])
    return np.diff(cumulated[edges]).tolist()


def _bins(windows_WK2: np.ndarray, loss_T: np.ndarray, weight_T: np.ndarray, edges: list[int]) -> list[PositionBin]:
    """Return the bins that have targets; their error is the larger one of scatter over positions and over windows."""
    found = []
    for number, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
        if not weight_T[first:end].sum():
            continue
        of_positions = position_bin(loss_T, weight_T, slice(first, end))
        resamples = resampled_sums([windows_WK2[:, number]])[:, 0]
        drawn = resamples[resamples[:, 1] > 0]
        error = max(of_positions.standard_error, float(np.std(drawn[:, 0] / drawn[:, 1])))
        found.append(dataclasses.replace(of_positions, standard_error=error))
    return found
