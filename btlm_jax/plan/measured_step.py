"""A config's train step measured on this machine's CPU or GPUs: seconds of the run, and bytes that a step needs."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from btlm_jax.kernels.build import multiplies_bfloat16
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import batch_sharding
from btlm_jax.plan.chips import GIB
from btlm_jax.plan.layout import MeshLayout, layout_of
from btlm_jax.plan.placement import CPU, Placement, cpu_placement, span
from btlm_jax.recipe.config import MeshConfig, TrainConfig, divisibility_problems, divisors
from btlm_jax.recipe.curriculum import Phase
from btlm_jax.recipe.sizes import count_parameters
from btlm_jax.train.flops import memory_bytes
from btlm_jax.train.memory import memory_problem, second_state_bytes, whole_state_bytes
from btlm_jax.train.program import Program, make_program
from btlm_jax.train.step import init_state
from btlm_jax.train.step_time import made_up_batch

_GPU_MICRO_BATCH = 32_768  # tokens of one GPU
_SPARE = 0.1  # share of the memory that a step leaves
_TIMED_STEPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsHere:
    """A config's steps on this CPU, as it lays them out."""

    phases: tuple[Phase, ...]
    layout: MeshLayout
    needed: int  # bytes of the phase that needs the most
    available: int
    seconds: tuple[float, ...]  # of a step, by phase; none where they do not fit

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


def measure_as_laid_out(config: TrainConfig, *, report_progress: Callable[[str], None]) -> StepsHere:
    """Compile a micro-batch of each phase of a config for the CPU here, and time it if it fits the memory.

    Raises:
      ValueError: the config splits a step over several devices, and a CPU is one; an evaluation does not fit.
    """
    if problems := divisibility_problems(config, num_devices=1, slices=1):
        raise ValueError(f"the config does not divide cpu, which is one device: {'; '.join(problems)}")
    phases, devices = config.curriculum.table.phases, jax.devices("cpu")[:1]
    placement = dataclasses.replace(
        cpu_placement(config.curriculum.table), dtype=config.model.dtype, layout=layout_of(config)
    )
    programs, compiled = _compile_here(config, placement, devices=devices, report_progress=report_progress)
    micro_batches = config.mesh.accumulation
    sums = 4 * count_parameters(config.model) if micro_batches > 1 else 0  # of gradients over micro-batches
    beside = sums + second_state_bytes(programs[0])
    needed, available = max(map(_needed_bytes, compiled)) + beside, memory_bytes(devices[0])
    seconds: tuple[float, ...] = ()
    if needed <= available:
        if problem := memory_problem(make_program(config, make_mesh(devices=devices, tensor=1)), available=available):
            raise ValueError(problem)  # of an evaluation, which is not compiled
        timed = _time_here(programs, compiled, report_progress=report_progress)
        seconds = tuple(micro_batches * each for each in timed)
    return StepsHere(phases=phases, layout=layout_of(config), needed=needed, available=available, seconds=seconds)


def format_here(steps: StepsHere) -> str:
    """Return what was measured, a line a phase."""
    lines = [
        f"cpu: {len(os.sched_getaffinity(0))} CPU cores, as btlm new --machine=this measures them; {steps.layout}",
        f"A step needs {steps.needed / GIB:.2f} of {steps.available / GIB:.1f} GiB, as compiled here",
    ]
    if not steps.fits:
        lines.append("PROBLEM: it does not fit: try more mesh.accumulation, model.remat=full, or fewer parameters")
    total = 0.0
    for phase, seconds in zip(steps.phases, steps.seconds, strict=False):
        total += phase.num_steps * seconds
        lines.append(
            f"Phase {phase.index + 1}: {phase.num_steps:,} steps of {phase.batch_size:,} x {phase.seq_len:,} tokens, "
            f"{seconds:.3g} s each, {phase.tokens_per_step / seconds:,.0f} tokens/s"
        )
    if steps.seconds:
        lines.append(f"Run: {span(total)} of steps alone. Measured here: a micro-batch with its update, x their number")
    return "\n".join(lines)


def measure_here(config: TrainConfig, *, report_progress: Callable[[str], None]) -> Placement:
    """Compile and time a micro-batch of each phase of a config here, and return its placement.

    The micro-batch is the largest that a device is known to gain from and that leaves a tenth of the memory.

    Raises:
      ValueError: there are TPUs, the number of devices does not divide the batches, or memory is too small.
    """
    devices = jax.devices()
    platform = devices[0].platform
    if platform == "tpu":
        raise ValueError("--machine=this measures on CPUs and GPUs; on a TPU host name its slice: --topology=v5e-8")
    available = memory_bytes(devices[0])
    state = whole_state_bytes(config, devices[0]) // (1 if platform == CPU else len(devices))
    if state > available:
        raise ValueError(
            f"the parameters and their moments alone are {state / GIB:.2f} GiB of a device, and one here has "
            f"{available / GIB:.2f}: ask for fewer --params, or for a slice with --topology"
        )
    for accumulation in _accumulations(config, platform=platform, num_devices=len(devices)):
        placement = _placement(config, platform=platform, accumulation=accumulation)
        programs, compiled = _compile_here(config, placement, devices=devices, report_progress=report_progress)
        needed = max(map(_needed_bytes, compiled))
        if needed <= (1 - _SPARE) * available:
            break
        report_progress(f"  it needs {needed / GIB:.2f} GiB of {available / GIB:.2f}: too much")
    else:
        raise ValueError(
            f"a step of {_shapes(programs)} tokens needs {needed / GIB:.2f} GiB of {available / GIB:.2f} here: give a "
            "shorter --seq_len, fewer --params, or a slice with --topology"
        )
    seconds = _time_here(programs, compiled, report_progress=report_progress)
    total = sum(
        phase.num_steps * accumulation * each
        for phase, each in zip(config.curriculum.table.phases, seconds, strict=True)
    )
    shown = " and ".join(f"{each:.3g} s" for each in seconds)
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    machine = cores if platform == CPU else f"{len(devices)} x {devices[0].device_kind}"
    return dataclasses.replace(
        placement,
        memory=f"a step needs {needed / GIB:.2f} of {available / GIB:.1f} GiB, as compiled here",
        time=(
            f"{span(total)} of steps alone: micro-batches of {_shapes(programs)} tokens took {shown} "
            f"({machine}, {datetime.date.today().isoformat()})"
        ),
    )


