"""The least memory that a run needs, by arithmetic, before anything is made or compiled."""

from __future__ import annotations

import dataclasses
import math

import jax

from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.train.flops import memory_bytes
from btlm_jax.train.program import Program, make_program

_GIB = 2**30
_BYTES_OF_IDS = 12  # of a token in a batch: its id, its target's, a weight


def check_memory(program: Program) -> None:
    """Check that the least that the run keeps in memory fits into it.

    Raises:
      ValueError: it does not fit.
    """
    own = program.mesh.local_devices  # only they say what memory they have
    # A CPU's devices share the machine's memory.
    available = memory_bytes(own[0]) // (len(own) if own[0].platform == "cpu" else 1)
    if problem := memory_problem(program, available=available):
        raise ValueError(problem)


def memory_problem(program: Program, *, available: int) -> str:
    """Return why the least that a run keeps on a device exceeds its `available` bytes, "" if it does not.

    That is the state, twice where steps are computed twice; of a batch, of an evaluation too, its ids, the logits of
    model.loss_chunk positions, one half of a SwiGLU layer, and what comes into a layer: in training into each, which
    the backward pass reads whatever model.remat is, unless all of the layers are frozen. What passes may be too large.
    """
    config, num_devices = program.config, program.mesh.size
    model, table, accumulation = config.model, config.curriculum.table, config.mesh.accumulation
    state = bytes_of(program.state)
    if state > available:
        return (
            f"the parameters and their moments are {state / _GIB:,.1f} GiB of each device, which has "
            f"{available / _GIB:,.1f}: make the model smaller, or give more devices"
        )

    def problem_of(name: str, *, rows: int, length: int, layers: int, second: int) -> str:
        as_much = " and as much again while bad_numbers.recompute_every computes a step twice" if second else ""
        itemsize = jax.numpy.dtype(model.dtype).itemsize
        logits = min(model.loss_chunk, length) * model.vocab_size * itemsize
        token = _BYTES_OF_IDS + (layers * model.d_model + model.d_ff) * itemsize
        batch = rows * (length * token + logits) // num_devices
        if state + second + batch <= available:
            return ""
        return (
            f"{name}={rows:,} of {length:,} tokens each needs at least {batch / _GIB:,.1f} GiB of each device, "
            f"which has {available / _GIB:,.1f}, of which the parameters and their moments take "
            f"{state / _GIB:,.1f}{as_much}: make it smaller"
        )

    problems = [
        problem_of(
            f"curriculum.batch_size of phase {phase.index + 1} / mesh.accumulation",
            rows=phase.batch_size // accumulation,
            length=phase.seq_len,
            layers=1 if config.optimizer.freeze else model.num_layers,
            second=second_state_bytes(program),
        )
        for phase in table.phases
    ]
    problems.append(
        problem_of(
            "evaluation.batch_size", rows=config.evaluation.batch_size, length=table.block_len, layers=1, second=0
        )
    )
    return next(filter(None, problems), "")


def whole_state_bytes(config: TrainConfig, device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]
    """Return the bytes of a config's parameters and of its optimizer's state, of all devices together.

    `device` is any one; nothing is made on it.

    Raises:
      ValueError: optimizer.freeze names no parameter, or all of them.
    """
    model = dataclasses.replace(config.model, attention="reference")  # whose parameters are the same on any device
    return bytes_of(make_program(dataclasses.replace(config, model=model), make_mesh(devices=[device], tensor=1)).state)


def second_state_bytes(program: Program) -> int:
    """Return the bytes of the copy from which a step is computed twice, on one device; 0 where none is."""
    return bytes_of(program.state) if program.config.bad_numbers.recompute_every else 0


def bytes_of(tree) -> int:
    """Return the bytes of a tree of abstract arrays on one device."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
