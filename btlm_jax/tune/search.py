"""Search over hyperparameters of a proxy: random or Sobol points, successive halving, ranks and importance.

A space is a list of keys of the config, each with a range and a scale. Points are tried at a part of the tokens first;
of a rung, the share 1 / ETA with the least losses goes on to ETA times the tokens, from the beginning, as a schedule
that decays to its end needs it (arXiv 1810.05934 without its asynchrony: what is tried follows from results alone).
The best of many points is chosen by its losses, which flatters it; so at the end it and the config are trained again
with seeds that nothing was chosen by, and the gain is said of these.

Importance of a key is omega squared of the ranks on the first rung: their variance between BINS equal parts of the
key's range, less what chance gives it, over their variance in all. It is the key's main effect, without interactions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btlm_jax import notices
from btlm_jax.recipe.config import TrainConfig, config_types, train_config_from
from btlm_jax.storage.files import read_json_object
from btlm_jax.tune.trials import MOST_FACTOR, Result, Trial, scale_phases, scale_tokens, student_half_width

ETA = 3  # of a rung, one in so many goes on, to so many times the tokens
BINS = 4
NUM_SAMPLES = 500
TAILS = (0.05, 0.95)
LINEAR, LOG, LOG2_WHOLE = "linear", "log", "log2_whole"
RANDOM, SOBOL = "random", "sobol"
BATCH, WARMUP = "batch", "warmup"  # factors of the config's, which are several keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dimension:
    """A key of the config, or BATCH or WARMUP, and the range that is searched."""

    key: str
    low: float
    high: float
    scale: str  # LINEAR, LOG, or LOG2_WHOLE: powers of two

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"{self.key}={self.low:g}:{self.high:g} is no range that rises")
        if self.scale != LINEAR and self.low <= 0:
            raise ValueError(f"{self.key}={self.low:g}:{self.high:g} must be positive for the scale {self.scale}")
        if self.key in (BATCH, WARMUP) and self.high > MOST_FACTOR:
            raise ValueError(f"{self.key}={self.low:g}:{self.high:g}: factors are at most {MOST_FACTOR:g}")
        if self.scale == LOG2_WHOLE and math.ceil(math.log2(self.low)) > math.floor(math.log2(self.high)):
            raise ValueError(f"{self.key}={self.low:g}:{self.high:g} has no power of two")
        types = config_types()
        if self.key not in (BATCH, WARMUP) and types.get(self.key) not in (float, float | str):
            raise ValueError(f"{self.key} is no key of the config whose value is a number with a fraction")

    def value(self, share: float) -> float:
        """Return the value at a share of the range, from 0 to 1."""
        if self.scale == LINEAR:
            return self.low + share * (self.high - self.low)
        low, high = math.log2(self.low), math.log2(self.high)
        if self.scale == LOG2_WHOLE:
            first, last = math.ceil(low), math.floor(high)
            return 2.0 ** min(math.floor(first + share * (last - first + 1)), last)
        return 2 ** (low + share * (high - low))

    def share(self, value: float) -> float:
        """Return the share of the range at which a value is, the end that is nearer of one beyond it."""
        value = max(value, self.low)  # a warm-up may be rounded to no step
        if self.scale == LINEAR:
            found = (value - self.low) / (self.high - self.low)
        elif self.scale == LOG2_WHOLE:
            first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
            found = (math.log2(value) - first + 0.5) / (last - first + 1)
        else:
            found = math.log2(value / self.low) / math.log2(self.high / self.low)
        return min(max(found, 0.0), 1.0)


# Around BTLM's and configs/local_cpu.py's constants.
DEFAULT_SPACE = (
    Dimension(key="optimizer.peak_learning_rate", low=2.0**-10, high=2.0**-5, scale=LOG),
    Dimension(key="mup.init_std", low=0.02, high=0.2, scale=LOG),
    Dimension(key="mup.embedding_multiplier", low=2.0, high=40.0, scale=LOG),
    Dimension(key="mup.output_multiplier", low=0.25, high=8.0, scale=LOG),
    Dimension(key="optimizer.weight_decay", low=0.01, high=1.0, scale=LOG),
    Dimension(key=WARMUP, low=0.25, high=4.0, scale=LOG),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What is tried: `num_points` points of the space beside the config itself, on rungs of the config's tokens."""

    config: TrainConfig
    space: tuple[Dimension, ...]
    num_points: int
    num_rungs: int
    num_seeds: int  # of the last rung
    num_fresh: int  # seeds beyond those, of the best point and of the config
    method: str
    seed: int

    def __post_init__(self):
        if self.num_points < 2 or self.num_rungs < 1 or self.num_seeds < 1 or self.num_fresh < 0:
            raise ValueError(
                f"points={self.num_points}, rungs={self.num_rungs}, seeds={self.num_seeds}, "
                f"fresh_seeds={self.num_fresh}: a search needs two points or more, one rung and seed or more, and no "
                "fewer than 0 fresh seeds"
            )
        keys = [dimension.key for dimension in self.space]
        if len(set(keys)) < len(keys) or not keys:
            raise ValueError(f"the space has the keys {', '.join(keys)}; give one or more, each once")
        for key in keys:
            if key.startswith(_NOT_OF_THE_LOSS):
                raise ValueError(f"the space has {key}, which does not change a point's loss; leave it out")
            setting, readers = _READ_WITH.get(key, ("", ()))
            if setting and (own := _setting(self.config, setting)) not in readers:
                raise ValueError(
                    f"the space has {key}, which {setting}={own} does not read; leave it out, or give the config "
                    f"{' or '.join(readers)}"
                )
            if key in _OF_WARM_UP and not self.config.optimizer.warmup_tokens:
                raise ValueError(
                    f"the space has {key}, {_OF_WARM_UP[key]} optimizer.warmup_tokens=0; leave it out, or set some "
                    "tokens"
                )
        sizes = [self.num_points]
        while sizes[-1] > 1:
            sizes.append(num_going_on(sizes[-1]))
        if self.num_rungs > len(sizes):
            raise ValueError(
                f"rungs={self.num_rungs}: of {self.num_points} points {', '.join(map(str, sizes))} are on its rungs, "
                f"and further ones would be the same; give at most {len(sizes)}, or more points"
            )
        share = ETA ** (1 - self.num_rungs)
        for number in range(self.num_points + 1):
            per_step = self.config_of(number, rung=0, seed=0).curriculum.table.tokens_per_step
            if min(self.config.curriculum.num_tokens) * share < per_step:
                raise ValueError(
                    f"rungs={self.num_rungs}: of curriculum.num_tokens={self.config.curriculum.num_tokens} the first "
                    f"rung has the share {share:.3g}, in a phase less than a step of {per_step:,} tokens; give fewer "
                    "rungs, smaller batches or more tokens"
                )

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """The points as shares of each range, [num_points, dimensions]."""
        if self.method == SOBOL:
            from scipy.stats import qmc

            sampler = qmc.Sobol(len(self.space), rng=np.random.default_rng(self.seed))
            return sampler.random_base2(math.ceil(math.log2(self.num_points)))[: self.num_points]
        return np.random.default_rng(self.seed).random((self.num_points, len(self.space)))

    def values_of(self, number: int) -> dict[str, float]:
        """Return the values of a point by key; point 0 is the config as it is, and has none."""
        if number == 0:
            return {}
        shares = self.shares[number - 1]
        return {dimension.key: dimension.value(x) for dimension, x in zip(self.space, shares.tolist(), strict=True)}

    def realised_values(self, number: int, *, rung: int) -> dict[str, float]:
        """Return the values that a point's config has on a rung; BATCH and WARMUP are of whole rows and steps."""
        made = self.config_of(number, rung=rung, seed=0)
        return {key: _value_of(made, key, base=self.config) for key in self.values_of(number)}

    def config_of(self, number: int, *, rung: int, seed: int) -> TrainConfig:
        """Return the config of a point, with a rung's tokens.

        Raises:
          ValueError: the config refuses the values.
        """
        return with_values(self.config, self.values_of(number), tokens=ETA ** (rung + 1 - self.num_rungs), seed=seed)

    def shapes(self) -> list[tuple[str, TrainConfig]]:
        """Return a config of each curriculum that points have with all tokens, and the flag that it follows from."""
        found: dict[object, tuple[str, TrainConfig]] = {}
        for number in range(self.num_points + 1):
            config = self.config_of(number, rung=self.num_rungs - 1, seed=0)
            factor = self.values_of(number).get(BATCH)
            flag = "--config" if factor is None else f"--space {BATCH}, which is {factor:.3g} at point {number}"
            found.setdefault(config.curriculum, (flag, config))
        return list(found.values())

    def seeds_of(self, rung: int) -> range:
        return range(self.num_seeds if rung == self.num_rungs - 1 else 1)

    @property
    def fresh_seeds(self) -> range:
        return range(self.num_seeds, self.num_seeds + self.num_fresh)

    def name_of(self, number: int, *, rung: int, seed: int) -> str:
        return f"point-{number:03}-rung-{rung}-s{seed}"

    def rungs(self, results: Mapping[str, Result]) -> list[list[int]]:
        """Return the points on each rung, as far as the results say; the config itself, 0, is the first of each."""
        found = [list(range(self.num_points + 1))]
        for rung in range(self.num_rungs - 1):
            losses = {number: self.loss_of(number, rung=rung, results=results) for number in found[-1]}
            if None in losses.values():
                break
            points = sorted(found[-1][1:], key=lambda number: (losses[number], number))
            found.append([0, *sorted(points[: num_going_on(len(points))])])
        return found

    def loss_of(self, number: int, *, rung: int, results: Mapping[str, Result]) -> float | None:
        """Return the mean loss of a point on a rung, None before all its seeds are known."""
        names = [self.name_of(number, rung=rung, seed=seed) for seed in self.seeds_of(rung)]
        if not all(name in results for name in names):
            return None
        return float(np.mean([results[name].loss for name in names]))

    def ranked(self, results: Mapping[str, Result]) -> list[int]:
        """Return the points of the last rung, the best first; none before all its losses are known."""
        rungs = self.rungs(results)
        losses = {number: self.loss_of(number, rung=len(rungs) - 1, results=results) for number in rungs[-1]}
        if len(rungs) < self.num_rungs or None in losses.values():
            return []
        return sorted(losses, key=lambda number: (losses[number], number))

    def choose(self, results: Mapping[str, Result]) -> list[Trial]:
        """Return all trials that there are to be, as far as the results say."""
        found = [
            (number, rung, seed)
            for rung, numbers in enumerate(self.rungs(results))
            for number in numbers
            for seed in self.seeds_of(rung)
        ]
        best = next((number for number in self.ranked(results) if number), None)
        if best is not None and math.isfinite(self.loss_of(best, rung=self.num_rungs - 1, results=results) or math.inf):
            found += [(number, self.num_rungs - 1, seed) for seed in self.fresh_seeds for number in (0, best)]
        return [
            Trial(name=self.name_of(number, rung=rung, seed=seed), config=self.config_of(number, rung=rung, seed=seed))
            for number, rung, seed in found
        ]


