"""The training run, in chapters: workdir, store, model, restore, compile, loop, report.

The only module that holds the whole config. `train` may be called again at any time: it goes on from the last complete
checkpoint and ends with the same bits as a run that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.checkpoint import Checkpointer, Position, check_same_run
from btlm_jax.config import TrainConfig
from btlm_jax.corpus.build import build_store
from btlm_jax.data.loader import TrainLoader, heldout_batches
from btlm_jax.data.reader import TokenStore, open_store
from btlm_jax.describe import describe_run
from btlm_jax.evaluate.heldout import HeldoutResult, evaluate_heldout
from btlm_jax.files import write_atomically
from btlm_jax.metrics import GoodputLedger
from btlm_jax.model import Btlm, make_model, parameter_table
from btlm_jax.mup import make_parametrization
from btlm_jax.optimizer import learning_rate_at, make_optimizer
from btlm_jax.report import finished_report, make_report
from btlm_jax.sharding import FSDP, batch_sharding, check_divisible, make_mesh
from btlm_jax.step import TrainState, abstract_batch, abstract_state, init_state, make_eval_step, make_train_step
from btlm_jax.store import MANIFEST_FILE
from btlm_jax.writers import MetricWriter

DONE, PREEMPTED, BAD_NUMBERS = "done", "preempted", "bad_numbers"
STALL_SECONDS = 1800.0  # after this long without a step every thread's stack goes to stderr, and the run goes on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is made of, all of it fixed before the first step."""

    config: TrainConfig
    workdir: Path
    mesh: Mesh
    model: Btlm
    table: dict  # the parameters' tree of ParameterInfo
    optimizer: optax.GradientTransformationExtraArgs
    token_store: TokenStore
    train_steps: tuple[Callable, ...]  # one executable a phase
    eval_step: Callable
    ledger: GoodputLedger

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that completes `step` steps."""
        curriculum = self.config.curriculum.table
        return learning_rate_at(
            self.config.optimizer, tokens=curriculum.tokens_seen(step), total_tokens=curriculum.num_tokens
        )


class BadNumbersError(Exception):
    """A loss or gradient was not finite; the message names the step and what to look at."""


def train(config: TrainConfig, *, workdir: Path) -> str:
    """Train `config` in `workdir` to its end, from wherever the workdir stands; return DONE, PREEMPTED or BAD_NUMBERS.

    Raises:
      ValueError: the config, the store, the mesh or the checkpoint do not fit together; says which and how.
      OSError: a file cannot be read or written.
    """
    ledger = GoodputLedger()
    stop = _StopRequest()
    make_workdir(workdir)
    mesh = make_mesh(devices=jax.devices(), tensor=config.mesh.tensor)
    check_divisible(config, mesh)
    checkpointer = Checkpointer(workdir, config=config.checkpoint)
    try:
        position = _last_position(checkpointer, config)
        if finished := finished_report(workdir, config, step=position.step):
            log(finished)
            return DONE
        with ledger.measure("corpus"):
            token_store = prepare_store(config, workdir=workdir, log=log, expected=position.store_fingerprint)
        run = _make_run(config, workdir=workdir, mesh=mesh, token_store=token_store, ledger=ledger)
        state = _restore_or_init(run, checkpointer, position)
        with jax.set_mesh(mesh), MetricWriter(workdir, config, first_step=position.step + 1, ledger=ledger) as writer:
            return _train_from(run, state, position, checkpointer=checkpointer, writer=writer, stop=stop)
    finally:
        checkpointer.close()


def dry_run(config: TrainConfig) -> str:
    """Return the whole plan of a run; only shapes are computed, so a 3B plan takes seconds."""
    mesh = make_mesh(devices=jax.devices(), tensor=config.mesh.tensor)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    plan = describe_run(config, parameter_table(model, mesh))
    try:
        check_divisible(config, mesh)
    except ValueError as error:
        plan += f"\n\nNote: {error}"
    return plan


def start_processes(*, distributed: bool, coordinator: str, num_processes: int, process_id: int) -> None:
    """Join the other processes of this run, if there are any; must come before anything touches a device."""
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes=num_processes, process_id=process_id)
    elif distributed:
        jax.distributed.initialize()


def log(message: str) -> None:
    """Print a line of the run's story, from process 0."""
    if jax.process_index() == 0:
        print(message, flush=True)


