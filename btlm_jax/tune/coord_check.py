"""The coordinate check: train a config's model at several widths for a few steps; no statistic may depend on the width.

The model, the optimizer, the step and the mesh are those that `btlm train` would run (train/program.py); only the width
(or the depth), the batch and the learning rate are the check's. For every case of mutations.py, on a fixed probe:

    size      mean absolute activations, and the loss, at step 0
    change    RMS of the activations' change after t steps: the initialization would hide a wrong learning rate in the
              activations themselves
    update    RMS of a class's first update, over its rate's share: 1/m of hidden matrices, m^(-1/2) of those that Muon
              updates, 1 of others; of the embedding in the rows of the batch's tokens: elsewhere the gradient is the
              softmax's tail, which falls below Adam's epsilon with the width

A statistic's slope is that of a least-squares line through log2(statistic) over log2(width): 0 where the
parametrization is right. The logits have a random part that shrinks with the width: their slope is shown and not
judged, and the readout is judged by the loss after the last step. Nor are updates by Muon: they have one spectral norm,
and an RMS that falls where the gradient has no full rank, which is that of the batch's tokens at most. The check tests
itself: a broken parametrization that passes fails it. What moves neither activations nor loss is in optimizer_check.py.

Over depths means over the layers say little, since a deeper model has more early ones: of slopes only that of the last
layer's residual stream after one step is judged.

Method: arXiv 2203.03466 (appendix D.1) and 2304.03208, on changes rather than on sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.model import Btlm, ParameterInfo
from btlm_jax.parallel.make_mesh import make_run_mesh, num_slices
from btlm_jax.parallel.mesh import WHOLE_SEQUENCES, batch_sharding, num_ways
from btlm_jax.recipe.config import CurriculumConfig, MeshConfig, ModelConfig, TrainConfig, check_divisible
from btlm_jax.recipe.mup import HIDDEN_CLASSES
from btlm_jax.recipe.sizes import PUBLISHED, Choices, Shape, make_config
from btlm_jax.train.program import Program, make_program
from btlm_jax.train.step import TrainState, new_state
from btlm_jax.tune.mutations import BROKEN, CASES, OWN, Case, with_own_heads
from btlm_jax.tune.optimizer_check import forward_error, optimizer_error

TEXT = (
    b"The width of a network is a choice of budget, not of learning rate: when every layer moves its outputs by the "
    b"same amount at every width, the values found on a small model serve a large one, and nobody needs to search "
    b"again. That claim is about numbers, and so it can be measured before it is believed."
)
BYTES = 256
WIDTH, DEPTH = "width", "depth"
SIZES = ("embedding", "value", "attention", "mlp", "residual")
CHANGES = ("embedding", "scores", "value", "attention", "mlp", "residual")
SHOWN = ("change of logits",)  # statistics of which the slope is not judged over widths, by their beginning
LAST_RESIDUAL = "last layer's residual"
JUDGED_OVER_DEPTHS = f"change of {LAST_RESIDUAL} at step 1"
LEARNING_RATE = 2.0**-9  # of a config's check
NUM_SEEDS = 5  # of the same: two left a slope of 0.12 +- 0.05, and most of the time is compilation
CONFIG_STEPS = 8  # after which it has learnt a config's batch by heart, and its loss is level: see design_for
STEPS, WIDE_STEPS = 3, 24  # scores of wide heads start at zero and need about 20 steps to align with the data
# Classes whose first update must be of one size: power of 1/m in their rate. A bias or a norm has it at 0.
_RATES = {"embedding": 0, **dict.fromkeys(HIDDEN_CLASSES, 1), "norm_scale": 0, "bias": 0}
EXACT, EXACT_LIMIT = "exact check", 1e-4  # relative; a float32 update of the right multipliers is within 1e-6
# Compilation is nearly all of the time, and nothing runs long enough to repay optimization.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """A case is flat if its steepest slope and its spread of losses are both within the flat limits, and caught if
    either exceeds the broken limit.

    Slopes are in doublings of a statistic a doubling of the width; spreads, the largest minus the smallest loss over
    the widths, in nats a token. The limits lie between what right and broken parametrizations measure; the check prints
    both again (figures: LOG.md).
    """

    flat_slope: float
    flat_spread: float
    broken_slope: float
    broken_spread: float


LIMITS = Limits(flat_slope=0.12, flat_spread=0.12, broken_slope=0.25, broken_spread=0.3)
DEPTH_LIMITS = dataclasses.replace(LIMITS, flat_slope=0.25)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """What is run. `config` is that of the check: its batch is the check's own, its width and depth are replaced."""

    config: TrainConfig
    cases: tuple[Case, ...]
    ladder: str  # WIDTH or DEPTH: what the sizes are of
    sizes: tuple[int, ...]  # ascending
    seeds: tuple[int, ...]
    num_steps: int
    learning_rate: float
    limits: Limits

    def __post_init__(self):
        if len(self.sizes) < 2 or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"{self.ladder}s={_listed(self.sizes)}: give two or more, ascending")
        if not self.cases or not self.seeds:
            raise ValueError("the coordinate check needs at least one case and one seed")
        if self.num_steps < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"steps={self.num_steps} and learning_rate={self.learning_rate:g} of the coordinate check must be "
                "positive"
            )
        head_dim = self.config.model.head_dim
        if self.ladder == WIDTH and any(size % head_dim for size in self.sizes):
            raise ValueError(
                f"widths={_listed(self.sizes)}: heads are {head_dim} wide, so give multiples of {head_dim}"
            )

    @property
    def muon_classes(self) -> tuple[str, ...]:
        """The parameter classes that Muon updates."""
        return tuple(HIDDEN_CLASSES) if self.config.optimizer.hidden_optimizer == "muon" else ()