def num_going_on(num_points: int) -> int:
    """Return how many points of a rung go on to the next, the config beside them."""
    return max(1, num_points // ETA)


def with_values(config: TrainConfig, values: Mapping[str, float], *, tokens: float, seed: int) -> TrainConfig:
    """Return the config with values by key, a share of its tokens, and seeds that are so much larger.

    The batch is of whole rows of each micro-batch in each phase; the warm-up, a factor of the config's share, is at
    most half the run; the end rate keeps its share of the peak.

    Raises:
      ValueError: the config refuses a value.
    """
    made = dataclasses.asdict(config)
    curriculum, optimizer = made["curriculum"], made["optimizer"]
    rows = math.gcd(*curriculum["batch_size"])  # all phases keep equal tokens a step
    unit = made["mesh"]["accumulation"]  # which divides them
    factor = max(1, round(rows * values.get(BATCH, 1.0) / unit)) * unit
    sizes = tuple(size // rows * factor for size in curriculum["batch_size"])
    per_step = sizes[0] * curriculum["seq_len"][0]
    whole = scale_phases(curriculum["num_tokens"], tokens, per_step=per_step)
    ratio, factor = sum(whole) / sum(curriculum["num_tokens"]), values.get(WARMUP, 1.0)
    warmup = scale_tokens(optimizer["warmup_tokens"], ratio * factor, per_step=per_step)
    end = optimizer["end_learning_rate"] / optimizer["peak_learning_rate"]
    curriculum |= {"batch_size": sizes, "num_tokens": whole}
    _put(made, {key: value for key, value in values.items() if key not in (BATCH, WARMUP)})
    optimizer["warmup_tokens"] = warmup if ratio == factor == 1 else min(warmup, sum(whole) // 2)
    for name in ("schedule_begin", "schedule_tokens"):
        optimizer[name] = scale_tokens(optimizer[name], ratio, per_step=per_step)
    if "optimizer.peak_learning_rate" in values and "optimizer.end_learning_rate" not in values:
        optimizer["end_learning_rate"] = end * optimizer["peak_learning_rate"]
    made["seed"] += seed
    made["data"]["seed"] += seed
    return train_config_from(made)


def report(search: Search, results: Mapping[str, Result]) -> dict:
    """Return ranks, the gain over the config with its interval, and importance, as JSON's values."""
    rungs = search.rungs(results)
    last = len(rungs) - 1

    def losses_of(number: int, seeds: range) -> list[float | None]:
        return [_number(results[search.name_of(number, rung=last, seed=seed)].loss) for seed in seeds]

    finals = [
        {
            "point": number,
            "losses": losses_of(number, search.seeds_of(last)),
            "loss": _number(search.loss_of(number, rung=last, results=results)),
            "values": search.realised_values(number, rung=last),
        }
        for number in search.ranked(results)
    ]
    best = next((each for each in finals if each["point"] != 0), None)
    own = next(each for each in finals if each["point"] == 0)
    first = [search.loss_of(number, rung=0, results=results) for number in range(1, search.num_points + 1)]
    assert best is not None and None not in first
    fresh = {"seeds": len(search.fresh_seeds), "config": [], "best": [], "gain": None}
    if search.num_fresh and best["loss"] is not None:
        fresh["config"], fresh["best"] = (losses_of(number, search.fresh_seeds) for number in (0, best["point"]))
        fresh["gain"] = gain_of(fresh["config"], fresh["best"])
    is_better = finals[0] is best and not _is_worse(fresh["best"], fresh["config"])
    tried = [search.realised_values(number, rung=0) for number in range(1, search.num_points + 1)]
    shares = [[dimension.share(values[dimension.key]) for dimension in search.space] for values in tried]
    return {
        "rungs": rungs,
        "final": finals,
        "gain": gain_of(own["losses"], best["losses"]),
        "fresh": fresh,
        "importance": importance(search.space, np.array(shares), np.array(first, float)),
        "first_rung": [
            {"point": number, "loss": _number(loss), "values": values}
            for number, (loss, values) in enumerate(zip(first, tried, strict=True), start=1)
        ],
        "own": {
            dimension.key: _value_of(search.config, dimension.key, base=search.config) for dimension in search.space
        },
        "is_best_better": is_better,
        "constants": {
            key: _value_of(search.config, key, base=search.config)
            for key in transferred_keys(search.config.optimizer.hidden_optimizer)
        }
        | (best["values"] if is_better else {}),
        "base": {
            "d_model": search.config.mup.base_d_model,
            "num_layers": search.config.mup.base_num_layers,
            "preset": search.config.mup.preset,
            "hidden_optimizer": search.config.optimizer.hidden_optimizer,
        },
    }


# Keys whose best value does not depend on the model's width and depth under muP, nor much on the number of steps.
# Weight decay does on the latter (AdamW's memory is 1 / (rate decay steps)), batch and warm-up do too.
TRANSFERRED = (
    "optimizer.peak_learning_rate", "mup.init_std", "mup.embedding_multiplier", "mup.output_multiplier",
)  # fmt: skip
MUON, MUON_RATE = "muon", "optimizer.muon_learning_rate"

# Keys that are read with some values of another key alone, and those that no point's loss depends on: the store is made
# once for all, and a loss is of the last weights.
_READ_WITH = {
    MUON_RATE: ("optimizer.hidden_optimizer", (MUON,)),
    "optimizer.decay_share": ("optimizer.schedule", ("wsd",)),
    "optimizer.end_learning_rate": ("optimizer.schedule", ("linear", "cosine", "wsd")),
    "mup.base_d_model": ("mup.preset", ("btlm", "completep")),
    "mup.base_d_ff": ("mup.preset", ("btlm", "completep")),
}
_NOT_OF_THE_LOSS = ("corpus.", "checkpoint.", "log.", "optimizer.average_share")
_OF_WARM_UP = {WARMUP: "a factor of", "optimizer.initial_learning_rate": "the beginning of a warm-up of"}


def transferred_keys(hidden_optimizer: str) -> tuple[str, ...]:
    """Return TRANSFERRED, and of Muon its rate too, which is the same at every width (recipe/muon.py)."""
    return (*TRANSFERRED, MUON_RATE) if hidden_optimizer == MUON else TRANSFERRED


def _put(made: dict, values: Mapping[str, float]) -> None:
    """Put values by key into a config's dictionary."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        made[section][name] = value


def _value_of(config: TrainConfig, key: str, *, base: TrainConfig) -> float:
    """Return a config's value of a key; BATCH and WARMUP are factors of the base's rows and of its share of the run."""
    if key == BATCH:
        return config.curriculum.batch_size[0] / base.curriculum.batch_size[0]
    if key == WARMUP:
        own, others = (each.optimizer.warmup_tokens / sum(each.curriculum.num_tokens) for each in (config, base))
        return own / others
    return _setting(config, key)


def _setting(config: TrainConfig, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section), name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
    """What a search found that larger models take: values by key, and what of the proxy they hold for."""

    values: dict[str, float]
    base_width: float
    base_depth: int
    preset: str
    hidden_optimizer: str


def read_constants(path: Path) -> Constants:
    """Return the constants of a search's report.

    Raises:
      ValueError: it is none, or none of its keys are transferred.
    """
    match read_json_object(path):
        case {
            "constants": dict(values),
            "base": {"d_model": float(width), "num_layers": int(depth), "preset": str(preset), **others},
        }:
            if MUON_RATE in values and "hidden_optimizer" not in others:
                raise ValueError(
                    f"{path} has {MUON_RATE}, and is of a version that did not keep which optimizer it is of; run the "
                    "search's command again, which trains nothing again"
                )
            hidden_optimizer = str(others.get("hidden_optimizer", "adamw"))
            keys = transferred_keys(hidden_optimizer)
            for key, value in values.items():
                if type(value) not in (int, float):
                    raise ValueError(f"{path}: constants.{key} must be a number; run the search's command again")
            kept = {key: float(value) for key, value in values.items() if key in keys}
        case _:
            raise ValueError(f"{path} is no search.json of btlm tune search")
    if left_out := sorted(set(values) - set(kept)):
        text = f"{path}: {', '.join(left_out)} depend on the length of the run, which has its own"
        notices.report("constants-not-taken", text, count=len(left_out))
    if not kept:
        raise ValueError(f"{path} has none of {', '.join(TRANSFERRED)}, which are what a larger model takes")
    return Constants(values=kept, base_width=width, base_depth=depth, preset=preset, hidden_optimizer=hidden_optimizer)


def with_constants(config: TrainConfig, *, found: Constants) -> TrainConfig:
    """Return a config with constants in place of its own; the end of its rate keeps its share of the peak."""
    made = dataclasses.asdict(config)
    share = config.optimizer.end_learning_rate / config.optimizer.peak_learning_rate
    _put(made, found.values)
    made["optimizer"]["end_learning_rate"] = share * made["optimizer"]["peak_learning_rate"]
    made["optimizer"]["hidden_optimizer"] = found.hidden_optimizer
    made["mup"] |= {
        "preset": found.preset,
        "base_d_model": found.base_width,
        "base_num_layers": found.base_depth,
        "base_d_ff": config.model.d_ff * found.base_width / config.model.d_model,
    }
    return train_config_from(made)


def gain_of(own: Sequence[float | None], best: Sequence[float | None]) -> dict:
    """Return by how many nats the best point is below the config itself, with a 90 % interval over seeds.

    The losses of both are of the same seeds, one by one: the interval is Student's, of the mean of their differences.
    Of one seed there is none: its ends are None; where one of them diverged, a loss of None, all are. Of losses that
    the best of many was chosen by, the gain is high by what its seeds' luck gave it.
    """
    if None in (*own, *best):
        return {"nats": None, "low": None, "high": None}
    differences = np.subtract(np.array(own, float), np.array(best, float)).tolist()
    gain = float(np.mean(differences))
    if len(differences) < 2:
        return {"nats": gain, "low": None, "high": None}
    half = student_half_width(differences, quantile=TAILS[1])
    return {"nats": gain, "low": gain - half, "high": gain + half}


def _is_worse(losses: Sequence[float | None], others: Sequence[float | None]) -> bool:
    """Return whether losses, None where a run diverged, are worse than others of the same seeds.

    The one that diverged more often is; otherwise the one of the higher mean, over seeds with which neither did.
    """
    if losses.count(None) != others.count(None):
        return losses.count(None) > others.count(None)
    pairs = [(a, b) for a, b in zip(losses, others, strict=True) if a is not None and b is not None]
    return sum(a - b for a, b in pairs) > 0


def importance(space: Sequence[Dimension], shares: np.ndarray, losses: np.ndarray, *, seed: int = 0) -> list[dict]:
    """Return the main effect of each key on the rank of the loss, with a bootstrap's interval, the largest first.

    shares: [points, dimensions], from 0 to 1. Ranks, and not losses, so that points that diverged count as the worst
    and no more. 0 is what chance gives; 1 is a key that alone decides the rank.
    """
    ranks = _ranks(losses)
    rng = np.random.default_rng(seed)
    again = [rng.integers(0, len(ranks), len(ranks)) for _ in range(NUM_SAMPLES)]
    found = []
    for column, dimension in enumerate(space):
        values = [_main_effect(shares[rows, column], ranks[rows]) for rows in again]
        low, high = np.quantile(values, TAILS)
        share = _main_effect(shares[:, column], ranks)
        found.append({"key": dimension.key, "share": share, "low": float(low), "high": float(high)})
    return sorted(found, key=lambda each: -each["share"])


def _number(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None  # JSON has no infinity


def _main_effect(shares: np.ndarray, ranks: np.ndarray) -> float:
    """Return the adjusted share of the ranks' variance that lies between the BINS parts of a range (omega squared)."""
    bins = np.minimum((shares * BINS).astype(int), BINS - 1)
    total = np.square(ranks - ranks.mean()).sum()
    groups = [ranks[bins == number] for number in range(BINS) if (bins == number).any()]
    between = sum(len(group) * (group.mean() - ranks.mean()) ** 2 for group in groups)
    free = len(ranks) - len(groups)
    if total == 0 or free <= 0:
        return 0.0
    noise = (total - between) / free
    return float(max(0.0, (between - (len(groups) - 1) * noise) / (total + noise)))


def _ranks(losses: np.ndarray) -> np.ndarray:
    """Return ranks from 0, equal losses sharing the mean of theirs; those that are not finite are the last."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    order = np.sort(losses)
    return (np.searchsorted(order, losses, "left") + np.searchsorted(order, losses, "right") - 1) / 2


def _shown_gain(gain: dict, own: Sequence[float | None], best: Sequence[float | None]) -> str:
    if gain["nats"] is None:
        return f"the best diverged in {best.count(None)} of {len(best)} runs, the config in {own.count(None)}"
    interval = "" if gain["low"] is None else f", 90 % from {gain['low']:+.4f} to {gain['high']:+.4f} over seeds"
    return f"{gain['nats']:+.4f} nats better{interval}"


def format_report(values: dict) -> str:
    """Return the best points, the gain, and the importance of each key."""
    finals, fresh = values["final"], values["fresh"]
    num_points = len(values["rungs"][0]) - 1
    lines = [f"Best of {num_points} points, of which {len(finals) - 1} and the config had all tokens:"]
    for each in finals[:10]:
        shown = ", ".join(f"{key.rpartition('.')[2]} {value:.4g}" for key, value in each["values"].items())
        loss = "diverged" if each["loss"] is None else f"{each['loss']:.4f}"
        lines.append(f"  {loss}  {shown or 'the config as it is'}")
    own = next(each["losses"] for each in finals if each["point"] == 0)
    best = next(each["losses"] for each in finals if each["point"] != 0)
    lines.append(f"Against the config as it is: {_shown_gain(values['gain'], own, best)}")
    if fresh["gain"]:
        shown = _shown_gain(fresh["gain"], fresh["config"], fresh["best"])
        lines.append(f"With {fresh['seeds']} seeds that it was not chosen by: {shown}")
    if not values["is_best_better"]:
        lines.append("No point is better than the config: its own constants are those of search.json")
    lines.append("Share of the variance of ranks that each key explains alone (omega squared of 4 bins, 90 %):")
    for each in values["importance"]:
        lines.append(f"  {each['key']:<32} {each['share']:>5.2f}   {each['low']:.2f} to {each['high']:.2f}")
    return "\n".join(lines)
