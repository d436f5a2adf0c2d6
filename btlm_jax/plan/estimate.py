"""Predict the memory and the time of one phase's train step on a slice. Not yet compared with a run on a TPU.

The time is static arithmetic over the compiled program; ASSUMPTIONS says what it leaves out. It is a range. Low end:
every asynchronous collective is hidden behind computation, and every block of keys outside ALiBi's window is skipped.
High end: none is.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from btlm_jax.attention.alibi import SPREAD, alibi_window
from btlm_jax.model.transformer import device_slopes
from btlm_jax.parallel.mesh import num_ways
from btlm_jax.plan.chips import Chip
from btlm_jax.plan.compiling import CompileCache, CompiledStep
from btlm_jax.plan.executable import BETWEEN_SLICES, Collective, Executable
from btlm_jax.plan.flop_count import OUT_OF_WINDOW, StepWork, count_step_work
from btlm_jax.recipe.curriculum import Phase
from btlm_jax.train.flops import flops_per_token, peak_flops
from btlm_jax.train.program import Program

ASSUMPTIONS = (
    "XLA's own cycle estimate of every fusion x the trips of the loops around it / clock",
    "attention kernels: instruction bundles of their loops, as compiled, + 300 a program, / clock / cores, on the "
    "device whose heads see the most",
    "collectives: bytes x (n - 1) / n / (2 x link), all-reduce twice that, all-to-all bytes x n / 4 / (2 x link), "
    "collective-permute bytes / link, as to a neighbour, each alone on its links",
    "low end: all asynchronous collectives hidden, and q and k so short that ALiBi puts many keys out of sight: the "
    f"scores of a row spread by {SPREAD:.0f} nats at most without it; high end: nothing hidden, all keys seen",
    "left out: HBM stalls, input, checkpoints, evaluation, failures",
)
BETWEEN_SLICES_ASSUMPTION = (
    "between slices: all-reduce bytes x 2 (n - 1) / n / a chip's share of its host's network, as published; hidden at "
    "the low end"
)
_KERNEL_OVERHEAD = 300  # bundles a program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one chip's HBM while a step runs. Outputs reuse the donated arguments, but for what is left over."""

    available: int
    parameters: int
    optimizer: int
    other_arguments: int  # the batch, and padding of tiles
    outputs: int
    temporaries: int  # activations, gradients, gathered weights
    code: int

    @property
    def needed(self) -> int:
        arguments = self.parameters + self.optimizer + self.other_arguments
        return arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Predicted seconds of a step."""

    computation: float
    attention: float  # over all keys
    negligible: float  # the part of it over keys outside ALiBi's windows
    exposed: float  # synchronous collectives
    asynchronous: float  # collectives that may run beside computation

    @property
    def low(self) -> float:
        return self.computation + self.attention - self.negligible + self.exposed

    @property
    def high(self) -> float:
        return self.low + self.negligible + self.asynchronous


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """What is predicted of one phase."""

    phase: Phase
    program: str  # CompiledStep.program
    compile_seconds: float
    memory: Memory
    collectives: tuple[Collective, ...]
    counted_flops: float  # a step, by FLOPS_CONVENTION
    executed_flops: float  # a step over all keys, with recompute, masked halves of blocks and ALiBi's lanes
    peak_flops: float  # of the slice, a second
    step_time: StepTime

    def mfu(self, seconds: float) -> float:
        return self.counted_flops / self.peak_flops / seconds


def plan_phase(program: Program, phase: Phase, *, topology: str, chip: Chip, cache: CompileCache) -> PhasePlan:
    """Compile the train step of a phase, unless `cache` has the result, and predict.

    Raises:
      DoesNotFitError: saying by how much.
      NoCompilationsLeftError: `cache` may compile no more.
      ValueError: it does not compile, for another reason than memory.
    """
    traced = program.trace_train_step(phase)
    step = cache.compile_step(program, traced, topology=topology, chip=chip, state_bytes=state_bytes(program))
    num_chips = program.mesh.size
    work = count_step_work(traced.jaxpr.jaxpr)
    return PhasePlan(
        phase=phase,
        program=step.program,
        compile_seconds=step.seconds,
        memory=_memory(program, step, chip=chip),
        collectives=step.executable.collectives,
        counted_flops=flops_per_token(program.config.model, seq_len=phase.seq_len) * phase.tokens_per_step,
        executed_flops=work.flops,
        peak_flops=peak_flops(program.mesh.devices.flat[0]).flops * num_chips,
        step_time=step_time(
            step.executable, work, slopes_XN=_slopes_of_devices(program, phase), chip=chip, num_chips=num_chips
        ),
    )


def seconds_on(chip: Chip, collective: Collective) -> float:
    """Return the seconds a step spends in one collective, over links or, between slices, over the network."""
    if collective.kind.startswith(BETWEEN_SLICES):  # each chip sends, and receives, by its share of the host's network
        inner = dataclasses.replace(collective, kind=collective.kind.removeprefix(BETWEEN_SLICES))
        return collective_seconds(inner, link_bytes=chip.network_bytes / 2)
    return collective_seconds(collective, link_bytes=chip.link_bytes)


def collective_seconds(collective: Collective, *, link_bytes: float) -> float:
    """Return the seconds a step spends in one collective: on a ring in both directions, permutes over one link."""
    n = collective.num_devices
    passes = {"all-reduce": 2 * (n - 1) / n, "all-to-all": n / 4, "collective-permute": 2}.get(
        collective.kind, (n - 1) / n
    )
    return collective.count * passes * collective.num_bytes / (2 * link_bytes)


def state_bytes(program: Program) -> int:
    """Return the bytes of parameters and optimizer on one device, which every step needs."""
    return _bytes_of(program.state)


def step_time(executable: Executable, work: StepWork, *, slopes_XN: np.ndarray, chip: Chip, num_chips: int) -> StepTime:
    """Predict a step's time; `slopes_XN`: ALiBi slopes of the heads of each of the X devices that share a sequence."""
    window_XN = alibi_window(SPREAD, slopes_XN, xp=np)
    bundles = work.kernel_steps * _KERNEL_OVERHEAD
    bundles += sum(blocks * chip.kernel_bundles[name] for name, blocks in work.kernel_blocks.items())
    saved_X = np.zeros(len(slopes_XN))
    for (name, distance), blocks in work.distant_blocks.items():
        saved = chip.kernel_bundles[name] - chip.kernel_bundles[name + OUT_OF_WINDOW]
        saved_X += blocks * saved * (window_XN <= distance).mean(1)
    seconds = {False: 0.0, True: 0.0}
    for collective in executable.collectives:
        seconds[collective.is_asynchronous] += seconds_on(chip, collective)
    return StepTime(
        computation=executable.num_cycles / chip.clock,
        attention=bundles / num_chips / chip.clock / chip.num_cores,
        negligible=float(saved_X.min()) / num_chips / chip.clock / chip.num_cores,
        exposed=seconds[False],
        asynchronous=seconds[True],
    )


def _slopes_of_devices(program: Program, phase: Phase) -> np.ndarray:
    """Return the ALiBi slopes_XN of the heads of each of the X devices that share a sequence."""
    model, rules = program.config.model, program.rules_for(phase)
    ways = num_ways(program.mesh, rules.heads_in_attention)
    slopes_N = np.asarray(device_slopes(model, rules, mesh=program.mesh))
    return slopes_N.reshape(ways, model.num_heads // ways)


def _memory(program: Program, step: CompiledStep, *, chip: Chip) -> Memory:
    state = program.state
    parameters, optimizer = _bytes_of(state.params), _bytes_of(state.opt_state)
    return Memory(
        available=chip.hbm_bytes,
        parameters=parameters,
        optimizer=optimizer,
        other_arguments=step.argument_bytes - parameters - optimizer,
        outputs=step.output_bytes - step.alias_bytes,
        temporaries=step.temporary_bytes,
        code=step.code_bytes,
    )


def _bytes_of(tree) -> int:
    """Return the bytes of a tree of abstract arrays on one device."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
