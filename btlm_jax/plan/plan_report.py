"""A plan as text and as JSON."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from btlm_jax.plan.chips import GIB, Chip
from btlm_jax.plan.estimate import ASSUMPTIONS, BETWEEN_SLICES_ASSUMPTION, PhasePlan, seconds_on
from btlm_jax.plan.slice_plan import SlicePlan
from btlm_jax.recipe.config import describe_mesh
from btlm_jax.train.flops import FLOPS_CONVENTION

_HOUR = 3600.0


def format_plan(plan: SlicePlan, *, usd_per_chip_hour: float) -> str:
    """Return the plan as text; a price of 0 leaves the cost out."""
    axes = describe_mesh(plan.layout.mesh, num_devices=plan.num_chips, slices=plan.slices)
    where = f"{plan.slices} slices of {plan.topology}" if plan.slices > 1 else plan.topology
    lines = [f"{where}: {plan.num_chips} chips as {axes}; {plan.layout}"]
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
    }


def _assumptions(plan: SlicePlan) -> list[str]:
    return [*ASSUMPTIONS, *[BETWEEN_SLICES_ASSUMPTION] * (plan.slices > 1)]


def collectives_by_kind(each: PhasePlan, *, chip: Chip) -> dict[tuple[str, bool], list[float]]:
    """Return count, bytes and seconds of a step's collectives by (kind, asynchronous?), the slowest first."""
    totals: dict[tuple[str, bool], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for collective in each.collectives:
        total = totals[collective.kind, collective.is_asynchronous]
        total[0] += collective.count
        total[1] += collective.count * collective.num_bytes
        total[2] += seconds_on(chip, collective)
    return dict(sorted(totals.items(), key=lambda item: -item[1][2]))


def _phase_lines(plan: SlicePlan, each: PhasePlan) -> Iterator[str]:
    memory, step = each.memory, each.step_time
    spare = memory.available - memory.needed
    yield (
        f"Phase {each.phase.index + 1}: {each.phase.num_steps:,} steps of {each.phase.batch_size:,} x "
        f"{each.phase.seq_len:,} tokens, compiled in {each.compile_seconds:.0f} s"
    )
    yield (
        f"  HBM a chip     {_gib(memory.needed)} of {_gib(memory.available)} GiB needed, {_gib(spare)} "
        f"({spare / memory.available:.0%}) to spare"
    )
    yield (
        f"                 parameters {_gib(memory.parameters)}, optimizer {_gib(memory.optimizer)}, batch and padding "
        f"{_gib(memory.other_arguments)}, outputs beyond the donated {_gib(memory.outputs)}, temporaries "
        f"{_gib(memory.temporaries)}, code {_gib(memory.code)}"
    )
    yield (
        f"  FLOPs a step   {each.counted_flops:.4g} counted, {each.executed_flops:.4g} executed "
        f"({each.executed_flops / each.counted_flops:.2f} times) over all keys"
    )
    yield "  collectives    kind               count      GiB  seconds"
    for (kind, asynchronous), (count, num_bytes, seconds) in collectives_by_kind(each, chip=plan.chip).items():
        how = "asynchronous" if asynchronous else "alone"
        yield f"    {how:<12} {kind:<18} {count:>5} {_gib(num_bytes):>8} {seconds:>8.3f}"
    yield (
        f"  step           {step.low:.3f} to {step.high:.3f} s: computation {step.computation:.3f}, attention "
        f"{step.attention:.3f} (of that outside ALiBi's windows {step.negligible:.3f}), collectives alone "
        f"{step.exposed:.3f}, asynchronous {step.asynchronous:.3f}"
    )
    yield f"  MFU            {each.mfu(step.high):.1%} to {each.mfu(step.low):.1%}"


def _run_lines(plan: SlicePlan, *, usd_per_chip_hour: float) -> Iterator[str]:
    low, high = (seconds / _HOUR for seconds in plan.seconds)
    yield (
        f"Run: {low / 24:.1f} to {high / 24:.1f} days, {plan.num_chips * low:,.0f} to {plan.num_chips * high:,.0f} "
        "chip-hours"
    )
    if usd_per_chip_hour:
        costs = [usd_per_chip_hour * plan.num_chips * hours for hours in (low, high)]
        yield f"Cost: {costs[0]:,.0f} to {costs[1]:,.0f} USD at {usd_per_chip_hour:g} a chip-hour"


def _phase_json(each: PhasePlan) -> dict:
    step = each.step_time
    return {
        "phase": dataclasses.asdict(each.phase),
        "program": each.program,
        "compile_seconds": each.compile_seconds,
        "memory": {**dataclasses.asdict(each.memory), "needed": each.memory.needed},
        "collectives": [dataclasses.asdict(collective) for collective in each.collectives],
        "counted_flops": each.counted_flops,
        "executed_flops": each.executed_flops,
        "peak_flops": each.peak_flops,
        "step_seconds": {**dataclasses.asdict(step), "low": step.low, "high": step.high},
        "mfu": [each.mfu(step.high), each.mfu(step.low)],
    }


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"
