"""Learning-rate transfer: sweep the learning rate at several sizes; where is the best one, and does it stay there?

A curve is a preset, a width, a depth, a batch and a number of tokens; its trials are ordinary runs of a config with one
peak learning rate each, 2^r for whole or half numbers r. The optimum of a curve is the vertex of a parabola through the
losses over r near the least one, its interval of a bootstrap, widened as Student's t is: of seeds where there are
several, otherwise of the parabola's residuals. Far higher losses at higher rates are those of unstable training, and
bend no parabola. A curve whose least loss is at an end of its rates gets one rate more there, up to a limit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats

from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.tune.coord_check import at_width
from btlm_jax.tune.trials import MOST_FACTOR, Result, Trial, resampled_mean, scale_phases, scale_tokens

NEAR = 2.0  # octaves to either side of the best rate that the parabola is laid through
HIGHEST = 1.15  # times the least loss: at higher rates, losses above it are left out where three others are left
LEAST_STEP = 0.001  # between rates, that names of trials tell apart
MOST_MORE = 4  # rates that a curve gets beyond each end of those asked for
NUM_SAMPLES = 1000
TAILS = (0.05, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """What all trials of a curve have in common."""

    preset: str
    width: int
    depth: int
    batch: float  # times the config's sequences a step
    tokens: float  # times the config's tokens

    def __str__(self) -> str:
        more = "".join(f"-{name}{value:g}" for name, value in (("b", self.batch), ("t", self.tokens)) if value != 1)
        return f"{self.preset}-d{self.width}-l{self.depth}{more}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is tried: every curve of the product, at every rate and seed."""

    config: TrainConfig
    presets: tuple[str, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    batches: tuple[float, ...]
    tokens: tuple[float, ...]
    log2_rates: tuple[float, ...]  # ascending, at equal distances
    num_seeds: int

    def __post_init__(self):
        distances = np.diff(self.log2_rates)
        if len(self.log2_rates) < 3 or not np.allclose(distances, distances[0]) or not distances[0] >= LEAST_STEP:
            raise ValueError(
                f"rates={self.log2_rates}: give three or more, ascending, at equal distances of {LEAST_STEP} or more"
            )
        if max(*self.batches, *self.tokens) > MOST_FACTOR:
            raise ValueError(f"batches={self.batches}, tokens={self.tokens}: factors are at most {MOST_FACTOR:g}")
        if self.num_seeds < 1:
            raise ValueError(f"seeds={self.num_seeds} must be at least 1")
        if len(set(self.curves)) < len(self.curves):
            raise ValueError("a preset, width, depth, batch or number of tokens is given twice")
        for curve in self.curves:
            self.config_of(curve, rate=self.log2_rates[0], seed=0)

    @property
    def curves(self) -> tuple[Curve, ...]:
        return tuple(
            Curve(preset=preset, width=width, depth=depth, batch=batch, tokens=tokens)
            for preset, width, depth, batch, tokens in itertools.product(
                self.presets, self.widths, self.depths, self.batches, self.tokens
            )
        )

    @property
    def step(self) -> float:
        return self.log2_rates[1] - self.log2_rates[0]

    def config_of(self, curve: Curve, *, rate: float, seed: int) -> TrainConfig:
        """Return the config of a trial: the schedule keeps its shape, warm-up and decay their shares.

        Raises:
          ValueError: the curve's sizes cannot be.
        """
        config = self.config
        model = dataclasses.replace(at_width(config.model, curve.width), num_layers=curve.depth)
        batch_size = tuple(_whole(size * curve.batch, "batch", curve) for size in config.curriculum.batch_size)
        per_step = batch_size[0] * config.curriculum.seq_len[0]
        num_tokens = scale_phases(config.curriculum.num_tokens, curve.tokens, per_step=per_step)
        optimizer, peak = config.optimizer, 2.0**rate
        ratio = sum(num_tokens) / config.curriculum.table.num_tokens
        return dataclasses.replace(
            config,
            seed=config.seed + seed,
            model=model,
            mup=dataclasses.replace(config.mup, preset=curve.preset),
            curriculum=dataclasses.replace(config.curriculum, batch_size=batch_size, num_tokens=num_tokens),
            optimizer=dataclasses.replace(
                optimizer,
                peak_learning_rate=peak,
                end_learning_rate=peak * optimizer.end_learning_rate / optimizer.peak_learning_rate,
                **{
                    name: scale_tokens(getattr(optimizer, name), ratio, per_step=per_step)
                    for name in ("warmup_tokens", "schedule_begin", "schedule_tokens")
                },
            ),
            data=dataclasses.replace(config.data, seed=config.data.seed + seed),
        )

    def shapes(self) -> list[tuple[str, TrainConfig]]:
        """Return a config of each curve, and the flags that it follows from."""
        return [
            (
                f"--widths={curve.width} --depths={curve.depth} --batches={curve.batch:g} --tokens={curve.tokens:g}",
                self.config_of(curve, rate=self.log2_rates[0], seed=0),
            )
            for curve in self.curves
        ]

    def name_of(self, curve: Curve, *, rate: float, seed: int) -> str:
        return f"{curve}-lr{rate:g}-s{seed}"

    def choose(self, results: Mapping[str, Result]) -> list[Trial]:
        """Return all trials that there are to be, as far as the results say."""
        return [
            Trial(
                name=self.name_of(curve, rate=rate, seed=seed),
                config=self.config_of(curve, rate=rate, seed=seed),
            )
            for curve in self.curves
            for rate in self.rates_of(curve, results)
            for seed in range(self.num_seeds)
        ]

    def rates_of(self, curve: Curve, results: Mapping[str, Result]) -> list[float]:
        """Return the rates of a curve: those asked for, and more where the least loss is at an end of them."""
        rates = list(self.log2_rates)
        for _ in range(2 * MOST_MORE):
            losses = [self.losses_of(curve, rate, results) for rate in rates]
            if not all(losses):
                return rates
            means = [float(np.mean(each)) for each in losses]
            least = int(np.argmin(means))
            below, above = rates[0] - self.step, rates[-1] + self.step
            if least == 0 and below >= self.log2_rates[0] - MOST_MORE * self.step:
                rates.insert(0, below)
            elif least == len(rates) - 1 and above <= self.log2_rates[-1] + MOST_MORE * self.step:
                rates.append(above)
            else:
                return rates
        return rates

    def losses_of(self, curve: Curve, rate: float, results: Mapping[str, Result]) -> list[float]:
        """Return the losses of all seeds at a rate, none before all are known."""
        names = [self.name_of(curve, rate=rate, seed=seed) for seed in range(self.num_seeds)]
        return [results[name].loss for name in names] if all(name in results for name in names) else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where a curve's loss is least: log2 of the learning rate, its interval, and the parabola's loss there."""

    rate: float
    low: float | None  # None: one seed and three rates, which a parabola meets exactly, have no scatter to see
    high: float | None
    loss: float
    is_bracketed: bool  # the vertex lies between the rates that were tried, with higher losses on both sides


def optimum_of(rates: Sequence[float], losses: Sequence[Sequence[float]], *, seed: int = 0) -> Optimum:
    """Return the optimum of losses by rate and seed; rates at which a seed diverged are left out.

    The interval's ends are the bootstrap's quantiles, their distances from the vertex times t(0.95, dof) / 1.645, with
    the degrees of freedom of the residuals, or `_dof_of_seeds`: few values do not know their own scatter. How often it
    holds the optimum of an exact parabola with Gaussian noise, at four and five rates (1,500 draws each, 2026-11-30):

        seeds                                    1            2            3
        equal noise at all rates                90, 90 %     94, 93 %     92, 91 %
        the same without the factor             66, 76 %     79, 81 %     83, 83 %
        four times the noise at the last rate   88, 71 %     93, 88 %     90, 89 %

    An optimum off the parabola because the curve is none is not in the interval's width.

    Raises:
      ValueError: fewer than three rates have a finite loss.
    """
    pairs = [(rate, each) for rate, each in zip(rates, losses, strict=True) if each and all(map(math.isfinite, each))]
    if len(pairs) < 3:
        raise ValueError(f"{len(pairs)} of {len(rates)} learning rates have a finite loss; an optimum needs three")
    best, least = min(((rate, float(np.mean(each))) for rate, each in pairs), key=lambda pair: pair[1])
    nearest = sorted(pairs, key=lambda pair: abs(pair[0] - best))
    near = [
        (rate, each)
        for rate, each in nearest
        if abs(rate - best) <= NEAR + 1e-9 and (rate <= best or float(np.mean(each)) <= HIGHEST * least)
    ]
    near = sorted(near if len(near) >= 3 else nearest[:3])
    x = np.array([rate for rate, _ in near])
    y = np.array([np.mean(each) for _, each in near])
    a, b, c = np.polyfit(x - best, y, 2)
    fitted = np.polyval((a, b, c), x - best)
    rng = np.random.default_rng(seed)
    spread = (y - fitted) * math.sqrt(len(x) / max(len(x) - 3, 1))
    is_seeded = min(len(each) for _, each in near) > 1
    found = []
    for _ in range(NUM_SAMPLES):
        if is_seeded:
            again = np.array([resampled_mean(each, rng) for _, each in near])
        else:
            again = fitted + rng.choice(spread, len(x))
        found.append(_vertex(x - best, np.polyfit(x - best, again, 2)))
    place = _vertex(x - best, (a, b, c))
    low = high = None
    if is_seeded or len(x) > 3:
        dof = _dof_of_seeds(x - best, [each for _, each in near], a=a, b=b) if is_seeded else len(x) - 3
        widening = float(scipy.stats.t.ppf(TAILS[1], dof) / scipy.stats.norm.ppf(TAILS[1]))
        ends = np.quantile(found, TAILS)
        low = float(best + place - widening * max(0.0, place - ends[0]))
        high = float(best + place + widening * max(0.0, ends[1] - place))
    is_inside = a > 0 and min(rates) < best < max(rates)
    return Optimum(
        rate=float(best + place),
        low=low,
        high=high,
        loss=float(np.polyval((a, b, c), place)),
        is_bracketed=bool(is_inside),
    )


def _dof_of_seeds(x: np.ndarray, losses: Sequence[Sequence[float]], *, a: float, b: float) -> float:
    """Return the degrees of freedom of a vertex's variance, where each rate's losses have a variance of their own.

    Satterthwaite's formula (Biometrics Bulletin 2, 1946) on the vertex's linear dependence on each rate's mean loss.
    """
    counts = np.array([len(each) for each in losses])
    if a <= 0:  # no vertex; the least that there can be
        return float(counts.min() - 1)
    to_a, to_b, _ = np.linalg.pinv(np.vander(x, 3))
    parts = (b * to_a / (2 * a**2) - to_b / (2 * a)) ** 2 * [np.var(each, ddof=1) / len(each) for each in losses]
    return float(np.sum(parts) ** 2 / np.sum(parts**2 / (counts - 1))) if parts.any() else float(counts.min() - 1)


def _vertex(x: np.ndarray, parabola: Sequence[float] | np.ndarray) -> float:
    """Return where a parabola is least, not beyond the points that it was laid through."""
    a, b, _ = parabola
    if a <= 0:
        return float(x[0] if b > 0 else x[-1])
    return float(np.clip(-b / (2 * a), x[0], x[-1]))


def report(sweep: Sweep, results: Mapping[str, Result]) -> dict:
    """Return all losses, optima and transfers as JSON's values."""
    curves = []
    for curve in sweep.curves:
        rates = sweep.rates_of(curve, results)
        losses = [sweep.losses_of(curve, rate, results) for rate in rates]
        try:
            optimum = optimum_of(rates, losses)
        except ValueError as error:
            raise ValueError(f"{curve}: {error}; give lower --rates") from error
        curves.append(
            {
                **dataclasses.asdict(curve),
                "log2_rates": rates,
                "losses": [[x if math.isfinite(x) else None for x in each] for each in losses],
                "optimum": dataclasses.asdict(optimum),
            }
        )
    return {"curves": curves, "transfers": _transfers(curves)}


def _transfers(curves: Sequence[dict]) -> list[dict]:
    """Return, of each preset of two curves or more, how far the optimum moves and what the first costs at the last.

    A loss is None where the last curve diverges, and beyond its rates, where none was tried.
    """
    found = []
    for preset in dict.fromkeys(curve["preset"] for curve in curves):
        own = [curve for curve in curves if curve["preset"] == preset]
        if len(own) < 2:
            continue
        first, last = own[0], own[-1]
        rates = [curve["optimum"]["rate"] for curve in own]
        own_loss, moved = (_loss_at(last, each["optimum"]["rate"]) for each in (last, first))
        found.append(
            {
                "preset": preset,
                "range_of_optima": max(rates) - min(rates),
                "loss_with_own_optimum": own_loss if own_loss is not None and math.isfinite(own_loss) else None,
                "loss_with_first_optimum": moved if moved is not None and math.isfinite(moved) else None,
                "is_first_optimum_tried": moved is not None,
            }
        )
    return found


def describe_cost(transfer: Mapping) -> str:
    """Return what the first curve's optimum costs at the last curve."""
    if not transfer["is_first_optimum_tried"]:
        return "was not tried there: it lies beyond the rates"
    own, moved = transfer["loss_with_own_optimum"], transfer["loss_with_first_optimum"]
    return "diverges" if own is None or moved is None else f"costs {moved - own:+.4f} nats"


def _loss_at(curve: dict, rate: float) -> float | None:
    """Return a curve's loss at a rate, by the parabola through the three nearest rates that did not diverge.

    It is infinite where the rate nearest of all did, None beyond the rates that were tried.
    """
    if not min(curve["log2_rates"]) <= rate <= max(curve["log2_rates"]):
        return None
    pairs = sorted(zip(curve["log2_rates"], map(_mean, curve["losses"]), strict=True), key=lambda p: abs(p[0] - rate))
    if not math.isfinite(pairs[0][1]):
        return math.inf
    rates, losses = zip(*[pair for pair in pairs if math.isfinite(pair[1])][:3], strict=True)
    return float(np.polyval(np.polyfit(np.array(rates) - rate, losses, 2), 0.0))


def _curve_of(values: dict) -> Curve:
    """Return the curve of a report's values."""
    return Curve(**{field.name: values[field.name] for field in dataclasses.fields(Curve)})


def _mean(losses: Sequence[float | None]) -> float:
    return math.inf if None in losses else float(np.mean([x for x in losses if x is not None]))


def format_report(values: dict) -> str:
    """Return the optimum of each curve, and how far it moves."""
    lines = [f"{'curve':<28} {'best log2 rate':>15} {'90 % interval':>18} {'loss there':>11}"]
    for each in values["curves"]:
        curve = _curve_of(each)
        optimum = each["optimum"]
        note = "" if optimum["is_bracketed"] else "  at the end of the rates: not an optimum"
        interval = "unknown" if optimum["low"] is None else f"{optimum['low']:.2f} to {optimum['high']:>6.2f}"
        lines.append(f"{curve!s:<28} {optimum['rate']:>15.2f} {interval:>18} {optimum['loss']:>11.4f}{note}")
    for each in values["transfers"]:
        lines.append(
            f"{each['preset']}: the optimum moves over {each['range_of_optima']:.2f} octaves; the first curve's "
            f"optimum at the last curve {describe_cost(each)}"
        )
    return "\n".join(lines)


def plot(values: dict, path: Path) -> None:
    """Draw the loss against the learning rate: a panel a preset, a line a curve, its optimum marked."""
    presets = list(dict.fromkeys(curve["preset"] for curve in values["curves"]))
    figure, panels = new_panels(size=(5.5 * len(presets), 4.5), dpi=110, columns=len(presets))
    finite = [x for curve in values["curves"] for each in curve["losses"] for x in each if x is not None]
    least = min(finite)
    for panel, preset in zip(panels, presets, strict=True):
        for curve in values["curves"]:
            if curve["preset"] != preset:
                continue
            means = [_mean(each) for each in curve["losses"]]
            name = str(_curve_of(curve))
            (line,) = panel.plot(curve["log2_rates"], means, "o-", markersize=3, label=name.partition("-")[2])
            optimum, color = curve["optimum"], line.get_color()
            ends = [optimum["rate"] if optimum[end] is None else optimum[end] for end in ("low", "high")]
            panel.errorbar(
                [optimum["rate"]], [optimum["loss"]], fmt="*", markersize=10, color=color, capsize=3,
                xerr=[[max(0.0, optimum["rate"] - ends[0])], [max(0.0, ends[1] - optimum["rate"])]],
            )  # fmt: skip
        tried = [rate for curve in values["curves"] if curve["preset"] == preset for rate in curve["log2_rates"]]
        panel.set_xlim(min(tried) - 0.5, max(tried) + 0.5)  # an interval may reach far beyond
        panel.set_ylim(least - 0.05, min(max(finite), least + 1.5) + 0.05)
        panel.set_xlabel("log2(peak learning rate)")
        panel.set_ylabel("held-out loss, nats a token")
        panel.set_title(preset)
        panel.legend(fontsize="small")
    write_figure(figure, path)


def _whole(value: float, name: str, curve: Curve) -> int:
    if value < 1 or value != int(value):
        raise ValueError(
            f"{name}={getattr(curve, name):g} gives {value:g} sequences a step; give a factor that makes it whole"
        )
    return int(value)
