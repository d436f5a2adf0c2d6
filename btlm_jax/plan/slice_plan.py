"""Plan a whole run on a slice: compile every phase, or say why not and which layouts would divide."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax

from btlm_jax.display.progress import report_while_running
from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.plan.chips import GIB, Chip, chip_of, num_chips, slice_devices
from btlm_jax.plan.compiling import CompileCache, DoesNotFitError
from btlm_jax.plan.estimate import PhasePlan, plan_phase
from btlm_jax.plan.gpu_estimate import plan_gpu_phase
from btlm_jax.plan.gpus import Gpu, answering_for, has_cuda_plugin, is_stand_in
from btlm_jax.plan.layout import MeshLayout, format_mesh, layout_of
from btlm_jax.recipe.config import MeshConfig, TrainConfig, divisibility_problems, divisors
from btlm_jax.recipe.curriculum import Phase
from btlm_jax.train.memory import memory_problem
from btlm_jax.train.program import Program, make_program

_MORE_MEMORY = "try more mesh.accumulation, model.remat=full, or more chips"
_MAX_SUGGESTED_LAYOUTS = 5
_PROGRESS_SECONDS = 15.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoesNotFit:
    """A phase whose step needs more memory than a chip has."""

    phase: Phase
    program: str  # CompiledStep.program
    needed: int
    available: int

    def __str__(self) -> str:
        return (
            f"{phase_name(self.phase)} does not fit: it needs {self.needed / GIB:.2f} GiB of a chip's "
            f"{self.available / GIB:.2f} GiB, {(self.needed - self.available) / GIB:.2f} GiB too much"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlicePlan:
    """Predicted memory and time of a run on a slice, or why it would not run."""

    topology: str  # of a slice
    chip: Chip | Gpu
    num_chips: int  # of all slices
    layout: MeshLayout
    phases: tuple[PhasePlan, ...]  # those that fit
    misfits: tuple[DoesNotFit, ...]  # those that do not fit
    obstacles: tuple[str, ...]  # why nothing was, or could be, compiled
    slices: int = 1

    @property
    def works(self) -> bool:
        return not self.misfits and not self.obstacles

    @property
    def is_by_formula(self) -> bool:
        """Whether memory is by a formula: of GPUs that cannot be compiled for here."""
        return isinstance(self.chip, Gpu) and not has_cuda_plugin()

    @property
    def problems(self) -> tuple[str, ...]:
        """Every reason why it would not run."""
        return (*self.obstacles, *(f"{too_large}; {_MORE_MEMORY}" for too_large in self.misfits))

    @property
    def needed(self) -> int:
        """Bytes of one chip's memory in the phase that needs the most."""
        return max((each.needed for each in (*(plan.memory for plan in self.phases), *self.misfits)), default=0)

    @property
    def spare(self) -> float:
        """Unused share of a chip's memory."""
        return 1 - self.needed / self.chip.hbm_bytes

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of the whole run: (low end, high end)."""
        steps = [(plan.phase.num_steps, plan.step_time) for plan in self.phases]
        return sum(n * step.low for n, step in steps), sum(n * step.high for n, step in steps)

    @property
    def central_seconds(self) -> float:
        """Seconds of the whole run, the central value."""
        return sum(plan.phase.num_steps * plan.step_time.central for plan in self.phases)


def plan_run(
    config: TrainConfig,
    *,
    topology: str,
    cache: CompileCache,
    report_progress: Callable[[str], None],
    slices: int = 1,
) -> SlicePlan:
    """Compile every phase of a config for slices, or take it from `cache`; `report_progress` gets lines of progress.

    Raises:
      ValueError: there is no such slice, libtpu is not installed, or the step does not compile.
      NoCompilationsLeftError: `cache` may compile no more.
    """
    devices = slice_devices(topology, slices=slices)
    results, problems = (), layout_problems(config, num_devices=len(devices), chip=chip_of(topology), slices=slices)
    if not problems:
        with _answering(topology):
            program = program_on(config, devices)
            results = tuple(_plan_phases(program, topology=topology, cache=cache, report_progress=report_progress))
            problems = _evaluation_problems(program, results, topology=topology)
    planned = _slice_plan(config, topology=topology, num_chips=len(devices), results=results, obstacles=problems)
    return dataclasses.replace(planned, slices=slices)


def plan_fitting_phases(
    config: TrainConfig, *, topology: str, cache: CompileCache, report_progress: Callable[[str], None]
) -> SlicePlan:
    """Plan as `plan_run` does, for a layout that divides, but compile nothing after the first phase that does not fit.

    A compiler error that is not about memory becomes an obstacle of the plan.

    Raises:
      NoCompilationsLeftError: `cache` may compile no more.
    """
    devices = slice_devices(topology)
    results, obstacles = [], ()
    try:
        with _answering(topology):
            program = program_on(config, devices)
            for result in _plan_phases(program, topology=topology, cache=cache, report_progress=report_progress):
                results.append(result)
                if isinstance(result, DoesNotFit):
                    break
            obstacles = _evaluation_problems(program, results, topology=topology)
    except ValueError as error:
        obstacles = (str(error),)
    return _slice_plan(config, topology=topology, num_chips=len(devices), results=tuple(results), obstacles=obstacles)


def program_on(config: TrainConfig, devices: Sequence[jax.Device]) -> Program:
    """Make the program of a config on these devices.

    Raises:
      ValueError: its mesh does not divide them.
    """
    return make_program(config, make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=devices))


def _answering(topology: str) -> contextlib.AbstractContextManager[None]:
    """Return what answers JAX's questions about the GPU here, where a topology is of GPUs."""
    chip = chip_of(topology)
    return answering_for(chip) if isinstance(chip, Gpu) else contextlib.nullcontext()


