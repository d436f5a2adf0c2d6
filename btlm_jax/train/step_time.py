"""Measure what the parts of a run take on this machine: compiling, a step of each phase, a batch of the evaluation."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.parallel.mesh import batch_sharding, evaluation_sharding
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.train.heldout import make_eval_step
from btlm_jax.train.program import make_program
from btlm_jax.train.setup import keep_compiled
from btlm_jax.train.step import abstract_batch, init_state

MIN_RUNS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunTimes:
    """Seconds of a run's parts."""

    prepare: float  # tracing, lowering and initialization, which the run repeats
    compile: float  # which the run finds done, in its cache
    steps: tuple[float, ...]  # of one step of each phase
    evaluation: float  # of one batch


def measure_run(
    config: TrainConfig,
    *,
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
    workdir: Path,
    seconds: float,
) -> RunTimes:
    """Compile a run's programs, as it will, and time them on made-up tokens, each for about `seconds`."""
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=devices)
    keep_compiled(workdir)
    prepare = compiling = 0.0
    times = []
    with jax.set_mesh(mesh):
        began = time.monotonic()
        program = make_program(config, mesh)
        state = jax.block_until_ready(init_state(program.model, program.optimizer, mesh, seed=config.seed))
        prepare += time.monotonic() - began
        for phase in config.curriculum.table.phases:
            began = time.monotonic()
            traced = program.trace_train_step(phase)
            prepare += time.monotonic() - began
            began = time.monotonic()
            step = program.compile(traced)
            compiling += time.monotonic() - began
            accumulation = config.mesh.accumulation
            shape = (accumulation, phase.batch_size // accumulation, phase.seq_len)
            batch = made_up_batch(shape, batch_sharding(mesh, program.rules_for(phase)), config=config)

            def one_step(step=step, batch=batch):
                nonlocal state
                state, metrics = step(state, batch, np.float32(0))
                jax.device_get(metrics)

            times.append(_median_seconds(one_step, seconds=seconds))
        began = time.monotonic()
        rows = (config.evaluation.batch_size, config.curriculum.table.block_len)
        sharding = evaluation_sharding(mesh)
        eval_step = jax.jit(make_eval_step(program.model, loss_chunk=config.model.loss_chunk))
        abstract = abstract_batch(rows, sharding, document_mask=config.data.document_mask)
        compiled = eval_step.lower(program.state.params, abstract).compile()
        compiling += time.monotonic() - began
        heldout = made_up_batch(rows, sharding, config=config)
        evaluation = _median_seconds(lambda: jax.device_get(compiled(state.params, heldout)), seconds=seconds / 2)
    return RunTimes(prepare=prepare, compile=compiling, steps=tuple(times), evaluation=evaluation)


def made_up_batch(shape: tuple[int, ...], sharding: jax.sharding.NamedSharding, *, config: TrainConfig) -> dict:
    """Return a batch of random tokens, of one document a row."""
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    leaves = {"inputs_BT": tokens, "targets_BT": tokens, "weights_BT": np.ones(shape, np.float32)}
    if config.data.document_mask:
        leaves["starts_BT"] = np.zeros(shape, np.int32)
    return {name: jax.device_put(leaf, sharding) for name, leaf in leaves.items()}


def _median_seconds(run: Callable[[], object], *, seconds: float) -> float:
    """Return the median time of several runs, the first one left out."""
    run()
    times, end = [], time.monotonic() + seconds
    while len(times) < MIN_RUNS or time.monotonic() < end:
        began = time.monotonic()
        run()
        times.append(time.monotonic() - began)
    return statistics.median(times)
