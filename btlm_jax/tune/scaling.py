"""Scaling laws: fit a loss to a family of runs, predict a larger run before it is made, hold it against the run.

With N parameters, D tokens and C training FLOPs (the convention of train/flops.py):

    chinchilla   L = E + A / N^alpha + B / D^beta           arXiv 2203.15556, approach 3
    power        L = E + (C / C0)^-gamma                    arXiv 2304.03208, equation 1

Both are fitted in logarithms: the least sum of Huber's loss (1e-3) of log L - log L', from a grid of starts.
Intervals are of a residual bootstrap: fitted losses times resampled residuals, widened by sqrt(n / (n - k)) for k
coefficients, fitted again. They hold what scatter the points have, and not that the form may be wrong.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btlm_jax import notices
from btlm_jax.recipe.config import TrainConfig, config_from, train_config_from, with_later_keys
from btlm_jax.recipe.sizes import count_parameters
from btlm_jax.storage.files import hash_json, only_writer, read_json_object, write_atomically
from btlm_jax.train import CONFIG_FILE, SUMMARY_FILE
from btlm_jax.train.flops import flops_per_token
from btlm_jax.train.starts import read_sound_starts

CHINCHILLA, POWER = "chinchilla", "power"
FORMS = (CHINCHILLA, POWER)
NUM_COEFFICIENTS = {CHINCHILLA: 5, POWER: 3}
HUBER = 1e-3
NUM_SAMPLES = 200  # of the bootstrap
LEVEL = 0.9  # of intervals
MOST_ALIKE = 1.5  # times: sizes that differ by less are taken for one where terms are to be told apart
MOST_BEYOND = 10.0  # times the largest, or a part of the smallest, N, D or C of the points: as far as a law is trusted
PREDICTIONS = ".predictions.jsonl"  # suffix of the file beside a law's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A finished run: N, D, C, and its held-out loss in nats a token."""

    name: str
    num_parameters: float
    num_tokens: float
    flops: float
    loss: float

    def __post_init__(self):
        for field in ("num_parameters", "num_tokens", "flops", "loss"):
            if not getattr(self, field) > 0:
                raise ValueError(f"point {self.name!r}: {field}={getattr(self, field)} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted law. Coefficients are those of `loss_of`; samples are of the bootstrap."""

    form: str
    points: tuple[Point, ...]
    coefficients: tuple[float, ...]
    samples: tuple[tuple[float, ...], ...]
    residuals: tuple[float, ...]  # log loss - log fitted, of each point
    vocab_size: int  # of the runs, 0 where it is not known: losses of other tokenizers cannot be compared
    made: str  # date and time

    @property
    def sha256(self) -> str:
        return hash_json(dataclasses.asdict(self))

    def named(self) -> dict[str, tuple[float, float, float]]:
        """Return each coefficient by its name in the formula: the value, and its interval."""
        values = _readable(self.form, np.asarray(self.coefficients))
        samples = [_readable(self.form, np.asarray(sample)) for sample in self.samples]
        ends = {name: np.quantile([sample[name] for sample in samples], _TAILS) for name in values}
        return {name: (value, float(ends[name][0]), float(ends[name][1])) for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a law says of a run: the loss in nats a token, and where one run falls with probability LEVEL."""

    num_parameters: float
    num_tokens: float
    flops: float
    loss: float
    low: float
    high: float
    law_sha256: str
    made: str


_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def fit(points: Sequence[Point], *, form: str, seed: int = 0, vocab_size: int = 0) -> Law:
    """Fit a law to points.

    Raises:
      ValueError: the points are too few for the form, or cannot tell its terms apart.
    """
    if reason := why_not(form, points):
        raise ValueError(reason)
    target = np.log([point.loss for point in points])
    best = min((_minimize(form, start, points, target) for start in _starts(form, points)), key=lambda each: each[1])[0]
    fitted = _log_loss(form, best, points)
    residuals = target - fitted
    spread = residuals * math.sqrt(len(points) / (len(points) - NUM_COEFFICIENTS[form]))
    rng = np.random.default_rng(seed)
    samples = [_minimize(form, best, points, fitted + rng.choice(spread, len(points)))[0] for _ in range(NUM_SAMPLES)]
    return Law(
        form=form,
        points=tuple(points),
        coefficients=tuple(best.tolist()),
        samples=tuple(tuple(sample.tolist()) for sample in samples),
        residuals=tuple(residuals.tolist()),
        vocab_size=vocab_size,
        made=_now(),
    )


def why_not(form: str, points: Sequence[Point]) -> str:
    """Return why a form cannot be fitted to points, or "".

    Runs of one size, which differ in their seed, show scatter and no law. With chinchilla, log D must also scatter by
    MOST_ALIKE around the straight line through (log N, log D): on it A / N^alpha and B / D^beta are one term.
    """
    least, sizes = NUM_COEFFICIENTS[form] + 1, np.unique(_features(form, points), axis=0)
    if len(sizes) < least:
        of_sizes = "" if len(sizes) == len(points) else f" of {len(sizes)} different sizes"
        return (
            f"the {form} form has {least - 1} coefficients and needs {least} runs or more of different sizes; "
            f"{len(points)}{of_sizes} given"
        )
    if form == POWER:
        return ""
    log_n, log_d = sizes.T
    for name, values in (("parameters", log_n), ("tokens", log_d)):
        if np.ptp(values) < math.log(MOST_ALIKE):
            return (
                f"the runs all have about the same {name}, so the chinchilla form cannot tell E from their term; fit "
                f"the power form, or add runs whose {name} differ by {MOST_ALIKE:g} times or more"
            )
    if np.ptp(log_d - np.polyval(np.polyfit(log_n, log_d, 1), log_n)) < math.log(MOST_ALIKE):
        return (
            "the runs all have about the same tokens a parameter, or tokens that follow from the parameters, so the "
            "chinchilla form cannot tell A / N^alpha from B / D^beta; fit the power form, or add runs of other lengths"
        )
    return ""


def choose_form(points: Sequence[Point]) -> tuple[str, str]:
    """Return the form to fit, and why it is not chinchilla, or ""."""
    reason = why_not(CHINCHILLA, points)
    return (POWER, reason) if reason else (CHINCHILLA, "")


def loss_of(law: Law, point: Point) -> float:
    """Return the law's loss of a run, nats a token; the point's own loss is not looked at."""
    return float(np.exp(_log_loss(law.form, np.asarray(law.coefficients), [point]))[0])


def power_law(flops: float, *, scale: float, exponent: float, floor: float) -> float:
    """Return (flops / scale)^-exponent + floor, as laws of compute are published."""
    return (flops / scale) ** -exponent + floor


def predict(law: Law, *, num_parameters: float, num_tokens: float, flops: float) -> Prediction:
    """Return what a law says of a run that is not made yet.

    Raises:
      ValueError: it is further from the points than a law is trusted.
    """
    wanted = Point(name="predicted", num_parameters=num_parameters, num_tokens=num_tokens, flops=flops, loss=1.0)
    if reason := beyond(law, wanted):
        raise ValueError(reason)
    rng = np.random.default_rng(0)
    spread = np.asarray(law.residuals) * math.sqrt(len(law.points) / (len(law.points) - NUM_COEFFICIENTS[law.form]))
    logs = [_log_loss(law.form, np.asarray(sample), [wanted])[0] for sample in law.samples]
    low, high = np.quantile(np.exp(np.asarray(logs)[:, None] + rng.choice(spread, (len(logs), 50))), _TAILS)
    return Prediction(
        num_parameters=num_parameters,
        num_tokens=num_tokens,
        flops=flops,
        loss=loss_of(law, wanted),
        low=float(low),
        high=float(high),
        law_sha256=law.sha256,
        made=_now(),
    )


def predict_config(law: Law, config: TrainConfig) -> Prediction:
    """Return what a law says of the run of a config.

    Raises:
      ValueError: as `predict`, or its losses are of another tokenizer.
    """
    if law.vocab_size and law.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"the law is of losses with {law.vocab_size:,} ids, the config has {config.model.vocab_size:,}: a token is "
            "not the same text, so its loss is not either"
        )
    point = point_of_config(config, name="config", loss=1.0)
    return predict(law, num_parameters=point.num_parameters, num_tokens=point.num_tokens, flops=point.flops)


def beyond(law: Law, point: Point) -> str:
    """Return why a run is further from the law's points than it is trusted, or ""."""
    names = {"num_parameters": "parameters", "num_tokens": "tokens", "flops": "FLOPs"}
    for field, name in names.items():
        values = [getattr(each, field) for each in law.points]
        least, most, given = min(values) / MOST_BEYOND, max(values) * MOST_BEYOND, getattr(point, field)
        if not least <= given <= most:
            return (
                f"{given:.3g} {name} are more than {MOST_BEYOND:g} times away from the runs that the law is fitted to, "
                f"which have {min(values):.3g} to {max(values):.3g}"
            )
    return ""


def point_of_config(config: TrainConfig, *, name: str, loss: float) -> Point:
    """Return the point of a run of a config."""
    phases = config.curriculum.table.phases
    return Point(
        name=name,
        num_parameters=float(count_parameters(config.model)),
        num_tokens=float(config.curriculum.table.num_tokens),
        flops=sum(phase.num_tokens * flops_per_token(config.model, seq_len=phase.seq_len) for phase in phases),
        loss=loss,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a finished workdir says of its run."""

    point: Point
    vocab_size: int
    heldout_tokens: int  # runs that are compared were evaluated on the same
    ended: float | None  # seconds since 1970, when a start had made the last step; None: no record of a start says


def read_run(workdir: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
      ValueError: it is not finished, or a file is damaged.
      OSError: a file cannot be read.
    """
    path = workdir / SUMMARY_FILE
    if not path.is_file():
        raise ValueError(f"{workdir} is no finished run: it has no {SUMMARY_FILE}")
    summary = read_json_object(path)
    config = train_config_from(with_later_keys(read_json_object(workdir / CONFIG_FILE)))
    match summary:
        case {"num_tokens": int(tokens), "heldout": {"loss": float(loss), "heldout_tokens": int(heldout)}}:
            pass
        case _:
            raise ValueError(f"{path} lacks a part of a run's summary; run its command again, which makes it again")
    # Files' times are of copies too. A later start of a finished run has the last step as well, and makes none.
    starts = read_sound_starts(workdir)
    ends = [start.written for start in starts if start.step == config.curriculum.table.num_steps]
    if tokens != config.curriculum.table.num_tokens:
        raise ValueError(f"{path} is of {tokens:,} tokens, {CONFIG_FILE} of {config.curriculum.table.num_tokens:,}")
    return FinishedRun(
        point=point_of_config(config, name=notices.named(str(workdir)), loss=loss),
        vocab_size=config.model.vocab_size,
        heldout_tokens=heldout,
        ended=min(ends, default=None),
    )


def read_runs(workdirs: Sequence[Path]) -> tuple[list[Point], int]:
    """Read finished runs; return their points, and the size of the vocabulary that they share.

    Raises:
      ValueError: as `read_run`, one is given twice, or their losses are not of the same text and tokenizer.
    """
    runs: dict[str, FinishedRun] = {}
    for workdir in workdirs:
        name = notices.named(str(workdir.resolve()))  # each copy of a URL is another folder
        if name in runs:
            raise ValueError(f"{name} is given twice; name each run once")
        runs[name] = read_run(workdir)
    (first, one), *others = runs.items()
    for name, run in others:
        if (run.vocab_size, run.heldout_tokens) != (one.vocab_size, one.heldout_tokens):
            raise ValueError(
                f"{name} was evaluated on {run.heldout_tokens:,} tokens of {run.vocab_size:,} ids, {first} on "
                f"{one.heldout_tokens:,} of {one.vocab_size:,}: losses of different text or tokenizers are not compared"
            )
    return [run.point for run in runs.values()], one.vocab_size


def read_points(path: Path) -> tuple[list[Point], int]:
    """Read {"points": [{"name", "num_parameters", "num_tokens", "flops", "loss"}, ...], "vocab_size": N}.

    Returns the points, and the size of their vocabulary, 0 where the file does not say.

    Raises:
      ValueError: it is not that.
    """
    found = config_from(_Points, {"vocab_size": 0, **read_json_object(path)}, path=str(path))
    return list(found.points), found.vocab_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Points:
    points: tuple[Point, ...]
    vocab_size: int

    def __post_init__(self):
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size={self.vocab_size} must be positive, or 0 where it is not known")


def write_law(law: Law, path: Path) -> None:
    """Write a law as JSON."""
    write_atomically(path, json.dumps(dataclasses.asdict(law), indent=1))


def read_law(path: Path) -> Law:
    """Read a law.

    Raises:
      ValueError: it is none.
    """
    values = read_json_object(path)
    for key in ("coefficients", "residuals"):
        if not _are_numbers(values.get(key)):
            raise ValueError(f"{path}: {key} must be a list of numbers; fit the law again")
    samples = values.get("samples")
    if not isinstance(samples, list) or not samples or not all(map(_are_numbers, samples)):
        raise ValueError(f"{path}: samples must be lists of numbers; fit the law again")
    if values.get("form") not in FORMS:
        raise ValueError(f"{path}: form={values.get('form')!r} is not one of {', '.join(FORMS)}; fit the law again")
    given = {name: values.get(name) for name in ("points", "vocab_size")}
    points = config_from(_Points, given, path=str(path)).points
    law = Law(
        form=str(values["form"]),
        points=points,
        coefficients=tuple(values["coefficients"]),
        samples=tuple(map(tuple, samples)),
        residuals=tuple(values["residuals"]),
        vocab_size=values["vocab_size"],
        made=str(values.get("made")),
    )
    k = NUM_COEFFICIENTS[law.form]
    if {len(law.coefficients), *map(len, law.samples)} != {k} or len(law.residuals) != len(points) or len(points) <= k:
        raise ValueError(f"{path}: the {law.form} form has {k} coefficients and a residual a point; fit the law again")
    low, high = _bounds(k)
    if not all(np.all((low <= each) & (each <= high)) for each in map(np.asarray, (law.coefficients, *law.samples))):
        raise ValueError(f"{path}: coefficients are beyond the bounds of a fit, {low} to {high}; fit the law again")
    return law


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(x) in (int, float) and math.isfinite(x) for x in values)


def predictions_file(law: Path) -> Path:
    """Return where a law's predictions are recorded."""
    return law.with_name(law.name + PREDICTIONS)


def record(path: Path, values: dict) -> str:
    """Add a line to a record; return its hash, which is in it and of all else that is.

    Raises:
      FileExistsError: another command is adding one.
      OSError: it cannot be written.
    """
    line = {**values, "sha256": hash_json(values)}
    with only_writer(path):
        earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
        write_atomically(path, earlier + json.dumps(line) + "\n")
    return line["sha256"]


def recorded_predictions(path: Path) -> list[dict]:
    """Return the predictions of a record.

    Raises:
      ValueError: a line is not as it was written.
    """
    if not path.is_file():
        return []
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            own = line.pop("sha256")
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is no line of a record of predictions") from None
        if hash_json(line) != own:
            raise ValueError(f"{path}, line {number}: the prediction is not as it was recorded, its hash differs")
        if "predicted" in line:
            found.append(line | {"sha256": own})
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A prediction held against its run."""

    prediction: Prediction
    sha256: str
    loss: float
    was_before: bool | None  # the prediction was recorded before the run ended; None: when that was is not known

    @property
    def error(self) -> float:
        """Predicted over measured loss, less one."""
        return self.prediction.loss / self.loss - 1

    @property
    def is_inside(self) -> bool:
        return self.prediction.low <= self.loss <= self.prediction.high


def hold_against(run: FinishedRun, lines: Sequence[dict]) -> list[Outcome]:
    """Return the recorded predictions of a run's N and D, held against it.

    Raises:
      ValueError: none is of them.
    """
    found = []
    for line in lines:
        prediction = config_from(Prediction, line["predicted"], path="prediction")
        if (prediction.num_parameters, prediction.num_tokens) == (run.point.num_parameters, run.point.num_tokens):
            made = datetime.datetime.fromisoformat(prediction.made).timestamp()
            was_before = None if run.ended is None else made < run.ended
            found.append(
                Outcome(prediction=prediction, sha256=line["sha256"], loss=run.point.loss, was_before=was_before)
            )
    if not found:
        raise ValueError(
            f"no prediction is recorded of {run.point.num_parameters:,.0f} parameters and {run.point.num_tokens:,.0f} "
            "tokens; predict before the run is made"
        )
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _features(form: str, points: Sequence[Point]) -> np.ndarray:
    """Return the logarithms that a form is of, less fixed ones so that coefficients are of order 1: [n, 1 or 2]."""
    if form == POWER:
        return np.log([[point.flops] for point in points]) - math.log(1e18)
    return np.log([[point.num_parameters, point.num_tokens] for point in points]) - np.log([1e8, 1e9])


def _terms(coefficients: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the logarithms of a law's terms [n, terms]: those with a power, then log E."""
    count = features.shape[1]
    powers = coefficients[:count] - coefficients[count + 1 :] * features
    return np.concatenate([powers, np.full((len(features), 1), coefficients[count])], axis=1)


def _log_loss(form: str, coefficients: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    return np.logaddexp.reduce(_terms(coefficients, _features(form, points)), axis=1)


def _minimize(form: str, start: np.ndarray, points: Sequence[Point], target: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the coefficients that a trust region's steps lead to from a start, and their sum of Huber's losses."""
    from scipy.optimize import least_squares  # 0.3 s of import

    features = _features(form, points)

    def errors(coefficients: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(_terms(coefficients, features), axis=1) - target

    def derivatives(coefficients: np.ndarray) -> np.ndarray:
        terms = _terms(coefficients, features)
        shares = np.exp(terms - np.logaddexp.reduce(terms, axis=1)[:, None])
        return np.concatenate([shares, -shares[:, :-1] * features], axis=1)

    ends = _bounds(start.size)
    solve: Any = least_squares  # its hints know of no function as jac
    found = solve(
        errors, np.clip(start, *ends), jac=derivatives, bounds=ends, loss="huber", f_scale=HUBER, max_nfev=200
    )
    return found.x, float(found.cost)


def _bounds(num_coefficients: int) -> np.ndarray:
    """Return the least and the largest coefficients of a fit [2, num_coefficients]: logarithms, then exponents."""
    exponents = num_coefficients // 2
    return np.array([(-20.0, 20.0)] * (exponents + 1) + [(0.0, 3.0)] * exponents).T


def _starts(form: str, points: Sequence[Point]) -> list[np.ndarray]:
    """Return a grid of coefficients: exponents, and shares of the smallest loss that no size removes."""
    least = min(point.loss for point in points)
    center = _features(form, points).mean(0)
    found = []
    for floor in (0.2, 0.6, 0.85):
        for exponents in itertools.product((0.08, 0.3, 0.7), repeat=NUM_COEFFICIENTS[form] // 2):
            rest = math.log((1 - floor) * least / len(exponents))
            found.append(np.array([*(rest + np.array(exponents) * center), math.log(floor * least), *exponents]))
    return found


def _readable(form: str, coefficients: np.ndarray) -> dict[str, float]:
    """Return coefficients by their names in the formulas of this module."""
    c = coefficients.tolist()
    if form == POWER:
        scale, floor, gamma = c
        return {"E": math.exp(floor), "gamma": gamma, "C0": 1e18 * math.exp(min(scale / max(gamma, 1e-9), 700.0))}
    a, b, floor, alpha, beta = c
    return {
        "E": math.exp(floor),
        "A": math.exp(a + alpha * math.log(1e8)),
        "alpha": alpha,
        "B": math.exp(b + beta * math.log(1e9)),
        "beta": beta,
    }
