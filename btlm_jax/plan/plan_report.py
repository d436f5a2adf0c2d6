"""A plan as text and as JSON."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from btlm_jax import install_command
from btlm_jax.plan.calibration import best_published_hfu, calibration_hash
from btlm_jax.plan.chips import GIB
from btlm_jax.plan.estimate import ASSUMPTIONS, BETWEEN_SLICES_ASSUMPTION, PhasePlan
from btlm_jax.plan.gpu_estimate import COMPILED_ASSUMPTION, FORMULA_ASSUMPTION, GPU_ASSUMPTIONS, GpuPhasePlan
from btlm_jax.plan.gpu_roofline import gpu_calibration_hash
from btlm_jax.plan.gpus import Gpu
from btlm_jax.plan.slice_plan import SlicePlan
from btlm_jax.recipe.config import describe_mesh
from btlm_jax.train.flops import FLOPS_CONVENTION

_HOUR = 3600.0


def format_plan(plan: SlicePlan, *, usd_per_chip_hour: float) -> str:
    """Return the plan as text; a price of 0 leaves the cost out."""
    axes = describe_mesh(plan.layout.mesh, num_devices=plan.num_chips, slices=plan.slices)
    where = f"{plan.slices} slices of {plan.topology}" if plan.slices > 1 else plan.topology
    lines = [f"{where}: {plan.num_chips} chips as {axes}; {plan.layout}"]
    lines += _gpu_lines(plan) if isinstance(plan.chip, Gpu) else []
    lines += [f"PROBLEM: {problem}" for problem in plan.problems]
    for phase in plan.phases:
        lines += ["", *_phase_lines(plan, phase)]
    if plan.works:
        lines += ["", *_run_lines(plan, usd_per_chip_hour=usd_per_chip_hour)]
    if plan.phases:
        lines += ["", f"Predicted, not measured. FLOPs counted: {FLOPS_CONVENTION}.", "Step time assumes:"]
        lines += [f"  - {assumption}" for assumption in _assumptions(plan)]
    return "\n".join(lines)


def plan_to_json(plan: SlicePlan, *, usd_per_chip_hour: float) -> dict:
    """Return the plan as a dict for `json.dumps`; units are seconds, bytes, FLOPs, US dollars."""
    low, high = plan.seconds
    whole = {
        "days": [low / 24 / _HOUR, high / 24 / _HOUR],
        "days_central": plan.central_seconds / 24 / _HOUR,
        "chip_hours": [plan.num_chips * low / _HOUR, plan.num_chips * high / _HOUR],
    }
    if usd_per_chip_hour:
        whole["usd"] = [usd_per_chip_hour * hours for hours in whole["chip_hours"]]
    return {
        "topology": plan.topology,
        "slices": plan.slices,
        "num_chips": plan.num_chips,
        "mesh": dataclasses.asdict(plan.layout.mesh),
        "remat": plan.layout.remat,
        "works": plan.works,
        "problems": list(plan.problems),
        "phases": [_phase_json(phase) for phase in plan.phases],
        "misfits": [dataclasses.asdict(too_large) for too_large in plan.misfits],
        "run": whole if plan.works else None,
        "flops_convention": FLOPS_CONVENTION,
        "assumptions": _assumptions(plan),
        "calibration": gpu_calibration_hash() if isinstance(plan.chip, Gpu) else calibration_hash(),
    }


def _gpu_lines(plan: SlicePlan) -> list[str]:
    lines = sorted({f"Attention: {each.attention}" for each in plan.phases if isinstance(each, GpuPhasePlan)})
    if plan.is_by_formula:
        lines.append(f"By formula, not compiled; to have the steps compiled, 3 GB: {install_command('cuda')}")
    return lines


def _assumptions(plan: SlicePlan) -> list[str]:
    if isinstance(plan.chip, Gpu):
        return [*GPU_ASSUMPTIONS, FORMULA_ASSUMPTION if plan.is_by_formula else COMPILED_ASSUMPTION]
    return [*ASSUMPTIONS, *[BETWEEN_SLICES_ASSUMPTION] * (plan.slices > 1)]


def collectives_by_kind(each: PhasePlan) -> dict[tuple[str, bool], list[float]]:
    """Return count, bytes and seconds of a step's collectives by (kind, asynchronous?), the slowest first."""
    totals: dict[tuple[str, bool], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for collective in each.collectives:
        total = totals[collective.kind, collective.is_asynchronous]
        total[0] += collective.count
        total[1] += collective.count * collective.num_bytes
        total[2] += collective.seconds
    return dict(sorted(totals.items(), key=lambda item: -item[1][2]))


def _ways_of(each: PhasePlan, kind: str, is_asynchronous: bool) -> str:
    """Return where the collectives of a kind run, the slowest first."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for collective in each.collectives:
        if (collective.kind, collective.is_asynchronous) == (kind, is_asynchronous):
            seconds[collective.way] += collective.seconds
    return "; ".join(sorted(seconds, key=lambda way: -seconds[way]))


def _phase_lines(plan: SlicePlan, each: PhasePlan) -> Iterator[str]:
    memory = each.memory
    spare = memory.available - memory.needed
    by_formula = isinstance(each, GpuPhasePlan) and not each.is_compiled
    how = "by formula, not compiled" if by_formula else f"compiled in {each.compile_seconds:.0f} s"
    yield (
        f"Phase {each.phase.index + 1}: {each.phase.num_steps:,} steps of {each.phase.batch_size:,} x "
        f"{each.phase.seq_len:,} tokens, {how}"
    )
    yield (
        f"  HBM a chip     {_gib(memory.needed)} of {_gib(memory.available)} GiB needed, {_gib(spare)} "
        f"({spare / memory.available:.0%}) to spare"
    )
    yield (
        f"                 parameters {_gib(memory.parameters)}, optimizer {_gib(memory.optimizer)}, batch and padding "
        f"{_gib(memory.other_arguments)}, outputs beyond the donated {_gib(memory.outputs)}, temporaries "
        f"{_gib(memory.temporaries)}, code {_gib(memory.code)}"
        + (f", cuDNN's workspace {_gib(memory.workspace)}" if memory.workspace else "")
        + (f", a second state for a step computed twice {_gib(memory.second_state)}" if memory.second_state else "")
    )
    yield (
        f"  FLOPs a step   {each.counted_flops:.4g} counted, {each.executed_flops:.4g} executed "
        f"({each.executed_flops / each.counted_flops:.2f} times) over all keys"
    )
    yield "  collectives    kind               count      GiB  seconds  of a group"
    for (kind, asynchronous), (count, num_bytes, seconds) in collectives_by_kind(each).items():
        how = "asynchronous" if asynchronous else "alone"
        yield (
            f"    {how:<12} {kind:<18} {count:>5} {_gib(num_bytes):>8} {seconds:>8.3f}  "
            f"{_ways_of(each, kind, asynchronous)}"
        )
    yield from _time_lines(plan, each)


def _time_lines(plan: SlicePlan, each: PhasePlan) -> Iterator[str]:
    step, parts, correction = each.step_time, each.step_time.parts, each.step_time.correction
    worst, best = each.mfu(step.high), each.mfu(step.low)
    yield (
        f"  step           {step.central:.3f} s ({step.low:.3f} to {step.high:.3f}), MFU {each.mfu(step.central):.1%} "
        f"({worst:.1%} to {best:.1%}), HFU {each.hfu:.1%}; x {correction.factor:.2f} +- {correction.error:.0%} by "
        f"{correction.source}"
    )
    if parts.negligible:
        yield (f"                 {step.windowed:.3f} s with windows, MFU {each.mfu_windowed:.1%} of the FLOPs left")
    if (published := best_published_hfu(plan.chip.name)) is not None:
        yield f"                 the best published HFU of a {plan.chip.name} is {published:.1%}"
    if isinstance(each, GpuPhasePlan):
        compiled = f" (those of the compiled program {each.moved_seconds:.3f})" if each.is_compiled else ""
        yield (
            f"  its parts      roofline {parts.roofline:.3f}: products at peak {parts.products:.3f}, attention at peak "
            f"{parts.attention:.3f}, bytes at bandwidth {parts.elementwise:.3f}{compiled};"
        )
        yield f"                 exchanges alone {parts.exposed:.3f}, beside {parts.asynchronous:.3f}"
        return
    yield (
        f"  its parts      roofline {parts.roofline:.3f}, compiler {step.compiler:.3f}: products {parts.products:.3f} "
        f"(at peak {parts.products_at_peak:.3f}), element-wise {parts.elementwise:.3f} (at bandwidth "
        f"{parts.elementwise_at_bandwidth:.3f}),"
    )
    yield (
        f"                 without estimate {parts.unestimated:.3f}, attention {parts.attention:.3f} (outside of "
        f"windows {parts.negligible:.3f}), exchanges alone {parts.exposed:.3f}, beside {parts.asynchronous:.3f}"
    )


def _run_lines(plan: SlicePlan, *, usd_per_chip_hour: float) -> Iterator[str]:
    low, high = (seconds / _HOUR for seconds in plan.seconds)
    yield (
        f"Run: {plan.central_seconds / _HOUR / 24:.1f} days ({low / 24:.1f} to {high / 24:.1f}), "
        f"{plan.num_chips * low:,.0f} to {plan.num_chips * high:,.0f} chip-hours"
    )
    if usd_per_chip_hour:
        costs = [usd_per_chip_hour * plan.num_chips * hours for hours in (low, high)]
        yield f"Cost: {costs[0]:,.0f} to {costs[1]:,.0f} USD at {usd_per_chip_hour:g} a chip-hour"


def time_to_json(each: PhasePlan) -> dict:
    """Return a phase's prediction of time as the plan's JSON and the table have it."""
    step = each.step_time
    return {
        "step_seconds": [step.low, step.high],
        "step_central": step.central,
        "step_with_windows": step.windowed,
        "step_by_compiler": step.compiler,
        "parts": dataclasses.asdict(step.parts),
        "factor": step.correction.factor,
        "error": step.correction.error,
        "mfu": [each.mfu(step.high), each.mfu(step.low)],
        "mfu_central": each.mfu(step.central),
        "mfu_with_windows": each.mfu_windowed,
        "hfu": each.hfu,
    }


def _phase_json(each: PhasePlan) -> dict:
    return {
        "phase": dataclasses.asdict(each.phase),
        "program": each.program,
        "compile_seconds": each.compile_seconds,
        "memory": {**dataclasses.asdict(each.memory), "needed": each.memory.needed},
        "collectives": [dataclasses.asdict(collective) for collective in each.collectives],
        "counted_flops": each.counted_flops,
        "executed_flops": each.executed_flops,
        "peak_flops": each.peak_flops,
        **time_to_json(each),
        **(_of_gpus(each) if isinstance(each, GpuPhasePlan) else {}),
    }


def _of_gpus(each: GpuPhasePlan) -> dict:
    return {
        "compiled": each.is_compiled,
        "attention": each.attention,
        "memory_by_formula": each.formula_bytes,
        "moved_seconds": each.moved_seconds,
    }


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"
