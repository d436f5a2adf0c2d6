"""Before the first step: say what the run is, check the workdir, make or open the store, compile every step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from btlm_jax import attention, notices
from btlm_jax.data.order import make_order
from btlm_jax.data.reader import TokenStore, open_store
from btlm_jax.data.store import EXAMPLES, HELDOUT, MANIFEST_FILE, MOST_DOCUMENTS, TRAIN, Manifest, StoreUse
from btlm_jax.display.progress import print_line
from btlm_jax.model import Btlm
from btlm_jax.parallel.mesh import evaluation_sharding, platform
from btlm_jax.recipe.config import (
    AUTO,
    PREPARED,
    CorpusConfig,
    CurriculumConfig,
    DataConfig,
    ModelConfig,
    MupConfig,
    OptimizerConfig,
    TrainConfig,
)
from btlm_jax.recipe.curriculum import Curriculum
from btlm_jax.recipe.mup import HIDDEN_CLASSES
from btlm_jax.recipe.optimizer import learning_rate_at, rates_of_steps, stretches_of
from btlm_jax.storage.files import write_atomically
from btlm_jax.storage.location import PathOrUrl, mirror_of, resolve_location
from btlm_jax.train import COMPILE_CACHE, STARTS
from btlm_jax.train.flops import FLOPS_CONVENTION, flops_per_token
from btlm_jax.train.heldout import make_eval_step
from btlm_jax.train.metric_writer import GoodputLedger
from btlm_jax.train.program import Program
from btlm_jax.train.step import TrainState, abstract_batch, init_state

if TYPE_CHECKING:
    from btlm_jax.data.mixed_order import MixtureUse

_MIB, _GIB, _GIGA = 2**20, 2**30, 1e9
_PROBE_BLOCKS = 32  # of a MiB, written to see how fast the storage is
_SAVE_SECONDS = 0.5  # of a checkpoint however small: its files, their names, its hashes (2 vCPU Intel Xeon, 2026-11-29)
_SPOT_SECONDS = 25.0
_SEEN_SECONDS = 60.0  # for a store that process 0 has made to be seen by another host: NFS keeps listings so long
_SUFFIXES_OF_WEIGHTS, _MODEL_FILE = (".safetensors", ".gguf", ".bin"), "model.json"


class BuildStore(Protocol):
    """Make the token store that a config describes."""

    def __call__(
        self,
        config: CorpusConfig,
        *,
        vocab_size: int,
        block_len: int,
        seed: int,
        directory: Path,
        log: Callable[[str], None],
    ) -> Manifest: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """How long a run's steps will take, as it is said before the first one."""

    said: str  # lines to print, or ""
    seconds: tuple[float, ...] = ()  # of a step of each phase; empty where none are predicted
    topology: str = ""  # what `btlm plan --measured` calls these devices, "" if it has no name for them


NO_PREDICTION = StepPrediction(said="")
PredictSteps = Callable[[Program, Sequence[jax.stages.Traced]], StepPrediction]  # of the traced step of each phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run, all fixed before the first step."""

    config: TrainConfig
    workdir: Path
    mesh: Mesh
    model: Btlm
    table: dict  # the parameters' tree of ParameterInfo
    optimizer: optax.GradientTransformationExtraArgs
    token_store: TokenStore
    train_steps: tuple[Callable, ...]  # one executable a phase
    eval_step: Callable
    learning_rates: np.ndarray  # float64, of the update that completes step 1, 2, ...; nan before schedule_begin
    ledger: GoodputLedger
    prediction: StepPrediction
    most_heldout_tokens: int | None = None  # the final loss is of so many, of each source's first blocks; None: of all

    @property
    def most_documents(self) -> int:
        """Return how many documents of a window attention keeps apart at most, 0 without data.document_mask."""
        return most_documents(self.config) if self.config.data.document_mask else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """How the state of step 0 is made, where there is no checkpoint to go on from."""

    make_state: Callable[[Run], TrainState]
    why_not_again: Callable[[], str]  # asked before a run goes back to it: why it cannot be made once more, or ""
    events: tuple[str, ...]  # what is recorded of it, and then the held-out loss before the first step is too