def _plan_phases(
    program: Program, *, topology: str, cache: CompileCache, report_progress: Callable[[str], None]
) -> Iterator[PhasePlan | DoesNotFit]:
    """Yield the plan of each phase, compiled when the iterator reaches it.

    Raises:
      ValueError: a step does not compile, for another reason than memory.
      NoCompilationsLeftError: `cache` may compile no more.
    """
    chip, is_traced_only = chip_of(topology), is_stand_in(program.mesh.devices.flat[0])
    for phase in program.config.curriculum.table.phases:
        what = f"{'tracing' if is_traced_only else 'compiling'} {phase_name(phase)} for {topology}"
        report_progress(what if is_traced_only else f"{what}: a minute or several")
        with report_while_running(what, seconds=_PROGRESS_SECONDS, say=report_progress):
            try:
                if isinstance(chip, Gpu):
                    plan = plan_gpu_phase(program, phase, topology=topology, gpu=chip, cache=cache)
                else:
                    plan = plan_phase(program, phase, topology=topology, chip=chip, cache=cache)
            except DoesNotFitError as error:
                plan = DoesNotFit(phase=phase, program=error.program, needed=error.needed, available=error.available)
        yield plan


def _evaluation_problems(
    program: Program, results: Sequence[PhasePlan | DoesNotFit], *, topology: str
) -> tuple[str, ...]:
    """Return why an evaluation, which is not compiled, cannot fit where every phase does."""
    if any(isinstance(each, DoesNotFit) for each in results):
        return ()
    problem = memory_problem(program, available=chip_of(topology).hbm_bytes)
    return (problem,) if problem else ()


def phase_name(phase: Phase) -> str:
    """Return the name of a phase for messages."""
    return f"phase {phase.index + 1} ({phase.batch_size:,} x {phase.seq_len:,})"


def layout_problems(config: TrainConfig, *, num_devices: int, chip: Chip | Gpu, slices: int = 1) -> tuple[str, ...]:
    """Return every size that the config's mesh does not divide on so many devices, then the nearest meshes that do."""
    problems = divisibility_problems(config, num_devices=num_devices, slices=slices)
    if not problems:
        return ()
    if works := dividing_meshes(config, num_devices=num_devices, slices=slices)[:_MAX_SUGGESTED_LAYOUTS]:
        shown = "; ".join(map(format_mesh, works))
        return (*problems, f"layouts of this config that divide {num_devices} chips: {shown}")
    if slices > 1:
        return (*problems, f"no layout of this config divides {num_devices} chips in {slices} slices")
    shapes = [shape for shape in chip.slices if dividing_meshes(config, num_devices=num_chips(shape))]
    shown = ", ".join(f"{chip.name}:{shape}" for shape in shapes) or "none"
    return (*problems, f"no layout of this config divides {num_devices} chips; slices that one divides: {shown}")


def dividing_meshes(config: TrainConfig, *, num_devices: int, slices: int = 1) -> list[MeshConfig]:
    """Return the meshes that divide every size on so many devices, the nearest to the config's first."""

    def distance(mesh: MeshConfig) -> float:
        sizes = ((each.tensor, each.context, each.accumulation) for each in (mesh, config.mesh))
        return sum(abs(math.log(there / here)) for there, here in zip(*sizes, strict=True))

    batch = math.gcd(*(phase.batch_size for phase in config.curriculum.table.phases))
    found = [
        mesh
        for tensor in divisors(num_devices)
        for context in divisors(num_devices // tensor)
        for accumulation in divisors(batch)
        for mesh in (dataclasses.replace(config.mesh, tensor=tensor, context=context, accumulation=accumulation),)
        if not divisibility_problems(dataclasses.replace(config, mesh=mesh), num_devices=num_devices, slices=slices)
    ]
    return sorted(found, key=distance)


def _slice_plan(
    config: TrainConfig,
    *,
    topology: str,
    num_chips: int,
    results: tuple[PhasePlan | DoesNotFit, ...],
    obstacles: tuple[str, ...],
) -> SlicePlan:
    return SlicePlan(
        topology=topology,
        chip=chip_of(topology),
        num_chips=num_chips,
        layout=layout_of(config),
        phases=tuple(each for each in results if isinstance(each, PhasePlan)),
        misfits=tuple(each for each in results if isinstance(each, DoesNotFit)),
        obstacles=obstacles,
    )
