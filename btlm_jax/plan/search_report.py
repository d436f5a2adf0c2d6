"""The result of a search as text and as JSON."""

from __future__ import annotations

import collections
import dataclasses

from btlm_jax.plan.chips import GIB
from btlm_jax.plan.estimate import PhasePlan
from btlm_jax.plan.plan_report import plan_to_json
from btlm_jax.plan.search import NOT_REACHED, SPARE, SearchResult
from btlm_jax.plan.slice_plan import SlicePlan

_DAY = 86_400.0


def format_search(search: SearchResult) -> str:
    """Return the compiled layouts, the best first, why others were skipped, and the flags of the best."""
    how = "planned by formula" if search.is_by_formula else "compiled"
    lines = [
        f"{search.topology}, {search.num_chips} chips: {len(search.tried)} layouts {how}, {len(search.skipped)} not"
    ]
    lines += [f"PROBLEM: {problem}" for problem in search.problems]
    for rank, plan in enumerate(search.tried, start=1):
        lines += [f"{rank:>3}. {plan.layout}", *(f"     {line}" for line in _outcome_lines(plan))]
    lines += _skipped_lines(search, how=how)
    if search.best:
        if search.best.spare < SPARE:
            lines += [f"None leaves {SPARE:.0%} of a chip's memory, as a run should."]
        lines += ["Predicted, not measured; btlm plan with the flags of a layout prints the assumptions. The best:"]
        lines += [search.best.layout.flags]
    elif any(skip.reason == NOT_REACHED for skip in search.skipped):
        lines += ["None of these fits: the same command with a larger --max_compiles tries more."]
    elif not search.problems:
        lines += ["None fits: try a slice with more chips."]
    return "\n".join(lines)


def search_to_json(search: SearchResult, *, usd_per_chip_hour: float) -> dict:
    """Return a search as a dict for `json.dumps`, each layout as `plan_to_json` returns it."""
    return {
        "topology": search.topology,
        "num_chips": search.num_chips,
        "best_flags": search.best.layout.flags if search.best else "",
        "tried": [plan_to_json(plan, usd_per_chip_hour=usd_per_chip_hour) for plan in search.tried],
        "skipped": [dataclasses.asdict(skip) for skip in search.skipped],
        "problems": list(search.problems),
    }


def _outcome_lines(plan: SlicePlan) -> list[str]:
    if not plan.works:
        return list(plan.problems)
    low, high = plan.seconds
    return [
        f"{plan.needed / GIB:.2f} of {plan.chip.hbm_bytes / GIB:.2f} GiB a chip, {plan.spare:.0%} to spare; "
        f"the run {plan.central_seconds / _DAY:.1f} days ({low / _DAY:.1f} to {high / _DAY:.1f})",
        *(_phase_line(phase) for phase in plan.phases),
    ]


def _phase_line(plan: PhasePlan) -> str:
    step = plan.step_time
    return (
        f"{plan.phase.batch_size:,} x {plan.phase.seq_len:,}: step {step.central:.3f} s ({step.low:.3f} to "
        f"{step.high:.3f}), MFU {plan.mfu(step.central):.1%}, HFU {plan.hfu:.1%}"
    )


def _skipped_lines(search: SearchResult, *, how: str) -> list[str]:
    """Return a line for each reason, with its first layout as an example."""
    by_reason = collections.defaultdict(list)
    for skip in search.skipped:
        by_reason[skip.reason].append(skip)
    return [
        f"{len(skips)} not {how}, {reason}: for example {skips[0].layout} ({skips[0].detail})"
        for reason, skips in by_reason.items()
    ]
