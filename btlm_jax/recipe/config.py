"""Frozen, typed configs, made strictly from a config file's ConfigDict; validated at birth.

Defaults live in the files under configs/ and nowhere else. A key the code does not know, a missing key and a
value of the wrong type are errors here, before anything is built. Nothing here touches JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping

from btlm_jax.recipe.curriculum import Curriculum, Phase, make_curriculum

PRESETS = ("btlm", "sp", "completep")
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "reference", "blockwise", "chunked", "cpu", "tpu", "splash", "gpu")
QK_NORMS = ("none", "rms", "rms_gain")
REMATS = ("full", "attention_saved", "out_recomputed", "matmuls_saved", "none")  # the first keeps the least
PREPARED = "prepared"
SCHEDULES = ("linear", "cosine", "constant", "wsd")
HIDDEN_OPTIMIZERS = ("adamw", "muon")
AVERAGES = ("none", "ema", "last")
WEIGHT_DECAY_CONVENTIONS = ("preset", "coupled", "independent")
AUTO = "auto"  # a weight decay that TrainConfig.with_numbers computes
CORPUS_SOURCES = ("prepared", "installed_python")
TRACKERS = ("wandb", "mlflow")
MAX_PROFILE_STEPS = 100  # what is traced of them is held in memory until it is written


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name}={value!r} is not known; allowed are {', '.join(allowed)}")


def _require_positive(prefix: str, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{prefix}.{name}={value} must be positive")


def _require_size(prefix: str, **values: int) -> None:
    for name, value in values.items():
        _require(
            0 < value < 2**31,
            f"{prefix}.{name}={value:,} must be positive and below 2**31, as ids, sizes and steps are",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and numerics of the network; axis letters: L layers, D d_model, N heads, F d_ff, V vocab."""

    vocab_size: int  # V, at least the number of ids of the token store's tokenizer
    num_layers: int  # L
    d_model: int  # D
    num_heads: int  # N; each head has d_model / num_heads dims
    d_ff: int  # F, width of the SwiGLU layer
    layer_norm_eps: float  # added to the variance of every LayerNorm
    qk_norm: str  # norm of each head's queries and keys: see model/qk_norm.py
    alibi_scaling: float  # ALiBi slopes are divided by this; 1.0 as trained, > 1 interpolates positions
    dtype: str  # of activations and matmuls; parameters, softmax, norms' statistics and the loss are float32
    attention: str  # implementation of attention; "auto" takes the fastest for the devices: see attention/__init__.py
    remat: str  # what the backward pass keeps of each block: see model/transformer.py
    loss_chunk: int  # positions of each sequence whose logits exist at one time

    def __post_init__(self):
        _require_size(
            "model", vocab_size=self.vocab_size, num_layers=self.num_layers, d_model=self.d_model,
            num_heads=self.num_heads, d_ff=self.d_ff, loss_chunk=self.loss_chunk,
        )  # fmt: skip
        _require_positive("model", layer_norm_eps=self.layer_norm_eps)
        _require(
            self.d_model % self.num_heads == 0,
            f"model.d_model={self.d_model} is not divisible by model.num_heads={self.num_heads}",
        )
        _require(self.alibi_scaling >= 1, f"model.alibi_scaling={self.alibi_scaling} must be at least 1")
        _require_choice("model.qk_norm", self.qk_norm, QK_NORMS)
        _require_choice("model.dtype", self.dtype, DTYPES)
        _require_choice("model.attention", self.attention, ATTENTIONS)
        _require_choice("model.remat", self.remat, REMATS)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class MupConfig:
    """Parametrization: the preset and the values tuned on the base (proxy) model. Meaning in mup.py."""

    preset: str  # parametrization: see mup.py
    base_d_model: float  # d_model of the model whose values were tuned: widths are relative to it
    base_d_ff: float  # not always whole: BTLM's is 682.6, which makes its 6826 ten times as wide
    base_num_layers: int  # read by completep only
    init_std: float  # standard deviation of initial weights at the base width
    embedding_multiplier: float  # factor on the looked-up embeddings
    output_multiplier: float  # factor on the logits, before division by d_model / base_d_model

    def __post_init__(self):
        _require_choice("mup.preset", self.preset, PRESETS)
        _require_positive(
            "mup", base_d_model=self.base_d_model, base_d_ff=self.base_d_ff, base_num_layers=self.base_num_layers,
            init_std=self.init_std, embedding_multiplier=self.embedding_multiplier,
            output_multiplier=self.output_multiplier,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """The phase table, one tuple entry a phase; `table` is its meaning."""

    seq_len: tuple[int, ...]  # T of each phase; every one divides the longest
    batch_size: tuple[int, ...]  # global, in sequences; seq_len x batch_size is the same in every phase
    num_tokens: tuple[int, ...]  # of each phase, a whole number of steps

    def __post_init__(self):
        _ = self.table

    @property
    def table(self) -> Curriculum:
        return make_curriculum(seq_len=self.seq_len, batch_size=self.batch_size, num_tokens=self.num_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and the schedule of its learning rate, counted in tokens: see optimizer.py."""

    schedule: str  # what follows the warm-up: "wsd" stays at the peak, then decays; "constant" does not decay
    peak_learning_rate: float  # reached after warmup_tokens, for classes with multiplier 1
    end_learning_rate: float  # of the schedule's last step; "constant" has none
    initial_learning_rate: float  # where the warm-up begins: 0, or where an extended run stands
    warmup_tokens: int  # tokens of the linear warm-up
    decay_share: float  # of the schedule's tokens, the last, in which "wsd" decays
    schedule_begin: int  # tokens seen where the schedule begins: 0, or where an extended run stands
    schedule_tokens: int  # its length, after which the rate stays as it is; 0: up to the curriculum's end
    beta1: float  # decay of AdamW's first moment
    beta2: float  # decay of AdamW's second moment
    eps: float  # AdamW's epsilon, outside the bias-corrected root
    weight_decay: float | str  # decoupled, times the learning rate; "auto": by a power law, see recipe/sizes.py
    weight_decay_convention: str  # how decay scales with width; "preset": mup.preset's; see recipe/mup.py
    z_loss: float  # times log(Z)^2 of each position, added to what is differentiated; 0: none, 1e-4 is usual
    clip_norm: float  # largest global norm of the gradients
    hidden_optimizer: str  # of the hidden matrices; all else has AdamW: see recipe/muon.py
    muon_learning_rate: float  # of "muon", at the peak: the same at every width
    average: str  # of the weights, kept beside them, for evaluation and export: see recipe/averaging.py
    average_share: float  # of the run's steps: after so many "ema" halves a weight, so many at the end "last" takes
    freeze: str  # parameters that stay as they are: classes, paths or patterns, as embedding,ln_*; empty: none

    def __post_init__(self):
        _require_positive(
            "optimizer", peak_learning_rate=self.peak_learning_rate, eps=self.eps, clip_norm=self.clip_norm,
            muon_learning_rate=self.muon_learning_rate,
        )  # fmt: skip
        _require_choice("optimizer.hidden_optimizer", self.hidden_optimizer, HIDDEN_OPTIMIZERS)
        _require_choice("optimizer.schedule", self.schedule, SCHEDULES)
        _require_choice("optimizer.average", self.average, AVERAGES)
        _require(
            0 < self.average_share <= 1, f"optimizer.average_share={self.average_share} must be above 0 and at most 1"
        )
        _require(0 < self.decay_share <= 1, f"optimizer.decay_share={self.decay_share} must be above 0 and at most 1")
        _require_choice("optimizer.weight_decay_convention", self.weight_decay_convention, WEIGHT_DECAY_CONVENTIONS)
        _require(
            self.weight_decay == AUTO or float(self.weight_decay) >= 0,
            f"optimizer.weight_decay={self.weight_decay} must not be negative, or {AUTO!r}",
        )
        _require(
            self.hidden_optimizer == "adamw" or self.weight_decay != AUTO,
            f"optimizer.weight_decay={AUTO} is a law of AdamW; with optimizer.hidden_optimizer=muon give a number",
        )
        for name in (
            "end_learning_rate", "initial_learning_rate", "warmup_tokens", "schedule_begin", "schedule_tokens",
            "z_loss",
        ):  # fmt: skip
            _require(getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        _require(
            not self.freeze or all(self.frozen_patterns),
            f"optimizer.freeze={self.freeze!r} has a part that is empty; give patterns with a comma between them",
        )

    @property
    def frozen_patterns(self) -> tuple[str, ...]:
        """The patterns of `freeze`; see model/parameters.py."""
        return tuple(part.strip() for part in self.freeze.split(",")) if self.freeze else ()

    @property
    def decay(self) -> float:
        """The weight decay of a config that TrainConfig.with_numbers has returned."""
        assert not isinstance(self.weight_decay, str), "a weight decay has no number yet: TrainConfig.with_numbers"
        return self.weight_decay

    def schedule_length(self, total_tokens: int) -> int:
        """Return the tokens of the schedule in a run of `total_tokens`."""
        return self.schedule_tokens or total_tokens - self.schedule_begin

    def decay_tokens(self, total_tokens: int) -> int:
        """Return the tokens in which "wsd" decays."""
        return round(self.decay_share * self.schedule_length(total_tokens))

    def check_fits(self, total_tokens: int) -> None:
        """Check the schedule against a run of `total_tokens`.

        Raises:
          ValueError: it begins after the run's end, or its parts are longer than it is.
        """
        _require(
            self.schedule_begin < total_tokens,
            f"optimizer.schedule_begin={self.schedule_begin:,} is not before the run's end at {total_tokens:,} tokens",
        )
        length = self.schedule_length(total_tokens)
        whose = "schedule" if self.schedule_begin or self.schedule_tokens else "run"
        _require(
            self.warmup_tokens <= length,
            f"optimizer.warmup_tokens={self.warmup_tokens:,} is more than the {whose}'s {length:,}",
        )
        decay = self.decay_tokens(total_tokens)
        _require(
            self.schedule != "wsd" or self.warmup_tokens + decay <= length,
            f"optimizer.warmup_tokens={self.warmup_tokens:,} and the {decay:,} tokens of "
            f"optimizer.decay_share={self.decay_share} are more than the {whose}'s {length:,}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices and the step are divided. The fsdp axis takes the devices that the others leave."""

    tensor: int  # ways that heads and d_ff are split
    context: int  # ways that a sequence's positions are split, at most: a phase with sequences enough splits those
    accumulation: int  # micro-batches a step
    gradient_dtype: str = "float32"  # in which devices sum gradients of matrices; bfloat16 halves what is exchanged

    def __post_init__(self):
        _require_positive("mesh", tensor=self.tensor, context=self.context, accumulation=self.accumulation)
        _require_choice("mesh.gradient_dtype", self.gradient_dtype, DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Reading: which token store, in which order, how far ahead."""

    store: str  # directory, taken from the workdir if relative, or a URL that fsspec opens: gs://bucket/store
    seed: int  # of the order of blocks and windows, and of an installed_python corpus
    weights: str  # shares of the sources, "web=3,books=1", or such a text a phase, "natural; web=1,books=1"; "": none
    max_epochs: int  # passes over the store, or over each weighted source, that the curriculum may take
    prefetch: int  # batches read ahead of the step
    document_mask: bool  # attention and loss stop at documents' boundaries; off as BTLM was trained

    def __post_init__(self):
        _require(bool(self.store), "data.store is empty; give the directory of a token store")
        _require_positive("data", max_epochs=self.max_epochs, prefetch=self.prefetch)
        _ = self.weights_by_phase

    @property
    def weights_by_phase(self) -> tuple[dict[str, int], ...]:
        """Return the sources' weights, those of all phases or of each; nothing without weights."""
        if not self.weights:
            return ()
        from btlm_jax.recipe.mixture import parse_weights  # runs without weights load none of it

        return parse_weights(self.weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Making the store when data.store does not exist; "prepared" means that it must exist."""

    source: str  # "prepared", or "installed_python": documentation of the installed packages
    max_bytes: int  # UTF-8 bytes of documents taken, after deduplication
    heldout_fraction: float  # of documents, by hash
    heldout_bytes_per_source: int  # cap on the held-out text of each source

    def __post_init__(self):
        _require_choice("corpus.source", self.source, CORPUS_SOURCES)
        _require_positive("corpus", max_bytes=self.max_bytes, heldout_bytes_per_source=self.heldout_bytes_per_source)
        _require(
            0 < self.heldout_fraction < 1,
            f"corpus.heldout_fraction={self.heldout_fraction} must be between 0 and 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss: every so many steps on a few blocks of each source, at the end on all of them."""

    every_steps: int  # steps between evaluations during training
    blocks_per_source: int  # blocks of each source in those evaluations
    batch_size: int  # sequences of the store's block length

    def __post_init__(self):
        _require_positive(
            "evaluation", every_steps=self.every_steps, blocks_per_source=self.blocks_per_source,
            batch_size=self.batch_size,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a checkpoint is written and which are kept."""

    every_steps: int  # steps between checkpoints
    keep_last: int  # newest checkpoints that are kept
    keep_every: int  # steps; checkpoints at its multiples are never deleted
    keep_hours: float  # hours; of the checkpoints one in so many is never deleted; 0: none for its age

    def __post_init__(self):
        _require_positive(
            "checkpoint", every_steps=self.every_steps, keep_last=self.keep_last, keep_every=self.keep_every
        )
        _require(self.keep_hours >= 0, f"checkpoint.keep_hours={self.keep_hours} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadNumbersConfig:
    """What is done about a step whose loss, gradient or update is not finite or far above those before it."""

    spike_score: float  # robust deviations above the median at which a step is skipped; 0: only if it is not finite
    max_skips: int  # steps skipped in a row, after which the run goes back to a checkpoint and passes over the steps
    max_rollbacks: int  # of a run, after which it stops
    compare_every: int  # steps after which all devices' copies of the state are compared, as before a save; 0: never
    recompute_every: int  # steps of which one is computed twice, and all bits compared; 0: none

    def __post_init__(self):
        _require_size("bad_numbers", max_skips=self.max_skips)
        for name in ("spike_score", "max_rollbacks", "compare_every", "recompute_every"):
            _require(getattr(self, name) >= 0, f"bad_numbers.{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """Which updates of a phase are not made: see `judge` of train/step.py."""

    spike_score: float
    max_skips: int
    first_step: int  # of the phase
    watched_from: int  # steps complete before spikes are looked for: the warm-up


TAKE_FINITE = UpdateRule(spike_score=0.0, max_skips=2**30, first_step=0, watched_from=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often metrics are written and where else, what is traced, and what is printed at the end."""

    every_steps: int  # steps between lines of metrics on the console and in TensorBoard
    sample_prompt: str  # continued at the end of the run
    sample_tokens: int  # length of that continuation
    trackers: str  # services that get the numbers too, as wandb,mlflow; empty for none
    reference: str  # workdir of a finished smaller run whose loss curve this one's is compared with; empty for none
    profile_steps: str  # as 100:105, both included: steps whose work on the devices is traced; empty for none

    def __post_init__(self):
        _require_positive("log", every_steps=self.every_steps, sample_tokens=self.sample_tokens)
        _require(
            not any("\ud800" <= c <= "\udfff" for c in self.sample_prompt),
            "log.sample_prompt is not valid Unicode: it has half of a surrogate pair",
        )
        names = self.tracker_names
        _require(
            set(names) <= set(TRACKERS) and len(set(names)) == len(names),
            f"log.trackers={self.trackers!r} must name each of {', '.join(TRACKERS)} at most once, separated by commas",
        )
        _ = self.profile_window

    @property
    def tracker_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.trackers.split(",")) if self.trackers else ()

    @property
    def profile_window(self) -> range:
        """The steps to be traced; the first step is 1."""
        if not self.profile_steps:
            return range(0)
        form = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.profile_steps, flags=re.ASCII)
        first, last = map(int, form.groups()) if form else (0, 0)
        _require(
            0 < first <= last < first + MAX_PROFILE_STEPS,
            f"log.profile_steps={self.profile_steps!r} must be FIRST:LAST, such as 100:105 for six steps, FIRST at "
            f"least 1, at most {MAX_PROFILE_STEPS} steps in all",
        )
        return range(first, last + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    seed: int  # of the initial parameters
    model: ModelConfig
    mup: MupConfig
    curriculum: CurriculumConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    data: DataConfig
    corpus: CorpusConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    bad_numbers: BadNumbersConfig
    log: LogConfig

    def __post_init__(self):
        _require(-(2**31) <= self.seed < 2**32, f"seed={self.seed} must be a number of 32 bits")
        table = self.curriculum.table
        self.optimizer.check_fits(table.num_tokens)
        for phase in table.phases:
            _require(
                phase.batch_size % self.mesh.accumulation == 0,
                f"curriculum.batch_size={phase.batch_size} of phase {phase.index + 1} is not divisible by "
                f"mesh.accumulation={self.mesh.accumulation}",
            )
        given, phases = len(self.data.weights_by_phase), len(table.phases)
        _require(
            given in (0, 1, phases), f"data.weights has {given} phases, curriculum has {phases}; give 1 or {phases}"
        )
        _require(
            not given or self.corpus.source == PREPARED,
            f"data.weights needs a store that btlm corpus tokenize --by_source made, and corpus.source=prepared; "
            f"{self.corpus.source} makes one without a stream for each source",
        )
        window = self.log.profile_window
        _require(
            not window or window[-1] <= table.num_steps,
            f"log.profile_steps={self.log.profile_steps} is not in the run, which has steps 1 to {table.num_steps:,}",
        )

    def update_rule(self, phase: Phase) -> UpdateRule:
        """Return which updates of a phase are not made; a warm-up longer than the run ends with it."""
        warmup_end = self.optimizer.schedule_begin + self.optimizer.warmup_tokens
        return UpdateRule(
            spike_score=self.bad_numbers.spike_score,
            max_skips=self.bad_numbers.max_skips,
            first_step=phase.first_step,
            watched_from=min(-(-warmup_end // phase.tokens_per_step), self.curriculum.table.num_steps),
        )

    @property
    def is_decay_independent(self) -> bool:
        """Whether a step's weight decay of a hidden matrix is the same at every width: see recipe/mup.py."""
        convention = self.optimizer.weight_decay_convention
        return convention == "independent" or (convention == "preset" and self.mup.preset == "completep")

    def with_numbers(self) -> TrainConfig:
        """Return the config with the number that a weight decay of "auto" stands for."""
        if self.optimizer.weight_decay != AUTO:
            return self
        from btlm_jax.recipe.sizes import weight_decay_of  # other runs load none of it

        return dataclasses.replace(
            self, optimizer=dataclasses.replace(self.optimizer, weight_decay=weight_decay_of(self))
        )

    def to_json(self) -> str:
        """Return the config as sorted, indented JSON; `train_config_from` reads it back to an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)


# Keys that a config did not have at first, for configs that were stored as JSON: with what they would have been then,
# or, of what does not decide what is trained on good numbers, the values of configs/.
LATER_KEYS = {
    "model": {"qk_norm": "none"},
    "mesh": {"context": 1, "gradient_dtype": "float32"},
    "data": {"document_mask": False, "weights": ""},
    "optimizer": {
        "schedule": "linear",
        "initial_learning_rate": 0.0,
        "decay_share": 0.2,
        "schedule_begin": 0,
        "schedule_tokens": 0,
        "freeze": "",
        "weight_decay_convention": "preset",
        "z_loss": 0.0,
        "hidden_optimizer": "adamw",
        "muon_learning_rate": 0.02,
        "average": "none",
        "average_share": 0.1,
    },
    "checkpoint": {"keep_hours": 0.0},
    "bad_numbers": {
        "spike_score": 30.0,
        "max_skips": 8,
        "max_rollbacks": 3,
        "compare_every": 0,
        "recompute_every": 0,
    },
    "log": {"trackers": "", "reference": "", "profile_steps": ""},
}


def with_later_keys(config: typing.Any) -> typing.Any:
    """Return a stored config with the keys that it is too old to have."""
    if not isinstance(config, dict):
        return config
    config = {"bad_numbers": {}, **config}
    return {
        name: {**LATER_KEYS.get(name, {}), **section} if isinstance(section, dict) else section
        for name, section in config.items()
    }


def train_config_from(mapping: Mapping) -> TrainConfig:
    """Make a TrainConfig from a plain mapping: a config file's `ConfigDict.to_dict()`, or parsed JSON.

    Raises:
      ValueError: an unknown or missing key, a wrong type, or a value that a config refuses.
    """
    return config_from(TrainConfig, mapping, path="config")


def config_from(cls: type, mapping: Mapping, *, path: str):
    """Make one of the configs above, or another dataclass, from a plain mapping; `path` is what errors call it.

    Raises:
      ValueError: as `train_config_from`.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{path} must be a table of keys, got {_shown(mapping)}")
    hints = _type_hints(cls)
    for key in mapping:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(hints)}"
            raise ValueError(f"unknown config key {path}.{key}{hint}")
    for key in hints:
        if key not in mapping:
            raise ValueError(f"config key {path}.{key} is missing")
    return cls(**{key: _convert(hint, mapping[key], path=f"{path}.{key}") for key, hint in hints.items()})


def check_section(name: str, values: Mapping) -> None:
    """Check the values of one section of a TrainConfig by themselves.

    Raises:
      ValueError: as `train_config_from`.
    """
    config_from(_type_hints(TrainConfig)[name], values, path=name)


_type_hints = functools.cache(typing.get_type_hints)


_MOST = 10**40  # whole numbers end below it


def _convert(hint, value, *, path: str):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint == float | str:
        if isinstance(value, str) and value != AUTO:
            raise ValueError(f"{path}={_shown(value)} must be a number or {AUTO!r}")
        return value if value == AUTO else _convert(float, value, path=path)
    if origin is types.UnionType and value is None:
        return None
    if origin is types.UnionType:
        return _convert(arguments[0], value, path=path)  # X | None
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return config_from(hint, value, path=path)
    if hint == tuple[int, ...]:
        if not isinstance(value, (tuple, list)) or not all(type(item) is int for item in value):
            raise ValueError(f"{path}={_shown(value)} must be a tuple of whole numbers, for example (2048, 8192)")
        return tuple(value)
    if origin is tuple:
        _require(isinstance(value, (tuple, list)), f"{path}={_shown(value)} must be a list")
        return tuple(_convert(arguments[0], item, path=f"{path}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, Mapping), f"{path} must be a table of keys, got {_shown(value)}")
        return {key: _convert(arguments[1], item, path=f"{path}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}={_shown(value)} must be of type {hint.__name__}, not {type(value).__name__}")
    if hint is int and abs(value) >= _MOST:
        raise ValueError(f"{path}={_shown(value)} is too large")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{path}={value} must be a finite number")
    return value


def _shown(value) -> str:
    """Return the beginning of a value's repr; of an integer too long for decimal digits, its size."""
    if type(value) is int and abs(value) >= _MOST:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_BOOLEANS = {"true": True, "false": False, "True": True, "False": False}


def value_from_text(key: str, text: str) -> object:
    """Return the value of a key of the config, as section.key, that a text of a command line stands for.

    Raises:
      ValueError: there is no such key, or the text is no value of its type.
    """
    hints = config_types()
    if key not in hints:
        raise ValueError(_unknown_key(key, hints))
    hint, shown = hints[key], f"--config.{key}={text[:80]}"
    if hint is str or (hint == float | str and text == AUTO):
        return text
    if hint is int:
        return whole_number(f"--config.{key}", text)
    if hint == float | str:
        try:
            return finite_number(f"--config.{key}", text)
        except ValueError as error:
            raise ValueError(f"{error}, or {AUTO!r}") from None
    if hint is float:
        return finite_number(f"--config.{key}", text)
    if hint is bool:
        _require_choice(f"--config.{key}", text, tuple(_BOOLEANS))
        return _BOOLEANS[text]
    assert hint == tuple[int, ...], f"{key} is of a type that is not read here"
    inner = text.strip()
    if (inner[:1], inner[-1:]) in (("(", ")"), ("[", "]")):
        inner = inner[1:-1]
    parts = [part.strip() for part in inner.split(",")]
    if parts[-1] == "":  # "(8,)"
        parts.pop()
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise ValueError(f"{shown} must be whole numbers, for example --config.{key}=2048,8192") from None


def whole_number(name: str, text: str) -> int:
    """Return the whole number that a text is; `name` is what errors call it.

    Raises:
      ValueError: it is none, or has more than 63 bits.
    """
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name}={text[:80]} must be a whole number") from None
    _require(abs(value) < 2**63, f"{name}={text[:80]} is too large for a whole number of 64 bits")
    return value


def finite_number(name: str, text: str) -> float:
    """Return the number that a text is; `name` is what errors call it.

    Raises:
      ValueError: it is none, or not finite.
    """
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name}={text[:80]} must be a number") from None
    _require(math.isfinite(value), f"{name}={text[:80]} must be a finite number")
    return value


def config_types() -> dict[str, object]:
    """Return the type of every key, as section.key."""
    found: dict[str, object] = {}
    for section, hint in _type_hints(TrainConfig).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{section}.{name}": inner for name, inner in _type_hints(hint).items()}
        else:
            found[section] = hint
    return found


def _unknown_key(key: str, hints: Mapping[str, object]) -> str:
    sections = {name.rpartition(".")[0] for name in hints} - {""}
    if key in sections:
        names = ", ".join(name for name in hints if name.startswith(f"{key}."))
        return f"--config.{key} is a section; give one of its keys: {names}"
    if "[" in key and key.partition("[")[0] in hints:
        return f"--config.{key}: give the whole tuple, for example --config.{key.partition('[')[0]}=2048,8192"
    near = nearest_keys(key, list(hints))
    hint = f"did you mean {' or '.join(near)}?" if near else "btlm train --help=config lists all"
    return f"unknown config key {key}; {hint}"


def nearest_keys(given: str, keys: list[str]) -> list[str]:
    """Return the keys that were probably meant, at most three: spelled alike, abbreviated, or of another section."""
    section, _, name = given.rpartition(".")
    own = [key for key in keys if section and key.startswith(f"{section}.")]
    for candidates in (own, keys):
        names = {key: key.rpartition(".")[2] for key in candidates}
        alike = difflib.get_close_matches(name, list(names.values()), n=2, cutoff=0.75)
        for found in (
            [key for key in candidates if names[key] == name],
            [key for key in candidates if names[key] in alike],
            [key for key in candidates if _is_short_for(name, names[key])],
        ):
            if found:
                return found[:3]
    return difflib.get_close_matches(given, keys, n=1)


def _is_short_for(short: str, name: str) -> bool:
    """Return whether `short` is some words of a name, or the initials of some that end it: lr, layers."""
    words = name.split("_")
    initials = "".join(word[0] for word in words)
    return set(short.split("_")) <= set(words) or (len(short) > 1 and initials.endswith(short))


def check_divisible(config: TrainConfig, *, num_devices: int, slices: int = 1) -> None:
    """Check that the config's mesh on so many devices, of all slices, divides every size that it splits.

    Raises:
      ValueError: it does not; names each size, its divisor, and the nearest sizes that would do.
    """
    if problems := divisibility_problems(config, num_devices=num_devices, slices=slices):
        layout = f"on {num_devices} devices as {describe_mesh(config.mesh, num_devices=num_devices, slices=slices)}"
        raise ValueError(f"the config does not divide {layout}:\n  " + "\n  ".join(problems))


def describe_mesh(mesh: MeshConfig, *, num_devices: int, slices: int = 1) -> str:
    """Return the axes of a config's mesh on so many devices, for example "fsdp 32 x context 8 x tensor 1"."""
    outside = f"slice {slices} x " if slices > 1 else ""
    fsdp = num_devices // (mesh.tensor * mesh.context * slices)
    return f"{outside}fsdp {fsdp} x context {mesh.context} x tensor {mesh.tensor}"


def divisibility_problems(config: TrainConfig, *, num_devices: int, slices: int = 1) -> list[str]:
    """Return, for each size that the mesh on so many devices does not divide, a line with the nearest that it does."""
    mesh = config.mesh
    if num_devices % (mesh.tensor * mesh.context * slices):
        ways = f"mesh.tensor={mesh.tensor} x mesh.context={mesh.context}" + (f" x {slices} slices" * (slices > 1))
        return [f"{ways} does not divide the {num_devices} devices"]
    fsdp = num_devices // (mesh.tensor * mesh.context * slices)
    return [
        f"{name}={size} is not divisible by {by} ({reason}); nearest: "
        + ", ".join(map(str, sorted({max(size // by * by, by), (size // by + 1) * by})))
        for name, size, by, reason in _divisions(config, fsdp=fsdp, slices=slices)
        if size % by
    ]


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _divisions(config: TrainConfig, *, fsdp: int, slices: int) -> Iterator[tuple[str, int, int, str]]:
    """Yield (name, size, divisor, what the divisor is made of) of everything that is split."""
    mesh = config.mesh
    sequences = f"mesh slice {slices} x fsdp {fsdp}" if slices > 1 else f"mesh fsdp {fsdp}"
    batch_ways = f"{sequences} x mesh.accumulation {mesh.accumulation}"
    inner, inner_ways = mesh.tensor * mesh.context, f"mesh.tensor {mesh.tensor} x mesh.context {mesh.context}"
    for phase in config.curriculum.table.phases:
        name = f"of phase {phase.index + 1}"
        yield f"curriculum.batch_size {name}", phase.batch_size, slices * fsdp * mesh.accumulation, batch_ways
        yield f"curriculum.seq_len {name}", phase.seq_len, inner, inner_ways
    yield "evaluation.batch_size", config.evaluation.batch_size, slices * fsdp, sequences
    stored_ways = f"mesh fsdp {fsdp} x mesh.tensor {mesh.tensor}"
    yield "model.d_model", config.model.d_model, fsdp * mesh.tensor, stored_ways
    yield "model.num_heads", config.model.num_heads, inner, inner_ways
