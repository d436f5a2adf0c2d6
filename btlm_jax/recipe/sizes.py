"""Sizes by one dial: from a number of parameters and of tokens to a whole config; arithmetic without JAX.

With P parameters, D tokens, B tokens a step, S = D / B steps and m = d_model / 256:

    heads       the least power of two that makes a head at most 112 wide, and at least 4: every mesh divides them,
                cuDNN takes them (attention/gpu.py), ALiBi has one series of slopes. 32 of 80 at 2,560, as in BTLM
    d_ff        8/3 d_model, rounded down to an even number: 6,826 at 2,560, as in BTLM
    d_model     a multiple of 64 below 512 and of 128 above (lanes of a TPU), heads a multiple of 8 wide
    num_layers  of all shapes with P within 5 %, or else 10 %, the nearest to P and to BTLM's d_model = 80 num_layers:
                the least 2 |ln P'/P| + |ln d_model/num_layers/80|
    D           20 P unless said otherwise (arXiv 2203.15556)
    B           3,932,160 (D / 627.7e9)^0.383: the exponent of arXiv 2505.13738 (the best batch follows the tokens, not
                the size), through BTLM's own batch. At most D / 600: a run this short is limited by its steps
                (LOG.md). In sequences of the longest T 1, 3, 5 or 15 times a power of two, above 16 a multiple of 8,
                as BTLM's 480: many meshes divide it
    longest T   16 sqrt(B), a power of two from 128 to 8,192; through configs/local_cpu.py's 512 at 1,024. No source
    phases      3/4 of the steps at T/4, the rest at T, as in BTLM
    warm-up     375e6 tokens, at most a tenth of D: BTLM's 95 steps, Cerebras-GPT's 375 M (arXiv 2304.03208), and its
                40 M proxy's tenth
    muP         BTLM's constants, tuned at width 256, base d_ff so that d_ff / base = m
    peak rate   BTLM's 0.012; configs/local_cpu.py's 0.006 for batches below 16,384 tokens
    decay       0.1 as in BTLM, or "tau": m / (peak tau S) with tau = 0.21 (D / P / 20)^-0.527 (arXiv 2505.13738), in
                which AdamW's memory of the hidden matrices, tau S steps, follows the tokens a parameter

At BTLM's own P and D every one of them gives BTLM's own value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from btlm_jax.recipe.config import (
    PREPARED,
    BadNumbersConfig,
    CheckpointConfig,
    CorpusConfig,
    CurriculumConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    MupConfig,
    OptimizerConfig,
    TrainConfig,
)
from btlm_jax.recipe.mup import make_parametrization

GPT2_VOCAB_SIZE = 50_257
TOKENS_PER_PARAMETER = 20.0  # arXiv 2203.15556
PUBLISHED, TAU = "published", "tau"  # rules of the weight decay
WEIGHT_DECAYS = (PUBLISHED, TAU)

BASE_WIDTH = 256
ASPECT = 80.0  # BTLM's d_model / num_layers
SHORTEST, LONGEST = 128, 8192  # of the last phase's sequences; the latter is BTLM's
SHORTENING = 4  # its second phase's sequences are so many times as long as its first's
FIRST_SHARE = 0.75  # of the steps, in the first phase
MIN_STEPS = 600  # configs/local_cpu.py's
SMALL_BATCH = 16_384  # tokens; below it the peak rate is configs/local_cpu.py's
WARMUP_TOKENS = 375e6
# arXiv 2505.13738. TAU_AT_20 is what summaries quote of its 610 M model; Celerity (2509.25087) takes 0.1745.
BATCH_EXPONENT, TAU_EXPONENT, TAU_AT_20 = 0.383, -0.527, 0.21
BTLM_TOKENS_PER_STEP = 480 * 8192
BTLM_TOKENS = 159_636 * BTLM_TOKENS_PER_STEP
PEAK, SMALL_PEAK, END_SHARE = 0.012, 0.006, 1.0198e-4 / 0.012

_HEAD_DIM, _MIN_HEADS, _HEAD_DIM_MULTIPLE = 112, 4, 8
_LANES, _NARROW = 128, 512
_ODD_PARTS, _DIVISIBLE_FROM = (1, 3, 5, 15), 16
_MAX_WIDTH, _MAX_LAYERS = 65_536, 1024
_TOLERANCES = (0.05, 0.1)  # of the parameters asked for: the second where nothing is within the first
_ASPECT_RATIO = 4.0  # most that d_model / num_layers is above or below ASPECT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a network that decide how many parameters it has."""

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int

    @property
    def num_parameters(self) -> int:
        return count_parameters(self)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def width(self) -> float:
        """m, relative to the width whose constants are transferred."""
        return self.d_model / BASE_WIDTH


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What a config is made of that the rules do not decide."""

    shape: Shape
    num_tokens: int  # rounded down to whole steps
    longest: int  # length of the last phase's sequences, and of the store's blocks
    weight_decay: str  # one of WEIGHT_DECAYS
    dtype: str
    mesh: MeshConfig
    remat: str
    store: str
    max_epochs: int


def count_parameters(model: ModelConfig | Shape) -> int:
    """Return how many parameters a model has: matrices, biases and norms, the embedding once."""
    L, D, F, V = model.num_layers, model.d_model, model.d_ff, model.vocab_size
    attention, mlp, norms = 4 * D * D + 4 * D, 3 * D * F + 2 * F + D, 4 * D
    norms += 2 * model.head_dim * (isinstance(model, ModelConfig) and model.qk_norm == "rms_gain")
    return V * D + L * (attention + mlp + norms) + 2 * D


def shape_of(*, d_model: int, num_layers: int, vocab_size: int) -> Shape:
    """Return the shape of this width and depth, by the rules for heads and d_ff.

    Raises:
      ValueError: the width is none that the rules allow.
    """
    if not _is_width(d_model):
        near = sorted(_widths(), key=lambda width: abs(width - d_model))[:2]
        raise ValueError(
            f"a width of {d_model:,} is not possible: it must be a multiple of {_LANES // 2} below {_NARROW} and of "
            f"{_LANES} from there to {_MAX_WIDTH:,}, with heads a multiple of {_HEAD_DIM_MULTIPLE} wide; the nearest: "
            + ", ".join(f"{width:,}" for width in sorted(near))
        )
    return Shape(
        vocab_size=vocab_size,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=_num_heads(d_model),
        d_ff=8 * d_model // 6 * 2,
    )


def shape_for(num_parameters: int, *, vocab_size: int) -> Shape:
    """Return the shape of about so many parameters; its width and depth are the rules'.

    Raises:
      ValueError: none in proportion has so many within a tenth; names the nearest.
    """
    shapes = []
    for d_model in _widths():
        one = shape_of(d_model=d_model, num_layers=1, vocab_size=vocab_size)
        if shapes and one.num_parameters > 2 * num_parameters:
            break
        shapes += _depths(one, num_parameters, ratio=_ASPECT_RATIO)
    return _best(shapes, num_parameters)


def shape_of_width(num_parameters: int, *, vocab_size: int, d_model: int) -> Shape:
    """Return the shape of this width and of about so many parameters, however deep or shallow it is.

    Raises:
      ValueError: as `shape_of`, or no depth gives so many within a tenth; names the nearest.
    """
    one = shape_of(d_model=d_model, num_layers=1, vocab_size=vocab_size)
    return _best(_depths(one, num_parameters, ratio=math.inf), num_parameters)


def tokens_per_step_for(num_tokens: int) -> float:
    """Return the batch, in tokens, that a run of so many tokens wants, before it is rounded to sequences."""
    power_law = BTLM_TOKENS_PER_STEP * (num_tokens / BTLM_TOKENS) ** BATCH_EXPONENT
    return min(power_law, num_tokens / MIN_STEPS)


def longest_for(num_tokens: int) -> int:
    """Return the length of the last phase's sequences of a run of so many tokens."""
    wanted = 16 * math.sqrt(max(tokens_per_step_for(num_tokens), 1.0))
    return min(LONGEST, max(SHORTEST, 2 ** round(math.log2(wanted))))


