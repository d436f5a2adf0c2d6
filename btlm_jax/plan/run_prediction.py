"""Predict the times of a run's steps when it starts: on TPUs by the table of layouts, on GPUs by the traced steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from btlm_jax.parallel.make_mesh import num_slices
from btlm_jax.plan import pod_table
from btlm_jax.plan.chips import accelerator_of_kind, chip_of_device, usual_topology
from btlm_jax.plan.gpu_estimate import time_gpu_step
from btlm_jax.plan.gpus import GPUS, GPUS_OF_NODE, Gpu, gpu_topology_named
from btlm_jax.plan.placement import span
from btlm_jax.train.flops import flops_per_token, peak_of_kind
from btlm_jax.train.program import Program
from btlm_jax.train.setup import NO_PREDICTION, StepPrediction


def predict_steps(
    program: Program, traced: Sequence[jax.stages.Traced], *, config_file: Path, measured: Path | None
) -> StepPrediction:
    """Predict a step of each phase, whose traced steps are given; nothing is compiled.

    On TPUs it is what the table beside `config_file` has, which the start has said by then. On GPUs steps of one's own
    runs that `btlm plan` kept in `measured` correct it, where there are any, else published runs of others.

    Raises:
      ValueError: a file is damaged.
    """
    devices = list(program.mesh.devices.flat)
    if devices[0].platform == "gpu":
        return _predict_on_gpus(program, traced, measured=measured)
    chip = chip_of_device(devices[0])
    if chip is None or num_slices(devices) > 1:
        return NO_PREDICTION
    seconds = pod_table.predicted_seconds(
        program.config, config_file=config_file, chip=chip.name, num_chips=len(devices)
    )
    return StepPrediction(said="", seconds=seconds, topology=usual_topology(chip, count=len(devices)))


def _predict_on_gpus(program: Program, traced: Sequence[jax.stages.Traced], *, measured: Path | None) -> StepPrediction:
    kind, count = program.mesh.devices.flat[0].device_kind, program.mesh.size
    gpu = accelerator_of_kind(kind)
    if not isinstance(gpu, Gpu):
        known = ", ".join(each.kind for each in GPUS.values())
        return StepPrediction(said=f"The steps' times are not predicted: {kind} is none of {known}")
    table = program.config.curriculum.table
    steps = [
        time_gpu_step(program, phase, each, gpu=gpu, measured=measured)
        for phase, each in zip(table.phases, traced, strict=True)
    ]
    parts, total = [], 0.0
    for phase, step in zip(table.phases, steps, strict=True):
        counted = phase.tokens_per_step * flops_per_token(program.config.model, seq_len=phase.seq_len)
        share = counted / (count * peak_of_kind(kind))
        parts.append(
            f"{step.central:.3g} s ({step.low:.3g} to {step.high:.3g}) a step of {phase.batch_size:,} x "
            f"{phase.seq_len:,}, MFU {share / step.central:.0%} ({share / step.high:.0%} to {share / step.low:.0%})"
        )
        total += phase.num_steps * step.central
    links = f", exchanges over NVLink in machines of {GPUS_OF_NODE}" if count > 1 else ""
    return StepPrediction(
        said=(
            f"Predicted, not measured, on {count} x {gpu.name}: {'; '.join(parts)}; {span(total)} of steps\n"
            f"  by FLOPs and bytes of the traced steps{links}, x {steps[0].correction.factor:.2f} by "
            f"{steps[0].correction.source}"
        ),
        seconds=tuple(step.central for step in steps),
        topology=_topology(gpu, count=count),
    )


def _topology(gpu: Gpu, *, count: int) -> str:
    """Return what `btlm plan` calls so many GPUs, "" if it plans for no such number."""
    try:
        return gpu_topology_named(f"{gpu.name}-{count}").replace(":", "-")
    except ValueError:
        return ""