def _accumulations(config: TrainConfig, *, platform: str, num_devices: int) -> list[int]:
    """Return the micro-batches a step to try, the fewest first.

    Raises:
      ValueError: the devices do not divide the batches.
    """
    table = config.curriculum.table
    batch = math.gcd(*(phase.batch_size for phase in table.phases))
    if batch % num_devices:
        raise ValueError(
            f"batches of {batch} sequences are not divisible by the {num_devices} devices here: use fewer "
            "(CUDA_VISIBLE_DEVICES), or give --seq_len"
        )
    if platform == CPU:
        first = cpu_placement(table).layout.mesh.accumulation
    else:
        most = _GPU_MICRO_BATCH * num_devices
        first = min(
            (count for count in divisors(batch // num_devices) if table.tokens_per_step // count <= most), default=0
        )
    counts = divisors(batch // num_devices)
    return [count for count in counts if count >= first] or counts[-1:]


def _placement(config: TrainConfig, *, platform: str, accumulation: int) -> Placement:
    base = cpu_placement(config.curriculum.table)
    mesh = MeshConfig(tensor=1, context=1, accumulation=accumulation)
    layout = MeshLayout(mesh=mesh, remat=base.layout.remat)
    if platform == CPU and multiplies_bfloat16():
        why = dict(base.why) | {"model.dtype": "of activations: what this CPU multiplies itself; others take float32"}
        return dataclasses.replace(base, layout=layout, dtype="bfloat16", why=why)
    if platform == CPU:
        return dataclasses.replace(base, layout=layout)
    why = {
        "model.dtype": "of activations: what GPUs multiply",
        "model.remat": "recomputes little",
        "mesh.accumulation": f"micro-batches a step, of at most {_GPU_MICRO_BATCH:,} tokens of a GPU or one sequence",
    }
    return dataclasses.replace(base, where=", on GPUs", dtype="bfloat16", layout=layout, why=why)


def _compile_here(
    config: TrainConfig, placement: Placement, *, devices: Sequence[jax.Device], report_progress: Callable[[str], None]
) -> tuple[list[Program], list[jax.stages.Compiled]]:
    """Return the programs of one micro-batch of each phase, and their compiled steps."""
    programs = [_micro_program(config, placement, phase, devices=devices) for phase in config.curriculum.table.phases]
    report_progress(f"compiling a step of {_shapes(programs)} tokens here")
    return programs, [program.compile(program.trace_train_step(_only_phase(program))) for program in programs]


def _time_here(
    programs: Sequence[Program], compiled: Sequence[jax.stages.Compiled], *, report_progress: Callable[[str], None]
) -> list[float]:
    """Return the seconds of a step of each program."""
    report_progress(f"timing {_TIMED_STEPS} steps of {_shapes(programs)} tokens")
    return [_time_step(program, step) for program, step in zip(programs, compiled, strict=True)]


def _micro_program(
    config: TrainConfig,
    placement: Placement,
    phase: Phase,
    *,
    devices: Sequence[jax.Device],
) -> Program:
    """Return the program of one micro-batch of a phase."""
    layout = placement.layout
    rows = phase.batch_size // layout.mesh.accumulation
    curriculum = dataclasses.replace(
        config.curriculum, seq_len=(phase.seq_len,), batch_size=(rows,), num_tokens=(rows * phase.seq_len,)
    )
    # What speaks of the steps or the phases of the whole run says nothing of this one.
    optimizer = dataclasses.replace(config.optimizer, warmup_tokens=0, schedule_begin=0, schedule_tokens=0)
    one = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=placement.dtype, remat=layout.remat),
        curriculum=curriculum,
        optimizer=optimizer,
        mesh=dataclasses.replace(layout.mesh, accumulation=1),
        data=dataclasses.replace(config.data, weights=""),
        log=dataclasses.replace(config.log, profile_steps=""),
    )
    return make_program(one, make_mesh(devices=list(devices), tensor=1))


def _only_phase(program: Program) -> Phase:
    (phase,) = program.config.curriculum.table.phases
    return phase


def _shapes(programs: Sequence[Program]) -> str:
    phases = map(_only_phase, programs)
    return " and ".join(f"{phase.batch_size} x {phase.seq_len:,}" for phase in phases)


def _time_step(program: Program, step: jax.stages.Compiled) -> float:
    """Return the seconds of a step, the least of _TIMED_STEPS after one more."""
    phase = _only_phase(program)
    shape = (1, phase.batch_size, phase.seq_len)
    batch = made_up_batch(shape, batch_sharding(program.mesh, program.rules_for(phase)), config=program.config)
    state = init_state(program.model, program.optimizer, program.mesh, seed=program.config.seed)
    seconds = []
    for _ in range(1 + _TIMED_STEPS):
        began = time.perf_counter()
        state, metrics = step(state, batch, np.float32(1e-4))
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _needed_bytes(step: jax.stages.Compiled) -> int:
    memory = step.memory_analysis()
    assert memory is not None, "CPUs and GPUs give it"
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes
