"""Predict the memory and the time of one phase's train step on a slice. Not yet compared with a run on a TPU.

The time is static arithmetic over the compiled program, corrected by what published runs of other models took over the
same arithmetic (calibration.py). It is a central value with its error, and the parts that it is made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from btlm_jax import notices
from btlm_jax.attention.alibi import SPREAD, alibi_window
from btlm_jax.attention.tpu import BACKWARD
from btlm_jax.model.transformer import device_slopes
from btlm_jax.parallel.mesh import num_ways
from btlm_jax.plan.calibration import Correction, Parts, best_known_hfu, correction_of, kept_points
from btlm_jax.plan.chips import Chip
from btlm_jax.plan.compiling import CompileCache, CompiledStep, DoesNotFitError
from btlm_jax.plan.executable import ELEMENTWISE, PREFETCH, PRODUCT, UNESTIMATED, Executable, Operation
from btlm_jax.plan.flop_count import DIAGONAL, OUT_OF_WINDOW, StepWork, count_step_work
from btlm_jax.plan.torus import Exchange, time_collective, torus_of
from btlm_jax.recipe.curriculum import Phase
from btlm_jax.train.flops import attention_flops_per_token, flops_per_token, peak_flops
from btlm_jax.train.memory import bytes_of, second_state_bytes
from btlm_jax.train.program import Program

ASSUMPTIONS = (
    "roofline: of every fusion the greater one of FLOPs at the chip's peak and bytes at the bandwidth of HBM, x the "
    "trips of the loops around it; gathers, scatters, sorts, copies without an estimate: bytes at 0.8 of the bandwidth",
    "attention kernels: instruction bundles of their loops, as compiled, + 300 a program, / clock / cores, on the "
    "device whose heads see the most, over all keys",
    "central value: roofline x what published runs took over theirs on this chip, + exchanges that nothing hides, but "
    "not faster than at the best HFU published of the chip; error: what leaving one of those runs out makes, or 10 %",
    "exchanges by where the devices are: along a side of the slice a closed ring has two links into a device, a line "
    "one, a group that takes every nth device 1/n of them; synchronous ones are alone, the others beside computation",
    "compiler: XLA's own cycle estimates / clock, which include memory time and are the faster end of what is known",
    f"with windows: q and k so short that the scores of a row spread by {SPREAD:.0f} nats at most without ALiBi, so "
    "that keys out of sight are skipped; what is skipped is in neither MFU nor HFU",
    "HFU: FLOPs executed, recompute and padding too; left out: input, checkpoints, evaluation, failures",
)
BETWEEN_SLICES_ASSUMPTION = (
    "between slices: all-reduce bytes x 2 (n - 1) / n / a chip's share of its host's network, as published"
)
_KERNEL_OVERHEAD = 300  # bundles a program
_COPY_SPEED = 0.8  # of HBM's bandwidth, of operations that the compiler does not estimate


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
    workspace: int = 0  # of cuDNN's kernels, which is not in the executable
    second_state: int = 0  # beside it while a step is computed twice: bad_numbers.recompute_every

    @property
    def needed(self) -> int:
        arguments = self.parameters + self.optimizer + self.other_arguments
        return arguments + self.outputs + self.temporaries + self.code + self.workspace + self.second_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Predicted seconds of a step, over all keys unless it says otherwise."""

    parts: Parts
    correction: Correction
    at_best_hfu: float = 0.0  # seconds of its FLOPs at the best HFU known of the chip: it is not believed to be faster

    @property
    def central(self) -> float:
        return max(self.correction.seconds(self.parts), self.at_best_hfu)

    @property
    def low(self) -> float:
        return self.central / (1 + self.correction.error)

    @property
    def high(self) -> float:
        return self.central * (1 + self.correction.error)

    @property
    def windowed(self) -> float:
        """The central value if keys outside of ALiBi's windows are skipped."""
        return self.central - self.correction.factor * self.parts.negligible

    @property
    def compiler(self) -> float:
        """By the compiler's estimates alone, uncorrected."""
        return self.parts.estimate + self.parts.exchanged


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """What is predicted of one phase."""

    phase: Phase
    program: str  # CompiledStep.program
    compile_seconds: float
    memory: Memory
    collectives: tuple[Exchange, ...]
    counted_flops: float  # a step, by FLOPS_CONVENTION
    executed_flops: float  # a step over all keys, with recompute, masked halves of blocks and ALiBi's lanes
    skipped_flops: float  # of those counted, what is skipped where keys are out of sight
    peak_flops: float  # of the slice, a second
    step_time: StepTime

    def mfu(self, seconds: float) -> float:
        return self.counted_flops / self.peak_flops / seconds

    @property
    def hfu(self) -> float:
        """FLOPs executed at the central value, over the peak."""
        return self.executed_flops / self.peak_flops / self.step_time.central

    @property
    def mfu_windowed(self) -> float:
        """MFU where keys are skipped, of the FLOPs that are left."""
        return (self.counted_flops - self.skipped_flops) / self.peak_flops / self.step_time.windowed


def plan_phase(program: Program, phase: Phase, *, topology: str, chip: Chip, cache: CompileCache) -> PhasePlan:
    """Compile the train step of a phase, unless `cache` has the result, and predict.

    Raises:
      DoesNotFitError: saying by how much.
      NoCompilationsLeftError: `cache` may compile no more.
      ValueError: it does not compile, for another reason than memory.
    """
    traced = program.trace_train_step(phase)
    step = cache.compile_step(program, traced, topology=topology, chip=chip, state_bytes=state_bytes(program))
    memory = _memory(program, step, chip=chip)
    if memory.needed > memory.available:  # with what the executable does not have
        raise DoesNotFitError(program=step.program, needed=memory.needed, available=memory.available)
    num_chips, model = program.mesh.size, program.config.model
    work = count_step_work(traced.jaxpr.jaxpr)
    devices = list(program.mesh.devices.flat)
    torus = torus_of(devices, chip=chip)
    exchanges = tuple(time_collective(each, torus) for each in step.executable.collectives)
    slopes_XN, peak = _slopes_of_devices(program, phase), peak_flops(devices[0]).flops
    parts = step_parts(step.executable, work, exchanges, slopes_XN=slopes_XN, chip=chip, num_chips=num_chips, peak=peak)
    own = kept_points(chip.name, directory=cache.measured) if cache.measured else ()
    attention = attention_flops_per_token(model, seq_len=phase.seq_len) * phase.tokens_per_step
    best = best_known_hfu(chip.name, own=own)
    step_time = StepTime(
        parts=parts,
        correction=correction_of(chip.name, own=own, roofline=parts.roofline),
        at_best_hfu=work.flops / num_chips / peak / best if best else 0.0,
    )
    if (by_roofline := step_time.correction.seconds(parts)) < step_time.central:
        notices.report(
            "plan-too-fast",
            f"the step of {phase.batch_size:,} x {phase.seq_len:,} on {chip.name} would take "
            f"{by_roofline:.3f} s by its roofline and execute more of the peak than any run known: "
            f"{step_time.central:.3f} s is predicted",
        )
    return PhasePlan(
        phase=phase,
        program=step.program,
        compile_seconds=step.seconds,
        memory=memory,
        collectives=exchanges,
        counted_flops=flops_per_token(model, seq_len=phase.seq_len) * phase.tokens_per_step,
        executed_flops=work.flops,
        skipped_flops=attention * skipped_share(work, slopes_XN=slopes_XN),
        peak_flops=peak * num_chips,
        step_time=step_time,
    )


def step_parts(
    executable: Executable,
    work: StepWork,
    exchanges: Sequence[Exchange],
    *,
    slopes_XN: np.ndarray | None,
    chip: Chip,
    num_chips: int,
    peak: float,
) -> Parts:
    """Return the parts of a step's time; `slopes_XN` as `attention_seconds` takes them, `peak` is a chip's FLOP/s."""

    def total(cost: Callable[[Operation], float], *kinds: str) -> float:
        return sum(each.count * cost(each) for each in executable.operations if each.kind in kinds)

    def estimated(each: Operation) -> float:
        return each.cycles / chip.clock

    def at_peak(each: Operation) -> float:
        return each.flops / peak

    def at_bandwidth(each: Operation) -> float:
        return each.num_bytes / chip.hbm_bandwidth

    attention, negligible = attention_seconds(work, slopes_XN=slopes_XN, chip=chip, num_chips=num_chips)
    return Parts(
        products=total(estimated, PRODUCT),
        products_at_peak=total(at_peak, PRODUCT),
        elementwise=total(estimated, ELEMENTWISE),
        elementwise_at_bandwidth=total(at_bandwidth, ELEMENTWISE),
        slowest=total(lambda each: max(at_peak(each), at_bandwidth(each)), PRODUCT, ELEMENTWISE),
        unestimated=total(at_bandwidth, UNESTIMATED) / _COPY_SPEED,
        prefetched=total(at_bandwidth, PREFETCH),
        attention=attention,
        negligible=negligible,
        exposed=sum(each.seconds for each in exchanges if not each.is_asynchronous),
        asynchronous=sum(each.seconds for each in exchanges if each.is_asynchronous),
    )


def attention_seconds(
    work: StepWork, *, slopes_XN: np.ndarray | None, chip: Chip, num_chips: int
) -> tuple[float, float]:
    """Return the seconds of attention kernels over all keys, and the part of them that ALiBi's windows leave out.

    slopes_XN: ALiBi slopes of the heads of each of the X devices that share a sequence; None without ALiBi.
    """
    bundles = work.kernel_steps * _KERNEL_OVERHEAD
    bundles += sum(blocks * chip.kernel_bundles[name] for name, blocks in work.kernel_blocks.items())
    saved = 0.0
    if slopes_XN is not None and work.distant_blocks:
        window_XN = alibi_window(SPREAD, slopes_XN, xp=np)
        saved_X = np.zeros(len(slopes_XN))
        for (name, distance), blocks in work.distant_blocks.items():
            less = chip.kernel_bundles[name] - chip.kernel_bundles[name + OUT_OF_WINDOW]
            saved_X += blocks * less * (window_XN <= distance).mean(1)
        saved = float(saved_X.min())
    rate = num_chips * chip.clock * chip.num_cores
    return bundles / rate, saved / rate


def skipped_share(work: StepWork, *, slopes_XN: np.ndarray) -> float:
    """Return the share of attention's blocks that are out of sight, on the mean over devices."""
    window_XN = alibi_window(SPREAD, slopes_XN, xp=np)
    skipped = sum(
        blocks * float((window_XN <= distance).mean())
        for (name, distance), blocks in work.distant_blocks.items()
        if name == BACKWARD
    )
    # kernel_blocks[BACKWARD] are those off the diagonal; those on it are half as much work.
    return skipped / (work.kernel_blocks[BACKWARD] + work.kernel_blocks[BACKWARD + DIAGONAL] / 2) if skipped else 0.0


def state_bytes(program: Program) -> int:
    """Return the bytes of parameters and optimizer on one device, which every step needs."""
    return bytes_of(program.state)


def _slopes_of_devices(program: Program, phase: Phase) -> np.ndarray:
    """Return the ALiBi slopes_XN of the heads of each of the X devices that share a sequence."""
    model, rules = program.config.model, program.rules_for(phase)
    ways = num_ways(program.mesh, rules.heads_in_attention)
    slopes_N = np.asarray(device_slopes(model, rules, mesh=program.mesh))
    return slopes_N.reshape(ways, model.num_heads // ways)


def _memory(program: Program, step: CompiledStep, *, chip: Chip) -> Memory:
    state = program.state
    parameters, optimizer = bytes_of(state.params), bytes_of(state.opt_state)
    return Memory(
        available=chip.hbm_bytes,
        parameters=parameters,
        optimizer=optimizer,
        other_arguments=step.argument_bytes - parameters - optimizer,
        outputs=step.output_bytes - step.alias_bytes,
        temporaries=step.temporary_bytes,
        code=step.code_bytes,
        second_state=second_state_bytes(program),
    )