# Chapter 1: the workdir and the token store.


def make_workdir(workdir: Path) -> None:
    """Create the workdir and prove that it can be written to.

    Raises:
      OSError: it cannot be created or written; names it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{jax.process_index()}"
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(f"workdir {workdir} cannot be written: {error}; choose another --workdir") from error


def store_directory(config: TrainConfig, *, workdir: Path) -> Path:
    """Return where the token store is: data.store, taken from the workdir when it is relative."""
    return workdir / config.data.store


def prepare_store(config: TrainConfig, *, workdir: Path, log: Callable[[str], None], expected: str) -> TokenStore:
    """Open the run's token store, making it first when it does not exist and the config says from what.

    `expected` is the fingerprint that the checkpoint recorded, or "" without one.

    Raises:
      FileNotFoundError: there is no store and corpus.source is "prepared".
      ValueError: the store does not fit the model or is not the checkpoint's.
    """
    directory = store_directory(config, workdir=workdir)
    if not (directory / MANIFEST_FILE).is_file():
        if config.corpus.source == "prepared" or directory.exists():
            raise FileNotFoundError(
                f"there is no token store in {directory}: it has no {MANIFEST_FILE}; point --config.data.store to one, "
                'or let the run make one (config.corpus.source="installed_python") where nothing is yet'
            )
        if jax.process_index() == 0:
            directory.parent.mkdir(parents=True, exist_ok=True)
            build_store(
                config.corpus,
                vocab_size=config.model.vocab_size,
                block_len=config.curriculum.table.block_len,
                seed=config.data.seed,
                directory=directory,
                log=log,
            )
        multihost_utils.sync_global_devices("token store made")
    token_store = open_store(directory, expected_fingerprint=expected)
    vocab_size = token_store.manifest.tokenizer.vocab_size
    if vocab_size > config.model.vocab_size:
        raise ValueError(
            f"token store {directory} has ids up to {vocab_size - 1:,}, but model.vocab_size={config.model.vocab_size:,}"
        )
    return token_store


# Chapter 2: model, optimizer, executables.


def _make_run(config: TrainConfig, *, workdir: Path, mesh: Mesh, token_store: TokenStore, ledger: GoodputLedger) -> Run:
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    table = parameter_table(model, mesh)
    optimizer = make_optimizer(config.optimizer, table)
    log(describe_run(config, table))
    train_step = make_train_step(model, optimizer, table, loss_chunk=config.model.loss_chunk)
    eval_step = make_eval_step(model, loss_chunk=config.model.loss_chunk)
    state = abstract_state(table, optimizer, mesh)
    learning_rate = jax.ShapeDtypeStruct((), np.float32)
    # The executables of every phase exist before the first step: a phase switch costs nothing and cannot fail.
    jax.config.update("jax_compilation_cache_dir", str(workdir.resolve() / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with ledger.measure("compile"), jax.set_mesh(mesh):
        began = time.monotonic()
        jitted = jax.jit(train_step, donate_argnums=0)
        train_steps = tuple(
            jitted.lower(state, _abstract_train_batch(config, phase, mesh), learning_rate).compile()
            for phase in config.curriculum.table.phases
        )
        rows = (config.evaluation.batch_size, token_store.manifest.block_len)
        heldout = abstract_batch(rows, NamedSharding(mesh, PartitionSpec(FSDP)))
        compiled_eval_step = jax.jit(eval_step).lower(state.params, heldout).compile()
        log(f"Compiled {len(train_steps)} phases and the evaluation in {time.monotonic() - began:.1f} s")
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=model,
        table=table,
        optimizer=optimizer,
        token_store=token_store,
        train_steps=train_steps,
        eval_step=compiled_eval_step,
        ledger=ledger,
    )


def _abstract_train_batch(config: TrainConfig, phase: Phase, mesh: Mesh) -> dict:
    accumulation = config.mesh.accumulation
    shape = (accumulation, phase.batch_size // accumulation, phase.seq_len)
    return abstract_batch(shape, batch_sharding(mesh))


# Chapter 3: where the run stands.


def _last_position(checkpointer: Checkpointer, config: TrainConfig) -> Position:
    steps = checkpointer.steps()
    if not steps:
        return Position(step=0, tokens_seen=0, store_fingerprint="")
    position, saved = checkpointer.read_facts(steps[-1])
    check_same_run(saved, config, where=str(checkpointer.directory / str(steps[-1])))
    curriculum = config.curriculum.table
    if position.step > curriculum.num_steps:
        raise ValueError(
            f"the checkpoint is at step {position.step:,} ({position.tokens_seen:,} tokens), past the configured "
            f"{curriculum.num_steps:,} steps ({curriculum.num_tokens:,} tokens): raise curriculum.num_tokens of the "
            "last phase, or choose another --workdir"
        )
    assert position.tokens_seen == curriculum.tokens_seen(position.step)
    return position


def _restore_or_init(run: Run, checkpointer: Checkpointer, position: Position) -> TrainState:
    if position.step == 0:
        return init_state(run.model, run.optimizer, run.mesh, seed=run.config.seed)
    log(f"Resuming from step {position.step:,} ({position.tokens_seen:,} tokens)")
    return checkpointer.restore_state(position.step, abstract=abstract_state(run.table, run.optimizer, run.mesh))


# Chapter 4: the loop.


def _train_from(
    run: Run,
    state: TrainState,
    position: Position,
    *,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    stop: StopRequest,
) -> str:
    config, curriculum = run.config, run.config.curriculum.table
    loader = TrainLoader(
        run.token_store,
        curriculum=curriculum,
        seed=config.data.seed,
        max_epochs=config.data.max_epochs,
        accumulation=config.mesh.accumulation,
        prefetch=config.data.prefetch,
        sharding=batch_sharding(run.mesh),
    )
    log(f"Data: {loader.use}")
    phase_ends = {phase.end_step for phase in curriculum.phases}
    fingerprint = run.token_store.manifest.fingerprint
    waiting = None  # the metrics of the last step, still on the device: fetched while the next one runs
    batches = _measured(loader.batches(first_step=position.step), run.ledger)
    try:
        for index, batch in batches:
            faulthandler.dump_traceback_later(STALL_SECONDS, file=sys.stderr)
            step, phase = index + 1, curriculum.phase_at(index)
            learning_rate = run.learning_rate(step)
            with run.ledger.measure("step"):
                state, metrics = run.train_steps[phase.index](state, batch, np.float32(learning_rate))
                if waiting is not None:
                    _record(writer, *waiting)
                waiting = (step, learning_rate, metrics)
                last = step == curriculum.num_steps
                stopping = stop.agreed(step)
                evaluating = last or step in phase_ends or step % config.evaluation.every_steps == 0
                saving = last or stopping or step % config.checkpoint.every_steps == 0
                if evaluating or saving:
                    # Nothing is evaluated or saved before the numbers it came from are known to be finite.
                    _record(writer, *waiting)
                    waiting = None
            if evaluating and not last:
                _evaluate_some(run, state, writer, step=step)
            if saving:
                with run.ledger.measure("checkpoint"):
                    here = Position(step=step, tokens_seen=curriculum.tokens_seen(step), store_fingerprint=fingerprint)
                    checkpointer.save(state, position=here, config=config)
            if stopping and not last:
                checkpointer.wait()
                log(f"Preempted: saved at step {step:,}; run the same command to go on")
                return PREEMPTED
    except BadNumbersError as error:
        return _stop_on_bad_numbers(error, checkpointer, writer)
    finally:
        faulthandler.cancel_dump_traceback_later()
        batches.close()
    with run.ledger.measure("checkpoint"):
        checkpointer.wait()
    result = evaluate(run, state, blocks_per_source=EVERY_BLOCK)
    writer.evaluation(curriculum.num_steps, result)
    log(make_report(run, state, result))
    return DONE


def _record(writer: MetricWriter, step: int, learning_rate: float, metrics: dict) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    writer.train(step, learning_rate=learning_rate, **values)
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if bad:
        shown = ", ".join(f"{name}={values[name]}" for name in bad)
        raise BadNumbersError(f"step {step:,}: {shown}, learning rate {learning_rate:.6g}")