FROM_SEED = Beginning(
    make_state=lambda run: init_state(run.model, run.optimizer, run.mesh, seed=run.config.seed),
    why_not_again=lambda: "",
    events=(),
)


def most_documents(config: TrainConfig) -> int:
    """Return how many documents of a sequence attention keeps apart at most, on these devices."""
    model = config.model
    if platform() != "gpu" or model.attention not in (attention.AUTO, "gpu"):
        return 1 << 31
    from btlm_jax.attention.gpu import MOST_DOCUMENTS, why_no_kernel

    dtype, shortest = jax.numpy.dtype(model.dtype), min(config.curriculum.seq_len)
    has_kernel = not why_no_kernel(dtype, length=shortest, head_dim=model.head_dim, has_documents=True)
    return MOST_DOCUMENTS if has_kernel else 1 << 31


def log(message: str) -> None:
    """Print a line, in process 0 only."""
    if jax.process_index() == 0:
        print_line(message)


def weights_in(workdir: Path) -> list[str]:
    """Return the names of a model's files that lie in a workdir; a run has none there."""
    files = (path for path in workdir.glob("*.*") if path.suffix in _SUFFIXES_OF_WEIGHTS or path.name == _MODEL_FILE)
    return sorted(path.name for path in files)


def make_workdir(workdir: Path) -> None:
    """Create the workdir, and write a file to it to see that this works.

    Raises:
      OSError: it cannot be created or written; names it.
      ValueError: a model lies there, which is never trained into.
    """
    if weights := weights_in(workdir):
        raise ValueError(
            f"workdir {workdir} holds a model ({weights[0]}), and nothing is trained into that: choose another "
            f"--workdir. The model is used by btlm generate --checkpoint={workdir}"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{secrets.token_hex(8)}"  # which process this is may not be known yet
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(f"workdir {workdir} cannot be written: {error}; choose another --workdir") from error


def delete_unused(workdir: Path) -> None:
    """Delete a workdir in which there is nothing but the record of starts."""
    with contextlib.suppress(OSError):
        if {path.name for path in workdir.iterdir()} <= {STARTS}:
            shutil.rmtree(workdir / STARTS, ignore_errors=True)
            workdir.rmdir()


def predict_stop(workdir: Path, *, num_bytes: int, num_processes: int) -> str:
    """Return how long a stop between steps will take: a state of `num_bytes` written to this storage.

    Measured by writing a part of it there, as one process of `num_processes` does, each of which writes its share.

    Raises:
      OSError: nothing can be written.
    """
    block = os.urandom(_MIB)
    num_blocks = min(_PROBE_BLOCKS, -(-num_bytes // _MIB))
    probe = workdir / f".speed-{secrets.token_hex(8)}"
    began = time.monotonic()
    try:
        with open(probe, "wb") as file:
            for _ in range(num_blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"{workdir} cannot take {num_blocks} MiB, a part of a checkpoint of {num_bytes / 1e6:,.0f} MB: {error}; "
            "free some space and give the same command again"
        ) from error
    finally:
        probe.unlink(missing_ok=True)
    rate = num_blocks * _MIB / max(time.monotonic() - began, 1e-6)
    rate = 1 / (1 / rate + 1 / mirror_of(workdir).upload_rate(num_blocks * _MIB))
    seconds = _SAVE_SECONDS + num_bytes / num_processes / rate
    warning = "; a spot VM is gone after 30 s" if seconds > _SPOT_SECONDS else ""
    return (
        f"A stop (SIGTERM, Ctrl-C): the step that runs, then some {seconds:.1f} s to save {num_bytes / 1e6:,.0f} MB at "
        f"{rate / 1e6:,.0f} MB/s{' a process' * (num_processes > 1)}{warning}"
    )


def locate_store(data: DataConfig, *, workdir: Path) -> PathOrUrl:
    """Return where the run's token store is or will be; a relative `data.store` is below the workdir.

    Raises:
      ValueError: there is none, but a token store of that name relative to the current directory.
    """
    location = resolve_location(workdir, data.store)
    here = Path(os.path.expanduser(data.store))
    if isinstance(location, Path) and not location.exists() and here.exists():
        if (here / MANIFEST_FILE).is_file():
            raise ValueError(
                f"data.store={data.store} is taken from the workdir, and there is no {location}; but there is a token "
                f"store in the current directory's {data.store}: to use it give --config.data.store={here.resolve()}, "
                f"to have another in the workdir --config.data.store={location.resolve()}"
            )
        notices.report("not-the-store", f"{here.resolve()} is not taken for data.store, which is {location}")
    return location


def has_store(location: PathOrUrl) -> bool:
    """Return whether something is to be opened there; a store behind a URL is never built."""
    return not isinstance(location, Path) or (location / MANIFEST_FILE).is_file()


def open_run_store(config: TrainConfig, location: PathOrUrl, *, expected_fingerprint: str) -> TokenStore:
    """Open the token store of a run and check that it is the one that `config` describes.

    Raises:
      FileNotFoundError: a file of it is missing.
      OSError: the URL cannot be reached.
      ValueError: it does not fit the model, is not the checkpoint's, or was made with other settings.
    """
    token_store = open_store(location, expected_fingerprint=expected_fingerprint)
    manifest, vocab_size = token_store.manifest, config.model.vocab_size
    if differing := _other_settings(config, manifest):
        raise ValueError(
            f"token store {location} was made with other settings:\n  "
            + "\n  ".join(f"{key}: store {old}, config {new}" for key, old, new in differing)
            + "\nto use it as it is give --config.corpus.source=prepared; to have one made with these settings, "
            "--config.data.store=NAME with a name that is free"
        )
    if manifest.tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"token store {location} has {manifest.tokenizer.vocab_size:,} ids, but model.vocab_size={vocab_size:,}; "
            f"give --config.model.vocab_size={manifest.tokenizer.vocab_size} or more, or another store"
        )
    return token_store


def _other_settings(config: TrainConfig, manifest: Manifest) -> list[tuple[str, object, object]]:
    """Return (key, store's value, config's) of what a store has otherwise than the one that `config` would build."""
    if config.corpus.source == PREPARED:
        return []
    made = manifest.made_by.get("corpus")
    if not isinstance(made, dict) or made.get("source") != config.corpus.source:
        maker = f"btlm corpus {manifest.made_by['stage']}" if "stage" in manifest.made_by else "something else"
        return [("corpus.source", f"made by {maker}", config.corpus.source)]
    wanted = {f"corpus.{name}": value for name, value in dataclasses.asdict(config.corpus).items()}
    wanted |= {"data.seed": config.data.seed, "model.vocab_size": config.model.vocab_size}
    wanted["the longest of curriculum.seq_len"] = config.curriculum.table.block_len
    stored = {f"corpus.{name}": value for name, value in made.items()} | {"data.seed": made.get("seed")}
    stored |= {"model.vocab_size": manifest.tokenizer.vocab_size}
    stored["the longest of curriculum.seq_len"] = manifest.block_len
    return [(key, stored.get(key), value) for key, value in wanted.items() if stored.get(key) != value]


def check_curriculum(config: TrainConfig, manifest: Manifest) -> StoreUse | MixtureUse:
    """Check that a store has what the whole curriculum and its evaluations read; return how much of it they use.

    Raises:
      ValueError: a split is missing or empty, the block length does not fit, or there are too few tokens.
    """
    for name in (TRAIN, HELDOUT):
        if name not in manifest.splits or not manifest.splits[name].num_blocks:
            raise ValueError(
                f"the token store has no split {name!r} with a block in it, only {', '.join(manifest.splits)}; "
                "training needs train and heldout: btlm corpus tokenize makes both"
            )
    if not any(source.num_blocks for source in manifest.splits[HELDOUT].sources.values()):
        raise ValueError(
            "by its manifest no source of the token store's split 'heldout' has a block; rebuild the store"
        )
    if EXAMPLES in manifest.features:
        _check_examples(config, manifest)
    order = make_order(manifest, curriculum=config.curriculum.table, data=config.data)
    return order.check_capacity(max_epochs=config.data.max_epochs)


def _check_examples(config: TrainConfig, manifest: Manifest) -> None:
    """Check that a run keeps apart and whole what a store of examples has in each window.

    Raises:
      ValueError: it does not.
    """
    if not config.data.document_mask:
        raise ValueError(
            "the token store has several examples in a window, which must not see each other: give "
            "--config.data.document_mask=true"
        )
    counts = manifest.made_by.get("counts")
    found = counts.get(MOST_DOCUMENTS) if isinstance(counts, dict) else None
    most = most_documents(config)
    if isinstance(found, int) and found > most:
        fitting = max(1, most * manifest.window // manifest.block_len - 1)
        raise ValueError(
            f"the token store has blocks of {found:,} examples and paddings, and attention keeps no more than {most:,} "
            f"apart here: make it by btlm corpus examples --most_examples={fitting}, or give "
            "--config.model.attention=chunked"
        )
    for phase in config.curriculum.table.phases:
        if phase.seq_len % manifest.window:
            raise ValueError(
                f"the token store has examples that are whole in windows of {manifest.window:,} tokens, and "
                f"curriculum.seq_len={phase.seq_len} of phase {phase.index + 1} would cut them: give a multiple of "
                f"{manifest.window:,}, or make the store by btlm corpus examples --window={phase.seq_len}"
            )


def describe_examples(manifest: Manifest) -> str:
    """Return how much of a store of examples is trained; "" for other stores."""
    if EXAMPLES not in manifest.features:
        return ""
    lines = []
    for name in (TRAIN, HELDOUT):
        split = manifest.splits[name]
        num_window_tokens = split.num_blocks * manifest.block_len
        lines.append(
            f"{name}: {sum(source.num_documents for source in split.sources.values()):,} examples; of "
            f"{num_window_tokens:,} window tokens, which the curriculum counts, the loss is on {split.num_tokens:,} "
            f"({split.num_tokens / num_window_tokens:.1%}: completions)"
        )
    return "Examples: " + "\n          ".join(lines)


def prepare_store(
    config: TrainConfig,
    *,
    workdir: Path,
    expected_fingerprint: str,
    build_store: BuildStore,
    wait_for_all: Callable[[], None],
) -> TokenStore:
    """Open the run's token store; if there is none and `corpus` names a source, build it first.

    Process 0 builds it for all that share the workdir. Of one in a bucket each builds the same.

    `wait_for_all` returns when all processes have called it, however long process 0 builds.
    `expected_fingerprint` is the one that the checkpoint recorded, or "" without a checkpoint.

    Raises:
      FileNotFoundError: there is no store, and corpus.source is "prepared" or data.store is a URL.
      OSError: the URL cannot be reached.
      ValueError: as `locate_store` and `open_run_store`.
    """
    makes_it = jax.process_index() == 0 or mirror_of(workdir).is_remote  # the others look for it when it is made
    location = locate_store(config.data, workdir=workdir) if makes_it else None
    if isinstance(location, Path) and not has_store(location):
        if mirror_of(workdir).is_remote and config.corpus.source != PREPARED and location.is_relative_to(workdir):
            shutil.rmtree(location, ignore_errors=True)  # of which a kill left a part in the bucket
        if config.corpus.source == PREPARED or location.exists():
            raise FileNotFoundError(
                f"there is no token store in {location}: it has no {MANIFEST_FILE}; point --config.data.store to one, "
                "or let the run make one (--config.corpus.source=installed_python) where nothing is yet"
            )
        location.parent.mkdir(parents=True, exist_ok=True)
        build_store(
            config.corpus,
            vocab_size=config.model.vocab_size,
            block_len=config.curriculum.table.block_len,
            seed=config.data.seed,
            directory=location,
            log=log,
        )
    wait_for_all()  # also where this process came so late that the store is there
    if location is None:
        until = time.monotonic() + _SEEN_SECONDS
        while isinstance(location := locate_store(config.data, workdir=workdir), Path) and not has_store(location):
            if time.monotonic() > until:
                raise FileNotFoundError(f"process 0 has the token store {location}, and this host does not see it")
            time.sleep(0.2)
    return open_run_store(config, location, expected_fingerprint=expected_fingerprint)


def keep_compiled(workdir: Path) -> None:
    """Have executables kept in the workdir, or in the folder of JAX_COMPILATION_CACHE_DIR, which runs can share."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(workdir.resolve() / COMPILE_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # With XLA's own caches the directory is part of the executables' keys, and a moved workdir would find none of them.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def make_run(
    program: Program,
    *,
    workdir: Path,
    token_store: TokenStore,
    ledger: GoodputLedger,
    predict_steps: PredictSteps,
    most_heldout_tokens: int | None = None,
) -> Run:
    """Compile the train step of every phase and the evaluation step, and log how long steps are predicted to take.

    All before the first step, so that a change of phase costs nothing and cannot fail.
    """
    config, mesh = program.config, program.mesh
    eval_step = make_eval_step(program.model, loss_chunk=config.model.loss_chunk)
    keep_compiled(workdir)
    began = time.monotonic()
    with ledger.measure("compile"), jax.set_mesh(mesh):
        traced = [program.trace_train_step(phase) for phase in config.curriculum.table.phases]
        prediction = predict_steps(program, traced)
        if prediction.said:
            log(prediction.said)
        train_steps = tuple(map(program.compile, traced))
        rows = (config.evaluation.batch_size, token_store.manifest.block_len)
        sharding = evaluation_sharding(mesh)
        heldout = abstract_batch(rows, sharding, document_mask=config.data.document_mask)
        compiled_eval_step = jax.jit(eval_step).lower(program.state.params, heldout).compile()
    log(f"Compiled {len(train_steps)} phases and the evaluation in {time.monotonic() - began:.1f} s")
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=program.model,
        table=program.table,
        optimizer=program.optimizer,
        token_store=token_store,
        train_steps=train_steps,
        eval_step=compiled_eval_step,
        learning_rates=rates_of_steps(config.optimizer, config.curriculum.table),
        ledger=ledger,
        prediction=prediction,
        most_heldout_tokens=most_heldout_tokens,
    )


def describe_run(config: TrainConfig, table: dict) -> str:
    """Return the whole plan; `table` is the model's tree of ParameterInfo."""
    how_decayed = _weight_decay(config, table)
    config = config.with_numbers()
    sections = (
        _parameters(config.model, config.mup, table),
        _phases(config.curriculum, config.model),
        [*_schedule(config.optimizer, config.curriculum), *_muon(config.optimizer, table), how_decayed],
        _memory(config.optimizer, table),
        _parameter_rows(config.optimizer, table, num_steps=config.curriculum.table.num_steps),
    )
    return "\n\n".join("\n".join(section) for section in sections)


def num_parameters(table: dict) -> int:
    """Return how many parameters the tree of ParameterInfo holds."""
    return sum(math.prod(info.shape) for info in jax.tree.leaves(table))


def _parameters(model: ModelConfig, mup: MupConfig, table: dict) -> Iterator[str]:
    yield f"Model: {num_parameters(table):,} parameters"
    yield (
        f"  {model.num_layers} layers, d_model {model.d_model}, {model.num_heads} heads x {model.head_dim}, "
        f"d_ff {model.d_ff}, vocabulary {model.vocab_size:,}, compute in {model.dtype}"
    )
    yield f"  parametrization {mup.preset}: d_model / base = {model.d_model} / {mup.base_d_model:g}"
    if frozen := [info for info in jax.tree.leaves(table) if info.rule.is_frozen]:
        count, total = sum(math.prod(info.shape) for info in frozen), num_parameters(table)
        yield f"  frozen, to stay as they are: {count:,} parameters of {total:,}, {total - count:,} are trained"
        yield f"    {', '.join(info.path for info in frozen)}"


def _phases(curriculum: CurriculumConfig, model: ModelConfig) -> Iterator[str]:
    table = curriculum.table
    yield (
        f"Curriculum: {table.num_steps:,} steps of {table.tokens_per_step:,} tokens, "
        f"{table.num_tokens / 1e9:.2f} B tokens"
    )
    for phase in table.phases:
        share = phase.num_tokens / table.num_tokens
        flops = flops_per_token(model, seq_len=phase.seq_len)
        yield (
            f"  phase {phase.index + 1}: {phase.num_steps:,} steps of {phase.batch_size:,} x {phase.seq_len:,} = "
            f"{phase.tokens_per_step:,} tokens; {phase.num_tokens:,} tokens ({share:.2%}); "
            f"{flops / 1e9:.4g} GFLOP a token"
        )
    total = sum(p.num_tokens * flops_per_token(model, seq_len=p.seq_len) for p in table.phases)
    yield f"  {total:.4g} FLOP in all ({FLOPS_CONVENTION})"


def _schedule(optimizer: OptimizerConfig, curriculum: CurriculumConfig) -> Iterator[str]:
    table = curriculum.table

    def rate(step: int) -> float:
        tokens = table.tokens_seen(step)
        return learning_rate_at(optimizer, tokens=tokens, total_tokens=table.num_tokens)

    parts = stretches_of(optimizer, total_tokens=table.num_tokens)
    stretches = [f"warm-up {_steps(parts.warmup, table)} to {optimizer.peak_learning_rate:g}"]
    if parts.stable:
        stretches.append(f"constant for {_steps(parts.stable, table)}")
    if parts.decay:
        shape = "cosine" if optimizer.schedule == "cosine" else "linear"
        share = f", the last {optimizer.decay_share:.4g}" if optimizer.schedule == "wsd" else ""
        share += ", a decay to zero" * (optimizer.end_learning_rate == 0)
        stretches.append(f"{shape} to {optimizer.end_learning_rate:g} in {_steps(parts.decay, table)}{share}")
    begin = f" from {optimizer.schedule_begin:,} tokens on" if optimizer.schedule_begin else ""
    last = rate(table.num_steps)
    yield f"Schedule {optimizer.schedule}{begin}: {', then '.join(stretches)}; {last:.5g} at the end"
    for phase in table.phases[1:]:
        if table.tokens_seen(phase.first_step + 1) <= optimizer.schedule_begin:
            continue
        yield (
            f"  LR at the switch to {phase.seq_len:,} (first step of phase {phase.index + 1}, step "
            f"{phase.first_step + 1:,}): {rate(phase.first_step + 1):.6g}"
        )
    yield (
        f"  AdamW beta ({optimizer.beta1:g}, {optimizer.beta2:g}), eps {optimizer.eps:g}, clip at global norm "
        f"{optimizer.clip_norm:g}" + f", z-loss {optimizer.z_loss:g}" * (optimizer.z_loss > 0)
    )
    if optimizer.average != "none":
        steps = f"{optimizer.average_share * table.num_steps:,.6g} steps"
        kind = f"halved after {steps}" if optimizer.average == "ema" else f"of the last {steps}"
        yield f"  average of the weights ({optimizer.average}, {kind}): WORKDIR/average, in training it is not read"


def _muon(optimizer: OptimizerConfig, table: dict) -> Iterator[str]:
    if optimizer.hidden_optimizer == "muon":
        from btlm_jax.recipe.muon import exchanged_bytes

        is_alone = jax.tree.leaves(table)[0].sharding.mesh.size == 1
        gigabytes = f"{exchanged_bytes(table) / _GIGA:.4g} GB of momentum change devices twice a step"
        yield (
            f"  hidden matrices: Muon, peak {optimizer.muon_learning_rate:g} at every width, updates x sqrt(max(1, "
            f"outputs / inputs)); {'nothing is exchanged, on one device' if is_alone else gigabytes}"
        )


def _weight_decay(config: TrainConfig, table: dict) -> str:
    decay = config.with_numbers().optimizer.decay
    how = "coupled to each class's learning rate"
    if config.is_decay_independent:
        how = "independent of the width: times the peak rate"
    why = ""
    if config.optimizer.weight_decay == AUTO:
        per_parameter = config.curriculum.table.num_tokens / num_parameters(table)
        why = f" (auto: for {per_parameter:.4g} tokens a parameter, arXiv 2505.13738)"
    return f"  weight decay {decay:.4g}{why}, {how}; tau of each class is in the table below"


def _steps(tokens: int, table: Curriculum) -> str:
    return f"{tokens / table.tokens_per_step:g} steps ({tokens:,} tokens)"


def _memory(optimizer: OptimizerConfig, table: dict) -> Iterator[str]:
    infos = jax.tree.leaves(table)

    def size(infos: list, *, on_device: bool) -> int:
        return sum(4 * math.prod(info.sharding.shard_shape(info.shape) if on_device else info.shape) for info in infos)

    trained = [info for info in infos if not info.rule.is_frozen]
    num_copies, average = (2, " + their average") if optimizer.average != "none" else (1, "")
    one_moment = [info for info in trained if info.rule.parameter_class in HIDDEN_CLASSES]
    if optimizer.hidden_optimizer != "muon":
        one_moment = []
    whole, per_device = (
        num_copies * size(infos, on_device=x) + 2 * size(trained, on_device=x) - size(one_moment, on_device=x)
        for x in (False, True)
    )
    axes = ", ".join(f"{name} {size}" for name, size in infos[0].sharding.mesh.shape.items())
    yield (
        f"Memory, float32 state (parameters{average} + 2 AdamW moments{', one of hidden matrices' * bool(one_moment)}"
        f"{' of those that are trained' * (trained != infos)}): "
        f"{whole / _GIGA:.4g} GB in all, {per_device / _GIGA:.4g} GB a device on this mesh ({axes}); "
        f"gradients {size(trained, on_device=True) / _GIGA:.4g} GB more while a step runs, activations on top"
    )


def _parameter_rows(optimizer: OptimizerConfig, table: dict, *, num_steps: int) -> Iterator[str]:
    yield "Parameters (init std before the cut at two sigma; tau = 1 / (LR x weight decay x steps), AdamW's memory)"
    yield (
        f"  {'parameter':<30} {'shape':<22} {'class':<13} {'init':>10} {'LR mult':>8} {'peak LR':>9} "
        f"{'decay':>7} {'eps':>8} {'tau':>7}"
    )
    for info in jax.tree.leaves(table):
        rule = info.rule
        peak = optimizer.peak_learning_rate * rule.learning_rate
        decay = optimizer.decay * rule.weight_decay
        init = f"{rule.init_std:.6g}" if rule.init_std else f"= {rule.init_mean:g}"
        tau = f"{1 / (peak * decay * num_steps):.4f}" if decay else "-"
        shape = " x ".join(map(str, info.shape))
        yield (
            f"  {info.path:<30} {shape:<22} {rule.parameter_class:<13} {init:>10} {rule.learning_rate:>8.5g} "
            f"{peak:>9.4g} {decay:>7.3g} {optimizer.eps * rule.eps:>8.2g} {tau:>7}"
        )