def curriculum_for(num_tokens: int, *, longest: int) -> CurriculumConfig:
    """Return the two phases of a run of at most so many tokens, whose last has sequences of `longest`.

    Raises:
      ValueError: `longest` has no quarter, or the tokens are fewer than a step in each phase.
    """
    if longest < SHORTENING or longest % SHORTENING:
        raise ValueError(
            f"sequences of {longest} tokens cannot be cut in {SHORTENING} for the first phase; take a multiple of "
            f"{SHORTENING}"
        )
    sequences = _rounded(tokens_per_step_for(num_tokens) / longest)
    step = sequences * longest
    num_steps = num_tokens // step
    if num_steps < 2:
        raise ValueError(
            f"{num_tokens:,} tokens are too few: a step takes {step:,} ({sequences} x {longest:,}), and each of the "
            f"two phases needs one; give at least {2 * step:,} tokens, or shorter sequences"
        )
    first = min(max(round(FIRST_SHARE * num_steps), 1), num_steps - 1)
    return CurriculumConfig(
        seq_len=(longest // SHORTENING, longest),
        batch_size=(SHORTENING * sequences, sequences),
        num_tokens=(first * step, (num_steps - first) * step),
    )


def warmup_tokens_for(curriculum: CurriculumConfig) -> int:
    """Return the tokens of the warm-up: whole steps, at least one."""
    step, total = curriculum.table.tokens_per_step, curriculum.table.num_tokens
    return max(1, int(min(WARMUP_TOKENS, total / 10) / step)) * step


def peak_learning_rate_for(tokens_per_step: int) -> float:
    """Return the peak learning rate of classes with multiplier 1."""
    return SMALL_PEAK if tokens_per_step < SMALL_BATCH else PEAK


def tau_for(tokens_per_parameter: float) -> float:
    """Return the best memory of AdamW, as a share of the steps (arXiv 2505.13738)."""
    return TAU_AT_20 * (tokens_per_parameter / 20) ** TAU_EXPONENT


def decay_rate_of(config: TrainConfig) -> float:
    """Return eta': what a step at the peak multiplies the weight decay of query, key and value matrices by.

    It is their learning rate with the coupled convention, and the peak rate with the independent one.
    """
    optimizer = config.optimizer
    if config.is_decay_independent:
        return optimizer.peak_learning_rate
    if optimizer.hidden_optimizer == "muon":
        return optimizer.muon_learning_rate
    return optimizer.peak_learning_rate / make_parametrization(config.mup, config.model).width


def weight_decay_of(config: TrainConfig) -> float:
    """Return the weight decay for which AdamW's memory of those matrices, 1 / (eta' decay S), is `tau_for`'s."""
    table = config.curriculum.table
    return 1 / (decay_rate_of(config) * tau_for(table.num_tokens / count_parameters(config.model)) * table.num_steps)


def with_decay_by_tau(config: TrainConfig) -> TrainConfig:
    """Return a config with `weight_decay_of`'s decay, to three digits."""
    decay = _digits(weight_decay_of(config), 3)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=decay))


