"""Where a sized config is to run: its layout and dtype there, with memory and time as planned, stored or measured.

A `Placement` holds what the rules of recipe/sizes.py do not decide. A slice's comes out of a search (`searched`) or out
of a table that `btlm plan --table` made (`from_table`); this machine's has a step measured (measured_step.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from btlm_jax.plan.chips import GIB
from btlm_jax.plan.compiling import versions_for
from btlm_jax.plan.layout import MeshLayout
from btlm_jax.plan.pod_table import read_table, read_versions, training_fields
from btlm_jax.plan.search import SPARE, SearchResult
from btlm_jax.recipe.config import MeshConfig, TrainConfig, divisors
from btlm_jax.recipe.curriculum import Curriculum

CPU = "cpu"
CPU_MICRO_BATCH = 8192  # tokens: a step of more computes no faster on a CPU, and needs more memory

_MEANINGS = {
    "mesh.tensor": "ways that heads and d_ff are split",
    "mesh.context": "ways that positions are split",
    "mesh.accumulation": "micro-batches a step",
    "model.remat": "what the backward pass keeps",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """A layout, and what a config file says of it."""

    topology: str  # the slice; "" for any other place
    where: str  # the same for a title: ", on v5e:2x4"
    dtype: str
    layout: MeshLayout
    why: Mapping[str, str]  # comments of keys, as config_text.format_config takes them
    memory: str  # what is known of memory and time, a line each
    time: str


def nowhere() -> Placement:
    """Return the placement of a config of which it is not said where it is to run."""
    return Placement(
        topology="",
        where="",
        dtype="bfloat16",
        layout=MeshLayout(mesh=MeshConfig(tensor=1, context=1, accumulation=1), remat="full"),
        why={},
        memory="not planned: btlm plan --config=THIS --topology=SLICE --search",
        time="not planned",
    )


def cpu_placement(curriculum: Curriculum) -> Placement:
    """Return the placement on a CPU, nothing measured."""
    batch = math.gcd(*(phase.batch_size for phase in curriculum.phases))
    counts = divisors(batch)
    accumulation = next(
        (count for count in counts if curriculum.tokens_per_step // count <= CPU_MICRO_BATCH), counts[-1]
    )
    return Placement(
        topology="",
        where=", on a CPU",
        dtype="float32",
        layout=MeshLayout(mesh=MeshConfig(tensor=1, context=1, accumulation=accumulation), remat="matmuls_saved"),
        why={
            "model.dtype": "of activations: what CPUs compute",
            "model.remat": "the fastest on a CPU (LOG.md)",
            "mesh.accumulation": f"micro-batches a step, of at most {CPU_MICRO_BATCH:,} tokens or one sequence",
        },
        memory="not measured: btlm new --machine=this",
        time="not measured",
    )


def searched(result: SearchResult) -> Placement:
    """Return the placement that a search found best.

    Raises:
      ValueError: no layout fits.
    """
    best = result.best
    if best is None:
        reasons = [*result.problems, *(problem for plan in result.tried for problem in plan.problems)]
        reasons += [f"{skip.layout}: {skip.reason}, {skip.detail}" for skip in result.skipped[:3]]
        raise ValueError(
            f"no layout of this config runs on {result.topology}, {result.num_chips} chips: "
            + "; ".join(reasons[:4])
            + "; take another slice, or more compilations (--max_compiles)"
        )
    made = "planned by formula" if result.is_by_formula else "compiled"
    how = f"the fastest of {len(result.tried)} layouts {made} for {result.topology}"
    if best.spare < SPARE:
        how += f", none of which leaves {SPARE:.0%} of the memory"
    return _planned(
        topology=result.topology,
        num_chips=result.num_chips,
        layout=best.layout,
        needed=best.needed,
        available=best.chip.hbm_bytes,
        seconds=best.seconds,
        versions=versions_for(best.chip),
        how=how,
    )


def from_table(config: TrainConfig, *, topology: str, table: Path) -> Placement:
    """Return the fastest placement that a table has of this config on a slice.

    Raises:
      ValueError: it has none that fits, or cannot be read.
      OSError: there is no such file.
    """
    fields, versions = training_fields(config), read_versions(table)
    own = [row for row in read_table(table) if row.topology == topology and row.trains == fields and row.fits]
    if not own:
        raise ValueError(
            f"{table} has no layout of this config that fits on {topology}; leave --plan_from out to search for one, "
            f"or make the table again: btlm plan --table={table}"
        )
    curriculum = config.curriculum.table
    row = min(own, key=lambda row: row.run_seconds(curriculum)[1])
    return _planned(
        topology=topology,
        num_chips=row.num_chips,
        layout=row.layout,
        needed=row.needed,
        available=row.available,
        seconds=row.run_seconds(curriculum),
        versions=versions,
        how=f"compiled for {topology} (btlm plan --table)",
    )


def _planned(
    *,
    topology: str,
    num_chips: int,
    layout: MeshLayout,
    needed: int,
    available: int,
    seconds: tuple[float, float],
    versions: Mapping[str, str],
    how: str,
) -> Placement:
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Placement(
        topology=topology,
        where=f", on {topology}",
        dtype="bfloat16",
        layout=layout,
        why={key: f"{meaning}: {how}" for key, meaning in _MEANINGS.items()},
        memory=(
            f"predicted: {needed / GIB:.2f} of a chip's {available / GIB:.2f} GiB on {topology}, {num_chips} chips, "
            f"{1 - needed / available:.0%} to spare"
        ),
        time=f"predicted: {span(*seconds)}, of steps alone (docs/guide/plan.md; {made_by})",
    )


def span(*seconds: float) -> str:
    """Return a time, or a range from the least to the most, in the unit that suits it."""
    most = max(seconds)
    unit, size = next(
        ((unit, size) for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)) if most >= 2 * size),
        ("seconds", 1.0),
    )
    return f"{' to '.join(f'{value / size:.1f}' for value in seconds)} {unit}"
