"""Steps that a run of one's own took on a slice: read from its workdir, and held against the plan.

A workdir has what this needs from the first logged step on: its config, seconds of every step, its devices.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from btlm_jax.plan.calibration import Point
from btlm_jax.plan.chips import ACCELERATORS, Chip, accelerator_of_kind, chip_of, num_chips
from btlm_jax.plan.gpus import Gpu
from btlm_jax.plan.slice_plan import SlicePlan
from btlm_jax.recipe.config import TrainConfig, train_config_from, with_later_keys
from btlm_jax.storage.files import read_json_object
from btlm_jax.train import CONFIG_FILE, METRICS_FILE
from btlm_jax.train.metric_writer import LEAST_STEPS, medians_of_phases, read_metrics
from btlm_jax.train.starts import read_sound_starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnRun:
    """What a workdir says of its steps' times."""

    workdir: Path
    config: TrainConfig
    chip: Chip | Gpu
    num_chips: int
    seconds: dict[int, float]  # of a step, the median, by the phase's index; phases with enough only


def read_own_run(workdir: Path) -> OwnRun:
    """Read a run's config, devices and seconds a step.

    Raises:
      ValueError: it ran on nothing that plans are made for, on different devices from start to start, or has too few
        steps; or a file is damaged.
      OSError: a file is missing.
    """
    config = train_config_from(with_later_keys(read_json_object(workdir / CONFIG_FILE)))
    devices = {start.facts.get("devices", "") for start in read_sound_starts(workdir)} - {""}
    if len(devices) != 1:
        found = " and ".join(sorted(devices)) or "none"
        raise ValueError(f"{workdir} must have run on one number of devices of one kind to be measured; it has {found}")
    count, _, kind = devices.pop().partition(" x ")
    chip = accelerator_of_kind(kind)
    if chip is None or not count.isdigit():
        kinds = ", ".join(kind for each in ACCELERATORS.values() for kind in each.kinds)
        raise ValueError(f"{workdir} ran on {count} x {kind}; plans are made for {kinds}")
    rows = read_metrics(workdir / METRICS_FILE)
    medians = medians_of_phases(rows, config.curriculum.table, "seconds")
    if not medians:
        count = sum(row["kind"] == "train" for row in rows)
        raise ValueError(f"{workdir} has {count} steps in all; {LEAST_STEPS} of a phase are needed to be measured")
    return OwnRun(workdir=workdir, config=config, chip=chip, num_chips=int(count), seconds=medians)


def check_slice(run: OwnRun, *, topology: str) -> None:
    """Check that a run's devices are a slice.

    Raises:
      ValueError: they are of another generation, or of another number.
    """
    chip, count = chip_of(topology), num_chips(topology.partition(":")[2])
    if (run.chip, run.num_chips) != (chip, count):
        raise ValueError(
            f"{run.workdir} ran on {run.num_chips} chips of {run.chip.name}; --topology={topology} has {count} of "
            f"{chip.name}"
        )


def measured_points(run: OwnRun, plan: SlicePlan) -> list[Point]:
    """Return the measured phases of a run with the parts that its plan has."""
    return [
        Point(
            name=f"{run.workdir.name}, phase {phase.phase.index + 1} on {plan.topology}",
            chip=run.chip.name,
            measured=run.seconds[phase.phase.index],
            parts=phase.step_time.parts,
            hfu=phase.executed_flops / phase.peak_flops / run.seconds[phase.phase.index],
        )
        for phase in plan.phases
        if phase.phase.index in run.seconds
    ]


def format_measured(points: list[Point], plan: SlicePlan) -> str:
    """Return measured beside planned, a line a phase."""
    phases = {phase.step_time.parts: phase for phase in plan.phases}
    lines = []
    for point in points:
        step = phases[point.parts].step_time
        lines.append(
            f"Measured, {point.name}: {point.measured:.3f} s a step, {point.measured / step.central:.2f} times the "
            f"{step.central:.3f} s planned; HFU {point.hfu:.1%}"
        )
    return "\n".join(lines)