def eps_for(num_parameters: int) -> float:
    """Return AdamW's epsilon: BTLM's up to 10 B parameters, from there the 1e-9 of Jais-13B."""
    return 1e-8 if num_parameters < 10e9 else 1e-9


def make_config(choices: Choices) -> TrainConfig:
    """Return the config that the rules make of the choices.

    Raises:
      ValueError: as `curriculum_for`, or mesh.accumulation does not divide the batches.
    """
    shape, curriculum = choices.shape, curriculum_for(choices.num_tokens, longest=choices.longest)
    table = curriculum.table
    peak = peak_learning_rate_for(table.tokens_per_step)
    config = TrainConfig(
        seed=1,
        model=ModelConfig(
            vocab_size=shape.vocab_size,
            num_layers=shape.num_layers,
            d_model=shape.d_model,
            num_heads=shape.num_heads,
            d_ff=shape.d_ff,
            layer_norm_eps=1e-5,
            qk_norm="none",
            alibi_scaling=1.0,
            dtype=choices.dtype,
            attention="auto",
            remat=choices.remat,
            loss_chunk=min(512, curriculum.seq_len[0]),
        ),
        mup=MupConfig(
            preset="btlm",
            base_d_model=float(BASE_WIDTH),
            base_d_ff=shape.d_ff * BASE_WIDTH / shape.d_model,
            base_num_layers=shape.num_layers,
            init_std=0.073,
            embedding_multiplier=14.6,
            output_multiplier=2.22,
        ),
        curriculum=curriculum,
        optimizer=OptimizerConfig(
            schedule="linear",
            peak_learning_rate=peak,
            end_learning_rate=_digits(peak * END_SHARE, 5),
            initial_learning_rate=0.0,
            warmup_tokens=warmup_tokens_for(curriculum),
            decay_share=0.2,
            schedule_begin=0,
            schedule_tokens=0,
            beta1=0.9,
            beta2=0.95,
            eps=eps_for(shape.num_parameters),
            weight_decay=0.1,
            weight_decay_convention="preset",
            z_loss=0.0,
            clip_norm=1.0,
            hidden_optimizer="adamw",
            muon_learning_rate=0.02,
            average="none",
            average_share=0.1,
            freeze="",
        ),
        mesh=choices.mesh,
        data=DataConfig(
            store=choices.store,
            seed=1,
            weights="",
            max_epochs=choices.max_epochs,
            prefetch=4,
            document_mask=False,
        ),
        corpus=CorpusConfig(
            source=PREPARED,
            max_bytes=2_570_000_000_000,
            heldout_fraction=0.0017,
            heldout_bytes_per_source=300_000_000,
        ),
        evaluation=EvaluationConfig(
            every_steps=min(2000, max(1, table.num_steps // 20)),
            blocks_per_source=64,
            batch_size=max(1, curriculum.batch_size[-1] // choices.mesh.accumulation),
        ),
        checkpoint=CheckpointConfig(
            every_steps=min(200, max(1, table.num_steps // 10)), keep_last=3, keep_every=10_000, keep_hours=0.0
        ),
        bad_numbers=BadNumbersConfig(
            spike_score=30.0, max_skips=8, max_rollbacks=3, compare_every=0, recompute_every=0
        ),
        log=LogConfig(
            every_steps=10 if table.num_steps >= 1000 else 1,
            sample_prompt="The key to training a language model is",
            sample_tokens=128,
            trackers="",
            reference="",
            profile_steps="",
        ),
    )
    return with_decay_by_tau(config) if choices.weight_decay == TAU else config


def _num_heads(d_model: int) -> int:
    return max(_MIN_HEADS, 2 ** math.ceil(math.log2(d_model / _HEAD_DIM)))


def _is_width(d_model: int) -> bool:
    lanes = _LANES // 2 if d_model < _NARROW else _LANES
    return 0 < d_model <= _MAX_WIDTH and d_model % math.lcm(lanes, _num_heads(d_model) * _HEAD_DIM_MULTIPLE) == 0


def _widths() -> Iterator[int]:
    """Yield the possible widths, ascending."""
    return filter(_is_width, range(_LANES // 2, _MAX_WIDTH + 1, _LANES // 2))


def _depths(one: Shape, num_parameters: int, *, ratio: float) -> list[Shape]:
    """Return the shapes of a width with about so many parameters, or else the nearest in proportion.

    `one` has one layer; d_model / num_layers is to be within a factor of `ratio` of ASPECT.
    """
    layer = count_parameters(dataclasses.replace(one, num_layers=2)) - one.num_parameters
    usual = one.d_model / ASPECT
    least, most = max(1, math.ceil(usual / ratio)), int(min(_MAX_LAYERS, max(1, usual * ratio)))

    def depth(parameters: float) -> int:
        return min(max(1 + math.floor((parameters - one.num_parameters) / layer), least), most)

    most_off = 1 + max(_TOLERANCES)
    depths = range(depth(num_parameters / most_off), depth(num_parameters * most_off) + 1)
    return [dataclasses.replace(one, num_layers=number) for number in depths]


def _best(shapes: list[Shape], num_parameters: int) -> Shape:
    """Return the shape that is nearest to so many parameters and to ASPECT.

    Raises:
      ValueError: none has so many within the tolerance.
    """

    def error(shape: Shape) -> float:
        return abs(math.log(shape.num_parameters / num_parameters))

    def distance(shape: Shape) -> float:
        return 2 * error(shape) + abs(math.log(shape.d_model / shape.num_layers / ASPECT))

    for tolerance in _TOLERANCES:
        if near := [shape for shape in shapes if error(shape) <= math.log1p(tolerance)]:
            return min(near, key=distance)
    closest = min(shapes, key=error)
    embedding = closest.vocab_size * closest.d_model
    raise ValueError(
        f"no network in proportion has {num_parameters:,} parameters with a vocabulary of {closest.vocab_size:,} ids: "
        f"the nearest, {closest.num_layers} layers {closest.d_model:,} wide, has {closest.num_parameters:,}, of which "
        f"{embedding:,} are the embedding; ask for that many, or for another vocabulary"
    )


def _rounded(number: float) -> int:
    """Return the nearest number of sequences that many meshes divide; at least 1."""
    whole = [odd * 2**power for odd in _ODD_PARTS for power in range(40)]
    allowed = [count for count in whole if count <= _DIVISIBLE_FROM or count % 8 == 0]
    return min(allowed, key=lambda count: abs(math.log(count / max(number, 1))))


def _digits(number: float, count: int) -> float:
    return float(f"{number:.{count}g}")
