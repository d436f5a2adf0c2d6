"""Plans that nothing compiled: memory and time of a layout by a formula, for tests of what is done with plans."""

import dataclasses

from btlm_jax.plan.calibration import Correction, Parts
from btlm_jax.plan.chips import GIB, chip_of, num_chips
from btlm_jax.plan.estimate import Memory, PhasePlan, StepTime
from btlm_jax.plan.layout import layout_of
from btlm_jax.plan.slice_plan import DoesNotFit, SlicePlan
from btlm_jax.plan.torus import Exchange
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.curriculum import Phase

# For BTLM-3B on 32 chips, a little above what search.py says that a layout needs at least.
KEPT = {"full": 1.1, "attention_saved": 5.2, "out_recomputed": 11.5, "matmuls_saved": 12, "none": 26}
_AGAIN = {"full": 1.0, "attention_saved": 0.7, "out_recomputed": 0.2, "matmuls_saved": 0.1, "none": 0.0}
_GATHER = Exchange(
    kind="all-gather", num_bytes=3 * GIB, num_devices=4, count=5, is_asynchronous=True, way="line of 4", seconds=1.0
)


def imagined(config: TrainConfig, *, topology: str, **_) -> SlicePlan:
    """Stand in for `plan_fitting_phases`."""
    layout, phases = layout_of(config), config.curriculum.table.phases
    mesh = layout.mesh
    gib = 1.0 * mesh.context + 0.2 * mesh.tensor + 19.5 * KEPT[layout.remat] / mesh.accumulation
    seconds = 30 * (3 + _AGAIN[layout.remat]) / 4 + 0.2 * mesh.accumulation + 2 * (mesh.tensor * mesh.context - 1)
    needed, chip = int(gib * GIB), chip_of(topology)
    fits = needed <= chip.hbm_bytes
    too_large = DoesNotFit(phase=phases[0], program="hash", needed=needed, available=chip.hbm_bytes)
    return SlicePlan(
        topology=topology,
        chip=chip,
        num_chips=num_chips(topology.partition(":")[2]),
        layout=layout,
        phases=tuple(_phase(phase, needed=needed, available=chip.hbm_bytes, seconds=seconds) for phase in phases)
        if fits
        else (),
        misfits=() if fits else (too_large,),
        obstacles=(),
    )


def _phase(phase: Phase, *, needed: int, available: int, seconds: float) -> PhasePlan:
    memory = Memory(
        available=available, parameters=0, optimizer=0, other_arguments=0, outputs=0, temporaries=needed, code=0
    )
    return PhasePlan(
        phase=phase,
        program="hash",
        compile_seconds=1.0,
        memory=memory,
        collectives=(_GATHER,),
        counted_flops=30.0,
        executed_flops=40.0,
        skipped_flops=5.0,
        peak_flops=2.0,
        step_time=StepTime(parts=parts_of(seconds), correction=Correction(factor=1.0, error=0.25, source="imagined")),
    )


def parts_of(seconds: float, **changes: float) -> Parts:
    """Return parts of which products alone take time, at the chip's peak, but for `changes`."""
    names = (field.name for field in dataclasses.fields(Parts))
    products = dict.fromkeys(("products", "products_at_peak", "slowest"), seconds)
    return Parts(**(dict.fromkeys(names, 0.0) | products | changes))
