"""A run's loss curve beside that of a smaller run, as it is trained: runs with log.reference alone load this file.

With t the share of the run's tokens and L(t) the smoothed loss, l(t) = L(t) / L(1) is nearly the same curve for models
of different sizes that are trained with the same tokens a parameter, schedule and AdamW memory tau (arXiv 2509.25087).
So L(t) / l_ref(t) predicts the end of this run at any t, and a run that departs from its course shows there before it
shows in the loss itself, which still falls:

    predicted_loss      L(t) / l_ref(t), in nats a token
    collapse_residual   predicted_loss / its median since the warm-up - 1
"""

from __future__ import annotations

import bisect
import json
import math
from pathlib import Path

import numpy as np

from btlm_jax import notices
from btlm_jax.recipe.config import TrainConfig, train_config_from, with_later_keys
from btlm_jax.recipe.sizes import count_parameters, decay_rate_of
from btlm_jax.storage.files import read_json_object
from btlm_jax.train import CONFIG_FILE, METRICS_FILE
from btlm_jax.train.metric_writer import read_metrics

SMOOTHING = 0.02  # share of a run over which its losses are averaged, with weights that fall exponentially
AFTER_WARMUP = 0.05  # share of a run after the warm-up that is not compared yet
TOLERANCE = 0.03  # of the residual, above which a run has departed
_SAME = 0.1  # relative difference of tokens a parameter, schedule and tau that is not said


class ReferenceCurve:
    """The curve of a finished run, and where the run that is trained now stands beside it."""

    def __init__(self, workdir: Path, config: TrainConfig):
        """Read the reference run.

        Raises:
          FileNotFoundError: it has no config or no metrics.
          ValueError: it is damaged, or has not been trained to its end.
        """
        self._name, self._total = str(workdir), config.curriculum.table.num_tokens
        reference = _config_of(workdir)
        total, rows = reference.curriculum.table.num_tokens, _losses(workdir)
        if not rows or rows[-1][0] != total:
            raise ValueError(
                f"log.reference={workdir} has trained {rows[-1][0] if rows else 0:,} of {total:,} tokens; it must be a "
                "finished run"
            )
        smoothed, self._shares, curve = _Smoothed(), [tokens / total for tokens, _ in rows], []
        for share, (_, loss) in zip(self._shares, rows, strict=True):
            curve.append(smoothed.add(share, loss))
        self._curve = np.array(curve) / curve[-1]
        warmup = max(each.optimizer.warmup_tokens / each.curriculum.table.num_tokens for each in (reference, config))
        self._begin = warmup + AFTER_WARMUP
        self._smoothed, self._predictions, self._has_departed = _Smoothed(), [], False
        if differing := _differences(reference, config):
            text = f"{workdir} is not of this run's course: {'; '.join(differing)}"
            notices.report("reference-differs", text, count=len(differing))

    def follow(self, workdir: Path, *, first_step: int) -> None:
        """Take up what an earlier start of this run recorded before `first_step`."""
        path = workdir / METRICS_FILE
        for row in read_metrics(path) if path.is_file() else ():
            if row["kind"] == "train" and row["step"] < first_step:
                self._add(row["tokens"], row["loss"])

    def add(self, tokens: int, loss: float) -> dict[str, float]:
        """Return the numbers of a step, nothing before the warm-up's end; report a departure and a return."""
        numbers = self._add(tokens, loss)
        residual = numbers.get("collapse_residual", 0.0)
        if self._has_departed != (residual > TOLERANCE):
            self._has_departed = not self._has_departed
            if self._has_departed:
                text = (
                    f"at {tokens:,} tokens the loss is {residual:.1%} above the course that it had beside {self._name}"
                    f": it would end at {numbers['predicted_loss']:.4f}"
                )
                notices.report("departed-from-reference", text)
        return numbers

    def _add(self, tokens: int, loss: float) -> dict[str, float]:
        share = tokens / self._total
        if not math.isfinite(loss):
            return {}
        smoothed = self._smoothed.add(share, loss)
        if share < self._begin:
            return {}
        predicted = smoothed / float(np.interp(share, self._shares, self._curve))
        bisect.insort(self._predictions, predicted)
        median = self._predictions[len(self._predictions) // 2]
        return {"predicted_loss": predicted, "collapse_residual": predicted / median - 1}


class _Smoothed:
    """The mean of the losses so far, each weighted by its share of the run and exp(-distance / SMOOTHING)."""

    def __init__(self) -> None:
        self._share = self._sum = self._weight = 0.0

    def add(self, share: float, loss: float) -> float:
        step = share - self._share
        kept, self._share = math.exp(-step / SMOOTHING), share
        self._sum, self._weight = kept * self._sum + step * loss, kept * self._weight + step
        return self._sum / self._weight


def _config_of(workdir: Path) -> TrainConfig:
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"log.reference={workdir} is no run: it has no {CONFIG_FILE}")
    try:
        return train_config_from(with_later_keys(read_json_object(path)))
    except (ValueError, json.JSONDecodeError) as error:
        raise ValueError(f"log.reference: {path} cannot be read: {error}") from error


def _losses(workdir: Path) -> list[tuple[int, float]]:
    """Return (tokens, loss) of a run's steps that have a loss."""
    path = workdir / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"log.reference={workdir} has no {METRICS_FILE}")
    rows = [row for row in read_metrics(path) if row["kind"] == "train"]
    return [(row["tokens"], row["loss"]) for row in rows if math.isfinite(row["loss"])]


def _differences(reference: TrainConfig, config: TrainConfig) -> list[str]:
    """Return what of the courses that are compared differs: names, with both values."""
    facts = [
        {
            "tokens a parameter": each.curriculum.table.num_tokens / count_parameters(each.model),
            "warm-up's share": each.optimizer.warmup_tokens / each.curriculum.table.num_tokens,
            "end rate's share of the peak": each.optimizer.end_learning_rate / each.optimizer.peak_learning_rate,
            "tau": _tau(each),
            "schedule": each.optimizer.schedule,
            "hidden_optimizer": each.optimizer.hidden_optimizer,
        }
        for each in (reference, config)
    ]
    pairs = [(name, old, facts[1][name]) for name, old in facts[0].items()]
    return [f"{name} {_shown(old)} there, {_shown(new)} here" for name, old, new in pairs if not _is_near(old, new)]


def _tau(config: TrainConfig) -> float:
    """Return the optimizer's memory of the hidden matrices, as a share of the run's steps; inf without decay."""
    optimizer = config.with_numbers().optimizer
    shrinks = decay_rate_of(config) * optimizer.decay * config.curriculum.table.num_steps
    return 1 / shrinks if shrinks else math.inf


def _is_near(old: float | str, new: float | str) -> bool:
    if isinstance(old, str) or isinstance(new, str) or old == new:
        return old == new
    return abs(old - new) <= _SAME * max(abs(old), abs(new))


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