def tiny_config() -> TrainConfig:
    """Return the config of the check without a config: two layers of BTLM, with coordinates near 1 at width 64."""
    made = make_config(
        Choices(
            shape=Shape(vocab_size=256, num_layers=2, d_model=64, num_heads=2, d_ff=192),
            num_tokens=2**20,
            longest=128,
            weight_decay=PUBLISHED,
            dtype="float32",
            mesh=MeshConfig(tensor=1, context=1, accumulation=1),
            remat="none",
            store="store",
            max_epochs=1,
        )
    )
    mup = dataclasses.replace(
        made.mup, base_d_model=64.0, base_d_ff=192.0, base_num_layers=2, init_std=64**-0.5, embedding_multiplier=8.0,
        output_multiplier=0.25,
    )  # fmt: skip
    model = dataclasses.replace(made.model, attention="reference")
    return with_batch(dataclasses.replace(made, model=model, mup=mup), seq_len=16, batch_size=1)


def with_batch(config: TrainConfig, *, seq_len: int, batch_size: int) -> TrainConfig:
    """Return a config of one phase with this batch, whose learning rate is the one that its steps are given."""
    curriculum = CurriculumConfig(
        seq_len=(seq_len,), batch_size=(batch_size,), num_tokens=(2 * WIDE_STEPS * seq_len * batch_size,)
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, loss_chunk=min(config.model.loss_chunk, seq_len)),
        curriculum=curriculum,
        optimizer=dataclasses.replace(
            config.optimizer, schedule="constant", warmup_tokens=0, schedule_begin=0, schedule_tokens=0
        ),
        data=dataclasses.replace(config.data, weights=""),
        log=dataclasses.replace(config.log, profile_steps=""),
    )


FULL = Design(
    config=tiny_config(),
    cases=CASES,
    ladder=WIDTH,
    sizes=(64, 128, 256),
    seeds=(0, 1, 2, 3, 4),
    num_steps=STEPS,
    learning_rate=2.0**-7,
    limits=LIMITS,
)


MOST_LAYERS, MOST_TOKENS, ROWS = 4, 64, 8  # of a config's model and sequences; the fewest sequences


