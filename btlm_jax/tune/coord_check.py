"""The coordinate check: train the real model at several widths for a few steps; no statistic may depend on the width.

For every case of mutations.py, with the smallest width as the base: mean absolute activations on a fixed probe at
step 0 ("size"), and the RMS of their change after t steps ("change": the initialization would hide a wrong learning
rate in the activations themselves). A statistic's slope is that of a least-squares line through log2(statistic) over
log2(width): 0 where the parametrization is right. The logits have a random part that shrinks with the width, so the
readout is judged by the loss after the last step. The check tests itself: a broken parametrization that passes fails
it. It does not see the learning rate of biases and norms, which hardly move the activations;
tests/recipe/test_optimizer.py compares those with their closed form.

Method: arXiv 2203.03466 (appendix D.1) and 2304.03208, on changes rather than on sizes. Runs on CPU devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from btlm_jax.model import Btlm, ParameterInfo, make_model, parameter_table
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import RULES, WHOLE_SEQUENCES, batch_sharding
from btlm_jax.recipe.config import TAKE_FINITE, ModelConfig, MupConfig, OptimizerConfig
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.train.step import TrainState, make_train_step, new_state
from btlm_jax.tune.mutations import CASES, Case

TEXT = (
    b"The width of a network is a choice of budget, not of learning rate: when every layer moves its outputs by the "
    b"same amount at every width, the values found on a small model serve a large one, and nobody needs to search "
    b"again. That claim is about numbers, and so it can be measured before it is believed."
)
VOCAB_SIZE, SEQ_LEN, NUM_LAYERS, HEAD_DIM = 256, 16, 2, 32
LEARNING_RATE = 2.0**-7
SIZES = ("embedding", "value", "attention", "mlp", "residual")
CHANGES = ("embedding", "scores", "value", "attention", "mlp", "residual")
# Compilation is nearly all of the time, and nothing runs long enough to repay optimization.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """What is run, and the limits of "flat" and "broken". The smallest width is the base.

    A case is flat if its steepest slope and its spread of losses are both within the flat limits, and caught if either
    exceeds the broken limit. Slopes are in doublings of a statistic a doubling of the width; spreads, the largest minus
    the smallest loss over the widths, in nats a token.
    """

    cases: tuple[Case, ...]
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    flat_slope: float
    flat_spread: float
    broken_slope: float
    broken_spread: float

    def __post_init__(self):
        if len(self.widths) < 2 or any(width % (2 * HEAD_DIM) for width in self.widths):
            raise ValueError(f"widths={self.widths}: give two or more multiples of {2 * HEAD_DIM}")
        if not self.cases or not self.seeds:
            raise ValueError("the coordinate check needs at least one case and one seed")


# The limits lie between what right and broken parametrizations measure; `btlm tune coord-check` prints both again
# (figures: LOG.md, 2026-11-28).
FULL = Design(
    cases=CASES,
    widths=(64, 128, 256),
    seeds=(0, 1, 2, 3, 4),
    flat_slope=0.12,
    flat_spread=0.12,
    broken_slope=0.25,
    broken_spread=0.3,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseResult:
    """Measurements of one case: every tuple has one entry a width, averaged over seeds."""

    case: Case
    design: Design
    statistics: dict[str, tuple[float, ...]]  # name -> log2
    losses: tuple[float, ...]  # nats, after the last step

    @property
    def slopes(self) -> dict[str, float]:
        x = np.log2(self.design.widths)
        x -= x.mean()
        return {name: float(x @ np.asarray(values) / (x @ x)) for name, values in self.statistics.items()}

    @property
    def worst(self) -> str:
        """The name of the statistic with the steepest slope; one that is not a number is the steepest."""
        slopes = self.slopes
        return max(slopes, key=lambda name: np.nan_to_num(abs(slopes[name]), nan=np.inf))

    @property
    def loss_spread(self) -> float:
        return float(np.ptp(self.losses))

    @property
    def is_as_expected(self) -> bool:
        """Whether a right case is flat, or a broken one is caught; numbers that are not finite are never flat."""
        slope, spread, design = abs(self.slopes[self.worst]), self.loss_spread, self.design
        if self.case.is_flat:
            return slope <= design.flat_slope and spread <= design.flat_spread
        return not (slope <= design.broken_slope and spread <= design.broken_spread)


def coord_check(design: Design) -> tuple[CaseResult, ...]:
    """Run every case at every width; one compilation for each width and set of forward multipliers."""
    mesh = make_mesh(devices=jax.local_devices(backend="cpu")[:1], tensor=1)
    measured = {case: [] for case in design.cases}
    for width in design.widths:
        programs = {}
        for case in design.cases:
            model = make_case_model(case, width=width, base_width=min(design.widths))
            scales = model.parametrization
            key = (case.wide_heads, scales.output_scale, scales.attention_scale, scales.residual_scale)
            if key not in programs:
                programs[key] = make_program(model, mesh, num_steps=num_steps_of(case))
            measured[case].append([run_case(case, model, programs[key], mesh, seed=seed) for seed in design.seeds])
    return tuple(_summarize(case, design, by_width) for case, by_width in measured.items())


def num_steps_of(case: Case) -> int:
    """Return the number of steps: scores of wide heads start at zero and need about 20 steps to align with the data."""
    return 24 if case.wide_heads else 3


def make_case_model(case: Case, *, width: int, base_width: int) -> Btlm:
    """Make the model of a case, with the constants that keep every coordinate near 1 at the base width."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=NUM_LAYERS,
        d_model=width,
        num_heads=2 if case.wide_heads else width // HEAD_DIM,
        d_ff=3 * width,
        layer_norm_eps=1e-5,
        qk_norm="none",
        alibi_scaling=1.0,
        dtype="float32",
        attention="reference",
        remat="none",
        loss_chunk=SEQ_LEN,
    )
    mup = MupConfig(
        preset=case.preset,
        base_d_model=float(base_width),
        base_d_ff=3.0 * base_width,
        base_num_layers=NUM_LAYERS,
        init_std=base_width**-0.5,
        embedding_multiplier=base_width**0.5,
        output_multiplier=0.25,
    )
    return make_model(config, case.forward(make_parametrization(mup, config)))


