"""Plan a whole run on a slice: every phase compiled, or why not and which layouts would divide."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from btlm_jax.config import MeshConfig, TrainConfig
from btlm_jax.plan.chips import Chip, chip_of, num_chips, slice_devices
from btlm_jax.plan.compiling import DoesNotFitError
from btlm_jax.plan.estimate import PhasePlan, plan_phase
from btlm_jax.program import make_program
from btlm_jax.sharding import divisibility_problems, make_run_mesh

_MAX_LAYOUTS = 5  # that are suggested
_PROGRESS_SECONDS = 15.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlicePlan:
    """What a run would need and take on a slice; `problems` says why it would not run, if it would not."""

    topology: str
    chip: Chip
    num_chips: int
    mesh: MeshConfig
    problems: tuple[str, ...]
    phases: tuple[PhasePlan, ...]  # those that compiled

    @property
    def seconds(self) -> tuple[float, float]:
        """The whole run at the low and at the high end."""
        steps = [(plan.phase.num_steps, plan.step_time) for plan in self.phases]
        return sum(n * step.low for n, step in steps), sum(n * step.high for n, step in steps)


def plan_run(config: TrainConfig, *, topology: str, cache: Path, say: Callable[[str], None]) -> SlicePlan:
    """Compile every phase of a config for a slice, or take it from `cache`; `say` hears of the progress.

    Raises:
      ValueError: there is no such slice, libtpu is not installed, or the config says what no slice could do.
    """
    chip = chip_of(topology)
    devices = slice_devices(topology)
    made = dict(topology=topology, chip=chip, num_chips=len(devices), mesh=config.mesh)
    if problems := layout_problems(config, num_devices=len(devices), chip=chip):
        return SlicePlan(**made, problems=problems, phases=())
    program = make_program(config, make_run_mesh(config, devices=devices))
    problems, phases = [], []
    for phase in config.curriculum.table.phases:
        name = f"phase {phase.index + 1} ({phase.batch_size:,} x {phase.seq_len:,})"
        with _progress(f"compiling {name} for {topology}", say=say):
            try:
                phases.append(plan_phase(program, phase, topology=topology, chip=chip, cache=cache))
            except DoesNotFitError as error:
                problems.append(
                    f"{name} does not fit: it {error}; try more mesh.accumulation, model.remat=full, or more chips"
                )
    return SlicePlan(**made, problems=tuple(problems), phases=tuple(phases))


def layout_problems(config: TrainConfig, *, num_devices: int, chip: Chip) -> tuple[str, ...]:
    """Return what the config's mesh does not divide on so many devices, and then the nearest layouts that work."""
    problems = divisibility_problems(config, num_devices=num_devices)
    if not problems:
        return ()
    if works := layouts(config, num_devices=num_devices):
        shown = "; ".join(
            f"mesh.tensor={mesh.tensor} mesh.context={mesh.context} mesh.accumulation={mesh.accumulation}"
            for mesh in works
        )
        return (*problems, f"layouts of this config that divide {num_devices} chips: {shown}")
    slices = [shape for shape in chip.slices if layouts(config, num_devices=num_chips(shape))]
    shown = ", ".join(f"{chip.name}:{shape}" for shape in slices) or "none"
    return (*problems, f"no layout of this config divides {num_devices} chips; slices that one divides: {shown}")


def layouts(config: TrainConfig, *, num_devices: int) -> list[MeshConfig]:
    """Return the layouts that divide everything on so many devices, nearest to the config's first."""

    def distance(mesh: MeshConfig) -> float:
        now = dataclasses.astuple(config.mesh)
        return sum(abs(math.log(there / here)) for there, here in zip(dataclasses.astuple(mesh), now, strict=True))

    batch = math.gcd(*(phase.batch_size for phase in config.curriculum.table.phases))
    found = [
        mesh
        for tensor in _divisors(num_devices)
        for context in _divisors(num_devices // tensor)
        for accumulation in _divisors(batch)
        for mesh in (MeshConfig(tensor=tensor, context=context, accumulation=accumulation),)
        if not divisibility_problems(dataclasses.replace(config, mesh=mesh), num_devices=num_devices)
    ]
    return sorted(found, key=distance)[:_MAX_LAYOUTS]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@contextlib.contextmanager
def _progress(what: str, *, say: Callable[[str], None]) -> Iterator[None]:
    """Say what is being done, that it still is every few seconds, and how long it took."""
    began, done = time.monotonic(), threading.Event()

    def seconds() -> str:
        return f"{time.monotonic() - began:.0f} s"

    def tick() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            say(f"{what}: {seconds()}")

    say(f"{what}: a minute or several")
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
    say(f"{what}: done in {seconds()}")