def design_for(
    config: TrainConfig,
    *,
    num_devices: int,
    ladder: str = WIDTH,
    sizes: tuple[int, ...] = (),
    seeds: int = NUM_SEEDS,
    num_steps: int = CONFIG_STEPS,
    learning_rate: float = LEARNING_RATE,
    num_layers: int = 0,
    mutate: bool = False,
) -> Design:
    """Return the check of a user's config; what is empty or 0 is chosen, see docs/guide/tune.md.

    Widths begin at the base width: published constants are tuned there, and below it a tied readout gives the current
    token a logit so large that the first steps are chaotic. They are whole heads that the mesh divides. A BTLM begins
    at 28 nats, of which a hundredth is chance. At 2^-9 it has less than 0.5 after 8 steps, where 0.12 nats of spread
    mean something; at 2^-12 it still has 17.

    Raises:
      ValueError: the sizes or another value cannot be.
    """
    config = config.with_numbers()  # those of the whole run, not of the check's steps
    model, mesh = config.model, config.mesh
    inner = mesh.tensor * mesh.context
    sequences = max(1, num_devices // inner)
    unit = math.lcm(model.head_dim * inner, sequences * mesh.tensor)
    least = math.ceil(config.mup.base_d_model / unit) * unit
    if ladder == DEPTH:
        sizes = sizes or (2, 4, 8)
        model = at_width(model, least)
    else:
        sizes = sizes or (least, 2 * least, 4 * least)
        model = dataclasses.replace(model, num_layers=num_layers or min(MOST_LAYERS, model.num_layers))
    seq_len = math.ceil(min(MOST_TOKENS, config.curriculum.seq_len[0]) / inner) * inner
    ways = sequences * mesh.accumulation
    checked = with_batch(
        dataclasses.replace(config, model=model), seq_len=seq_len, batch_size=math.ceil(ROWS / ways) * ways
    )
    return Design(
        config=checked,
        cases=(OWN, *(mutations_of(config) if mutate else ())),
        ladder=ladder,
        sizes=sizes,
        seeds=tuple(range(seeds)),
        num_steps=num_steps,
        learning_rate=learning_rate,
        limits=DEPTH_LIMITS if ladder == DEPTH else LIMITS,
    )


def mutations_of(config: TrainConfig) -> tuple[Case, ...]:
    """Return the broken variants that are broken in a config: without weight decay, wrong decays are not.

    Muon's rates have no 1/m that could be missing, and are not in the optimizer's check. Heads stay as wide as they
    are: where they grow, scores align with the data only in some 20 steps at 2^-7, too many and too fast for constants
    that begin at 28 nats, and at lower rates chance outweighs what 1 / sqrt(d) does (LOG.md, 2026-11-29).
    """
    has_muon = config.optimizer.hidden_optimizer == "muon"

    def is_broken(name: str) -> bool:
        if "decay" in name:
            return bool(config.optimizer.decay) and not (has_muon and name.startswith("hidden"))
        return not (has_muon and (name.endswith("LR unscaled") or name.startswith("hidden LR")))

    return tuple(with_own_heads(case) for case in BROKEN if is_broken(case.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseResult:
    """Measurements of one case."""

    case: Case
    design: Design
    statistics: dict[str, tuple[tuple[float, ...], ...]]  # name -> log2, by size and then by seed
    losses: tuple[float, ...]  # nats, after the last step, by size, averaged over seeds
    exact_error: float  # largest relative error of an update or a forward multiplier, see optimizer_check.py

    @property
    def slopes(self) -> dict[str, float]:
        """The slope of each statistic, of the mean over seeds."""
        x = self._x
        return {name: float(x @ np.mean(values, axis=1) / (x @ x)) for name, values in self.statistics.items()}

    @property
    def errors(self) -> dict[str, float | None]:
        """The standard error of each slope, from the scatter over seeds; None of one seed, which has none to see."""
        x = self._x
        found: dict[str, float | None] = {}
        for name, values in self.statistics.items():
            slopes = x @ np.asarray(values) / (x @ x)
            found[name] = float(slopes.std(ddof=1) / math.sqrt(len(slopes))) if len(slopes) > 1 else None
        return found

    def is_judged(self, name: str) -> bool:
        """Return whether the slope of a statistic is judged."""
        if self.design.ladder == DEPTH:
            return name == JUDGED_OVER_DEPTHS
        by_muon = (f"update of {parameter_class}" for parameter_class in self.design.muon_classes)
        return not name.startswith((*SHOWN, *by_muon))

    @property
    def worst(self) -> str:
        """The name of the judged statistic with the steepest slope; one that is not a number is the steepest."""
        slopes = {name: slope for name, slope in self.slopes.items() if self.is_judged(name)}
        return max(slopes, key=lambda name: np.nan_to_num(abs(slopes[name]), nan=np.inf))

    @property
    def loss_spread(self) -> float:
        return float(np.ptp(self.losses))

    @property
    def caught_by(self) -> str:
        """What shows that the case is broken: "slope", "loss", "exact check", or "" for nothing."""
        limits = self.design.limits
        if not abs(self.slopes[self.worst]) <= limits.broken_slope:
            return "slope"
        if not self.loss_spread <= limits.broken_spread:
            return "loss"
        return EXACT if not self.exact_error <= EXACT_LIMIT else ""

    @property
    def is_flat(self) -> bool:
        """Whether all is within the limits of a right one; numbers that are not finite are never flat."""
        limits = self.design.limits
        is_flat = abs(self.slopes[self.worst]) <= limits.flat_slope and self.loss_spread <= limits.flat_spread
        return is_flat and self.exact_error <= EXACT_LIMIT

    @property
    def is_undecided(self) -> bool:
        """Whether a right case is steep by no more than chance, which one seed cannot say: more seeds would."""
        limits, slope, error = self.design.limits, abs(self.slopes[self.worst]), self.errors[self.worst]
        is_near = error is not None and limits.flat_slope < slope <= limits.flat_slope + 2 * error
        rest = self.loss_spread <= limits.flat_spread and self.exact_error <= EXACT_LIMIT
        return self.case.is_flat and is_near and rest

    @property
    def is_as_expected(self) -> bool:
        """Whether a right case is flat, or a broken one is caught, by what it is said to be caught by."""
        if self.case.is_flat:
            return self.is_flat
        return self.caught_by in (("slope", "loss") if self.case.is_visible else (EXACT,))

    @property
    def _x(self) -> np.ndarray:
        x = np.log2(self.design.sizes)
        return x - x.mean()


def coord_check(
    design: Design,
    *,
    devices: Sequence[Any],
    report_progress: Callable[[str], None] = lambda line: None,
) -> tuple[CaseResult, ...]:
    """Run every case at every size on these devices; one compilation for each size and set of forward multipliers.

    Raises:
      ValueError: the devices do not divide the model at one of the sizes.
    """
    measured: dict[Case, list[list[dict]]] = {case: [] for case in design.cases}
    errors = dict.fromkeys(design.cases, 0.0)
    for size in design.sizes:
        made: dict[TrainConfig, Program] = {}
        programs: dict[tuple, _Checked] = {}
        draws: dict[tuple, dict] = {}
        for case in design.cases:
            config = config_at(design, case, size)
            if config not in made:
                check_divisible(config, num_devices=len(devices), slices=num_slices(devices))
                mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=devices)
                made[config] = make_program(config, mesh)
            checked = _Checked.make(case, made[config], num_steps=design.num_steps)
            found = programs.setdefault(checked.key, checked)
            runs = []
            for seed in design.seeds:
                drawn = (case.wide_heads, seed)
                if drawn not in draws:
                    draws[drawn] = checked.draw(seed)
                runs.append(found.run(checked.rules, draws[drawn], seed=seed, learning_rate=design.learning_rate))
            measured[case].append(runs)
            errors[case] = max(
                errors[case],
                optimizer_error(config, checked.rules),
                forward_error(config, checked.program.model.parametrization),
            )
        report_progress(f"{design.ladder} {size}: {len(design.cases)} cases, {len(programs)} programs")
    return tuple(_summarize(case, design, runs, errors[case]) for case, runs in measured.items())


def at_width(model: ModelConfig, d_model: int) -> ModelConfig:
    """Return a model at another width: heads as wide as they were, d_ff the same share of it, and even.

    Raises:
      ValueError: the width is no whole number of heads.
    """
    if d_model % model.head_dim:
        raise ValueError(f"width {d_model}: heads are {model.head_dim} wide, so give a multiple of {model.head_dim}")
    d_ff = max(2, int(model.d_ff * d_model / model.d_model) // 2 * 2)
    return dataclasses.replace(model, d_model=d_model, num_heads=d_model // model.head_dim, d_ff=d_ff)


def config_at(design: Design, case: Case, size: int) -> TrainConfig:
    """Return the config of a case at one width or depth."""
    config, model = design.config, design.config.model
    if design.ladder == DEPTH:
        model = dataclasses.replace(model, num_layers=size)
    else:
        model = at_width(model, size)
        if case.wide_heads:
            model = dataclasses.replace(model, num_heads=design.sizes[0] // design.config.model.head_dim)
    mup = dataclasses.replace(config.mup, preset=case.preset) if case.preset else config.mup
    return dataclasses.replace(config, model=model, mup=mup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checked:
    """A case at one size: its program, and the rules of its parameters, which the program takes as values."""

    case: Case
    program: Program
    rules: dict  # the parameters' tree of ParameterInfo with the case's rules
    num_steps: int
    step: Callable  # (state, batch, learning_rate, rules) -> (state, metrics), jitted
    begin: Callable  # params -> state, jitted
    probe: Callable  # (params, probe_BT) -> activations, jitted

    @classmethod
    def make(cls, case: Case, program: Program, *, num_steps: int) -> _Checked:
        config = program.config
        changed = case.forward(program.model.parametrization)
        program = dataclasses.replace(program, model=program.model.clone(parametrization=changed))
        rules = jax.tree.map(lambda info: dataclasses.replace(info, rule=case.rule(info.rule, changed)), program.table)
        phase = config.curriculum.table.phases[0]

        def step(state: TrainState, batch: dict, learning_rate, multipliers: dict):
            table = jax.tree.map(_with_multipliers, program.table, multipliers)
            return program.with_table(table).make_train_step(phase)(state, batch, learning_rate)

        model = program.model.clone(rules=program.rules_for(phase))
        return cls(
            case=case,
            program=program,
            rules=rules,
            num_steps=WIDE_STEPS if case.wide_heads else num_steps,
            step=jax.jit(step, compiler_options=COMPILER_OPTIONS),
            begin=jax.jit(lambda params: new_state(params, program.optimizer), compiler_options=COMPILER_OPTIONS),
            probe=jax.jit(lambda *arrays: probe_activations(model, *arrays), compiler_options=COMPILER_OPTIONS),
        )

    @property
    def key(self) -> tuple:
        """What decides the program: two cases of a size that have the same need one compilation."""
        scales = self.program.model.parametrization
        return (
            self.case.wide_heads, scales.output_scale, scales.attention_scale, scales.residual_scale,
            scales.embedding_scale,
        )  # fmt: skip

    def draw(self, seed: int) -> dict:
        """Draw every matrix from a normal distribution of deviation 1, truncated as in model/layers.py."""
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda info: _truncated_normal(info.shape, rng) if info.rule.init_std else None, self.rules)

    def initial(self, rules: dict, draws: dict) -> dict:
        """Return the parameters that rules make of draws, on the mesh."""

        def one(info: ParameterInfo, drawn: np.ndarray | None) -> jax.Array:
            values = (
                np.full(info.shape, info.rule.init_mean, np.float32) if drawn is None else info.rule.init_std * drawn
            )
            return jax.device_put(values, info.sharding)

        params = jax.tree.map(one, rules, draws)
        if self.case.wide_heads:
            # Otherwise the scores start with a random part that falls with the head dim (2203.03466, D.2).
            query = params["blocks"]["attention"]["query"]
            query["kernel"] = jax.device_put(np.zeros(query["kernel"].shape, np.float32), query["kernel"].sharding)
        return params

    def multipliers(self, rules: dict) -> dict:
        """Return what of the rules the step takes as values."""
        return jax.tree.map(lambda info: {name: np.float32(getattr(info.rule, name)) for name in _MULTIPLIERS}, rules)

    def run(self, rules: dict, draws: dict, *, seed: int, learning_rate: float) -> dict:
        """Initialize by the rules, train, and return sizes, changes, updates and losses after every number of steps."""
        mesh, config = self.program.mesh, self.program.config
        phase = config.curriculum.table.phases[0]

        params, multipliers = self.initial(rules, draws), self.multipliers(rules)
        counts = dict.fromkeys(_RATES, 0)
        for info in jax.tree.leaves(rules):
            if info.rule.parameter_class in counts and not info.rule.is_frozen:
                counts[info.rule.parameter_class] += math.prod(info.shape)
        made = make_batch(config, seed=seed)
        tokens = np.union1d(made["inputs_BT"], made["targets_BT"])
        with jax.set_mesh(mesh):
            sharding = batch_sharding(mesh, self.program.rules_for(phase))
            batch = jax.device_put(made, sharding)
            ways = num_ways(mesh, self.program.rules_for(phase).batch)
            rows, start = -(-3 // ways) * ways, max(0, len(TEXT) - 3 * phase.seq_len)
            probe_BT = jnp.asarray(_tokens(config, rows=rows, seq_len=phase.seq_len, start=start)[:, :-1])
            state = self.begin(params)
            before = jax.device_get(self.probe(state.params, probe_BT))
            rows_TD = jax.device_get(state.params["embedding"]["embedding"])[tokens]
            found: dict[str, Any] = {
                "size": {name: float(np.abs(before[name]).mean()) for name in SIZES},
                "change": [{name: 0.0 for name in (*before, LAST_RESIDUAL)}],
                "loss": [],
                "update": {},
            }
            for number in range(self.num_steps + 1):
                state, metrics = self.step(state, batch, np.float32(learning_rate), multipliers)
                found["loss"].append(float(metrics["loss"]))
                if number == 0:
                    found["update"] = {
                        name: float(metrics[f"update_norm/{name}"]) / math.sqrt(count)
                        for name, count in counts.items()
                        if count
                    }
                    if counts["embedding"]:
                        moved_TD = jax.device_get(state.params["embedding"]["embedding"])[tokens] - rows_TD
                        found["update"]["embedding"] = _rms(moved_TD)
                if number in (0, self.num_steps - 1):
                    after = jax.device_get(self.probe(state.params, probe_BT))
                    moved = {name: _rms(after[name] - before[name]) for name in before}
                    last = _rms(after["residual"][-1] - before["residual"][-1])
                    found["change"].append({**moved, LAST_RESIDUAL: last})
        return found


_MULTIPLIERS = ("learning_rate", "weight_decay", "eps")


def _with_multipliers(info: ParameterInfo, multipliers: dict) -> ParameterInfo:
    return dataclasses.replace(info, rule=dataclasses.replace(info.rule, **multipliers))


def _rms(x: np.ndarray) -> float:
    return math.sqrt(np.square(x, dtype=np.float64).mean())


def probe_activations(model: Btlm, params: dict, probe_BT: jax.Array) -> dict[str, jax.Array]:
    """Return activations of the embedding, of every block and of the readout; those of blocks are [L, B, T, ...]."""
    model = model.clone(rules=dataclasses.replace(WHOLE_SEQUENCES, batch=model.rules.batch))  # scores need all of them
    hidden_BTD, captured = model.apply(
        {"params": params}, probe_BT, capture_intermediates=True, mutable=["intermediates"]
    )
    intermediates: Any = captured["intermediates"]
    embedding, blocks = intermediates["embedding"], intermediates["blocks"]
    attention = {name: blocks["attention"][name]["__call__"][0] for name in ("query", "key", "value", "out")}
    scores = jnp.einsum("LBTNH,LBSNH->LBNTS", attention["query"], attention["key"])
    table_VD = jax.sharding.reshard(params["embedding"]["embedding"], jax.sharding.PartitionSpec(None, None))
    logits = jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD.astype(hidden_BTD.dtype))
    found = {
        "embedding": embedding["__call__"][0],
        "scores": scores * model.parametrization.attention_scale,
        "value": attention["value"],
        "attention": attention["out"],
        "mlp": blocks["mlp"]["__call__"][0],
        "residual": blocks["__call__"][0][0],
        "logits": logits * model.parametrization.output_scale,
    }
    return {name: x.astype(jnp.float32) for name, x in found.items()}


def make_batch(config: TrainConfig, *, seed: int) -> dict[str, np.ndarray]:
    """Return the batch [A, B/A, T] that a seed trains on."""
    phase, accumulation = config.curriculum.table.phases[0], config.mesh.accumulation
    rows = _tokens(config, rows=phase.batch_size, seq_len=phase.seq_len, start=7 * seed)
    rows = rows.reshape(accumulation, phase.batch_size // accumulation, phase.seq_len + 1)
    return {
        "inputs_BT": rows[..., :-1],
        "targets_BT": rows[..., 1:],
        "weights_BT": np.ones(rows[..., 1:].shape, np.float32),
    }


def _tokens(config: TrainConfig, *, rows: int, seq_len: int, start: int) -> np.ndarray:
    """Return rows of seq_len + 1 tokens [rows, seq_len + 1], int32; equal for equal `start`.

    Of the tiny model with bytes, TEXT from `start` on. Otherwise made up: half of the tokens follow from the one
    before, by a fixed map, the rest come as often as words do, by Zipf's law.
    """
    vocab_size = config.model.vocab_size
    if vocab_size <= BYTES:
        positions = start + seq_len * np.arange(rows)[:, None] + np.arange(seq_len + 1)
        return np.take(np.frombuffer(TEXT, np.uint8), positions, mode="wrap").astype(np.int32) % vocab_size
    rng = np.random.default_rng(start)
    shares = 1 / np.arange(1, vocab_size + 1)
    tokens = rng.choice(vocab_size, size=(rows, seq_len + 1), p=shares / shares.sum())
    for t in range(1, seq_len + 1):
        follows = rng.random(rows) < 0.5
        tokens[follows, t] = tokens[follows, t - 1] * 7919 % vocab_size
    return tokens.astype(np.int32)


def _truncated_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw from the distribution of model/layers.py, without a compilation for each shape."""
    values = rng.standard_normal(shape, np.float32)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(outside.sum(), np.float32)
    return values


def _summarize(case: Case, design: Design, runs: list[list[dict]], error: float) -> CaseResult:
    """`runs` are by size and then by seed."""

    def each(value_of: Callable[[dict], float]) -> tuple[tuple[float, ...], ...]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return tuple(tuple(float(np.log2(value_of(run))) for run in of_size) for of_size in runs)

    last = WIDE_STEPS if case.wide_heads else design.num_steps
    statistics = {}
    if not case.wide_heads:
        for name in SIZES:
            statistics[f"size of {name} at step 0"] = each(lambda run, name=name: run["size"][name])
        statistics["size of loss at step 0"] = each(lambda run: run["loss"][0])
    changes = (*CHANGES, *((LAST_RESIDUAL,) if design.ladder == DEPTH else ()), "logits")
    for name in ("scores",) if case.wide_heads else changes:
        for index, step in ((-1, last),) if case.wide_heads else ((1, 1), (-1, last)):
            statistics[f"change of {name} at step {step}"] = each(
                lambda run, name=name, i=index: run["change"][i][name]
            )
    powers = np.log2(design.sizes) - np.log2(design.sizes[0]) if design.ladder == WIDTH else np.zeros(len(runs))
    for name in () if case.wide_heads else runs[0][0]["update"]:
        power = 0.5 if name in design.muon_classes else _RATES[name]
        values = np.asarray(each(lambda run, name=name: run["update"][name])) + power * powers[:, None]
        statistics[f"update of {name} at step 1"] = tuple(map(tuple, values.tolist()))
    losses = tuple(float(np.mean([run["loss"][-1] for run in of_size])) for of_size in runs)
    # What does not move at all, because it is frozen, has no slope.
    statistics = {name: values for name, values in statistics.items() if np.isfinite(values).any()}
    return CaseResult(case=case, design=design, statistics=statistics, losses=losses, exact_error=error)


def _listed(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