def make_program(model: Btlm, mesh: Mesh, *, num_steps: int):
    """Jit (params, rules, batch, probe_BT) -> {"size", "change", "loss"}; rules are values: one program, many cases.

    size: mean |activation| at step 0; change and loss: after 0, 1, ..., num_steps steps.
    """
    table = parameter_table(model, mesh)
    config = OptimizerConfig(
        schedule="constant",
        peak_learning_rate=LEARNING_RATE,
        end_learning_rate=LEARNING_RATE,
        initial_learning_rate=0.0,
        warmup_tokens=0,
        decay_share=1.0,
        schedule_begin=0,
        schedule_tokens=0,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        weight_decay_convention="preset",
        z_loss=0.0,
        clip_norm=1.0,
        hidden_optimizer="adamw",
        muon_learning_rate=0.02,
        average="none",
        average_share=0.1,
        freeze="",
    )

    def with_rule(info: ParameterInfo, multipliers: dict) -> ParameterInfo:
        return dataclasses.replace(info, rule=dataclasses.replace(info.rule, **multipliers))

    def program(params, rules, batch, probe_BT):
        ruled = jax.tree.map(with_rule, table, rules)
        optimizer = make_optimizer(config, ruled)
        train_step = make_train_step(model, optimizer, ruled, loss_chunk=SEQ_LEN, rule=TAKE_FINITE)

        def step(state: TrainState, _):
            activations = probe_activations(model, state.params, probe_BT)
            state, metrics = train_step(state, batch, LEARNING_RATE)
            return state, (activations, metrics["loss"])

        state = new_state(params, optimizer)
        _, (activations, losses) = jax.lax.scan(step, state, length=num_steps + 1)
        sizes = {name: jnp.abs(activations[name][0]).mean() for name in SIZES}
        changes = {name: activations[name] - activations[name][0] for name in CHANGES}
        return {
            "size": sizes,
            "change": {
                name: jnp.sqrt(jnp.square(change).mean(tuple(range(1, change.ndim))))
                for name, change in changes.items()
            },
            "loss": losses,
        }

    return jax.jit(program, compiler_options=COMPILER_OPTIONS)


def probe_activations(model: Btlm, params, probe_BT) -> dict[str, jax.Array]:
    """Return activations of the embedding and of every block on the probe; those of blocks are [L, B, T, ...]."""
    model = model.clone(rules=WHOLE_SEQUENCES)  # scores need all positions on one device
    _, captured = model.apply({"params": params}, probe_BT, capture_intermediates=True, mutable=["intermediates"])
    intermediates: Any = captured["intermediates"]
    embedding, blocks = intermediates["embedding"], intermediates["blocks"]
    attention = {name: blocks["attention"][name]["__call__"][0] for name in ("query", "key", "value", "out")}
    scores = jnp.einsum("LBTNH,LBSNH->LBNTS", attention["query"], attention["key"])
    return {
        "embedding": embedding["__call__"][0],
        "scores": scores * model.parametrization.attention_scale,
        "value": attention["value"],
        "attention": attention["out"],
        "mlp": blocks["mlp"]["__call__"][0],
        "residual": blocks["__call__"][0][0],
    }


def run_case(case: Case, model: Btlm, program, mesh: Mesh, *, seed: int) -> dict:
    """Initialize by the case's rules, train, and return sizes, changes and losses after every number of steps."""
    table = jax.tree.map(
        lambda info: dataclasses.replace(info, rule=case.rule(info.rule, model.parametrization)),
        parameter_table(model, mesh),
    )
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda info: jax.device_put(_draw(info, rng), info.sharding), table)
    if case.wide_heads:
        # Otherwise the scores start with a random part that falls with the head dim (2203.03466, D.2).
        query = params["blocks"]["attention"]["query"]
        query["kernel"] = jnp.zeros_like(query["kernel"])
    rules = jax.tree.map(
        lambda info: {
            "learning_rate": jnp.float32(info.rule.learning_rate),
            "weight_decay": jnp.float32(info.rule.weight_decay),
            "eps": jnp.float32(info.rule.eps),
        },
        table,
    )
    start = 7 * seed
    row = np.frombuffer(TEXT, np.uint8)[start : start + SEQ_LEN + 1].astype(np.int32)[None, None]
    batch = {
        "inputs_BT": row[..., :-1],
        "targets_BT": row[..., 1:],
        "weights_BT": np.ones((1, 1, SEQ_LEN), np.float32),
    }
    probe_BT = np.frombuffer(TEXT, np.uint8)[-3 * SEQ_LEN :].astype(np.int32).reshape(3, SEQ_LEN)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_sharding(mesh, RULES))
        return jax.device_get(program(params, rules, batch, jnp.asarray(probe_BT)))


def _draw(info: ParameterInfo, rng: np.random.Generator) -> np.ndarray:
    """Draw from the distribution of model/layers.py, without a compilation for each shape."""
    if info.rule.init_std == 0:
        return np.full(info.shape, info.rule.init_mean, np.float32)
    values = rng.standard_normal(info.shape, np.float32)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(outside.sum(), np.float32)
    return info.rule.init_std * values


def _summarize(case: Case, design: Design, by_width: list[list[dict]]) -> CaseResult:
    last = num_steps_of(case)

    def over_seeds(value_of) -> tuple[float, ...]:
        return tuple(float(np.mean([value_of(seed) for seed in seeds])) for seeds in by_width)

    statistics = {}
    if not case.wide_heads:
        for name in SIZES:
            statistics[f"size of {name} at step 0"] = over_seeds(lambda run, name=name: np.log2(run["size"][name]))
    for name in ("scores",) if case.wide_heads else CHANGES:
        for t in (last,) if case.wide_heads else (1, last):
            statistics[f"change of {name} at step {t}"] = over_seeds(
                lambda run, name=name, t=t: np.log2(run["change"][name][t])
            )
    return CaseResult(case=case, design=design, statistics=statistics, losses=over_seeds(lambda run: run["loss"][last]))
