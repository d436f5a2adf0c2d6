"""Plan the configs of configs/gpu/ for GPUs that are not there, and write the table of benchmarks/results/gpu_plans.md.

    python benchmarks/gpu_plans.py                  # all, an hour of two cores, with pip install 'btlm_jax[cuda]'
    python benchmarks/gpu_plans.py 80gb_8 h200_1    # the rows of these files, printed
    python benchmarks/gpu_plans.py --max_compiles=0 # of what was compiled before; rows of other configs are left out
    python benchmarks/gpu_plans.py --runs           # the published runs that correct the times, results/gpu_runs.md

Results of compiling are kept in --cache, so that the same command goes on after an interruption. A row is a phase: what
a GPU needs, as compiled (state and batch, the step, cuDNN's workspace by formula), its share of the nine tenths of the
memory that JAX may take, what the formula says that is used where nothing can be compiled, and the predicted step.
"""

from __future__ import annotations

import argparse
import datetime
import runpy
import sys
from pathlib import Path

import jax

from btlm_jax.cli.parse import find_config, load_config
from btlm_jax.plan.calibration import correction_by, left_out
from btlm_jax.plan.chips import GIB, topology_named
from btlm_jax.plan.compiling import CompileCache, NoCompilationsLeftError, default_cache, versions_for
from btlm_jax.plan.gpu_estimate import GpuPhasePlan
from btlm_jax.plan.gpu_roofline import published_gpu_points
from btlm_jax.plan.gpus import GPUS, has_cuda_plugin
from btlm_jax.plan.slice_plan import SlicePlan, plan_run
from btlm_jax.recipe.config import train_config_from
from btlm_jax.storage.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGIES = {
    "80gb_1": ("h100-1", "a100-1"), "80gb_8": ("h100-8", "a100-8"), "h200_1": ("h200-1",), "h200_8": ("h200-8",),
}  # fmt: skip
REPORT = ROOT / "benchmarks" / "results" / "gpu_plans.md"
COMMAND = "python benchmarks/gpu_plans.py"
RUNS_REPORT = REPORT.with_name("gpu_runs.md")
HEAD = (
    "| config | GPUs | micro-batches, remat | tokens | GiB of a GPU: state + step + cuDNN = all | of the most "
    "| by formula | step, s | MFU | HFU |\n|---|---|---|---|---|---|---|---|---|---|"
)


def rows_of(name: str, plan: SlicePlan) -> list[str]:
    """Return the rows of a config's plan."""
    layout = f"{plan.layout.mesh.accumulation}, `{plan.layout.remat}`"
    rows = []
    for each in plan.phases:
        assert isinstance(each, GpuPhasePlan)
        memory, step = each.memory, each.step_time
        state = memory.parameters + memory.optimizer + memory.other_arguments
        beside = memory.temporaries + memory.outputs + memory.code
        parts = " + ".join(f"{part / GIB:.2f}" for part in (state, beside, memory.workspace))
        rows.append(
            f"| `{name}` | {plan.topology} | {layout} | {each.phase.batch_size} × {each.phase.seq_len:,} | {parts} = "
            f"{memory.needed / GIB:.1f} | {memory.needed / memory.available:.0%} | {each.formula_bytes / GIB:.1f} | "
            f"{step.central:.2f} ({step.low:.2f} to {step.high:.2f}) | {each.mfu(step.central):.0%} | {each.hfu:.0%} |"
        )
    return rows + [f"| `{name}` | {plan.topology} | {layout} | {problem} | | | | | | |" for problem in plan.problems]


def make_runs_report() -> str:
    """Return the table of published runs: measured, their roofline, and what the others predict."""
    points = published_gpu_points()
    lines = [
        "| run | measured, s | roofline, s | measured / roofline | by the others, s | error | HFU |",
        "|---|---|---|---|---|---|---|",
    ]
    for each, predicted in left_out(points):
        lines.append(
            f"| {each.name} | {each.measured:.3f} | {each.parts.roofline:.3f} | {each.ratio:.2f} | {predicted:.3f} | "
            f"{predicted / each.measured - 1:+.0%} | {each.hfu:.1%} |"
        )
    corrections = {gpu: correction_by(points, chip=gpu) for gpu in ("h100", "a100")}
    factors = ", ".join(f"{each.factor:.2f} on {gpu}" for gpu, each in corrections.items())
    error = corrections["h100"].error
    return "\n".join([*lines, "", f"Factors: {factors}. Root mean square error, leaving one out: {error:.0%}."])


def _print_progress(said: str) -> None:
    print(said, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="of configs/gpu/; all without")
    parser.add_argument("--max_compiles", type=int, default=1000)
    parser.add_argument("--runs", action="store_true")
    parser.add_argument("--cache", type=Path, default=default_cache())
    arguments = parser.parse_args()
    if unknown := set(arguments.files) - set(TOPOLOGIES):
        parser.error(f"configs/gpu/ has no {', '.join(sorted(unknown))}, but {', '.join(TOPOLOGIES)}")
    if arguments.runs:
        write_atomically(RUNS_REPORT, make_runs_report() + "\n")
        return
    jax.config.update("jax_platforms", "cpu")
    cache = CompileCache(directory=arguments.cache, max_compiles=arguments.max_compiles)
    rows, left_out = [], []
    for file in arguments.files or TOPOLOGIES:
        for size in runpy.run_path(str(ROOT / "configs" / "gpu" / f"{file}.py"))["LAYOUTS"]:
            config = train_config_from(load_config(find_config(f"gpu/{file}"), argument=size, changes={}))
            for topology in map(topology_named, TOPOLOGIES[file]):
                name = f"gpu/{file}:{size}"
                try:
                    plan = plan_run(config, topology=topology, cache=cache, report_progress=_print_progress)
                except NoCompilationsLeftError as error:
                    left_out.append(f"`{name}` on {topology}")
                    print(f"{name} on {topology} is left out: {error}")
                    continue
                rows += rows_of(name, plan)
                print(*rows_of(name, plan), sep="\n", flush=True)
    if not arguments.files:
        made_by = ", ".join(f"{name} {version}" for name, version in versions_for(GPUS["h100"]).items())
        how = "compiled, nothing run" if has_cuda_plugin() else "by formula, not compiled"
        said = f"{datetime.date.today().isoformat()}, {made_by}: {how}. Times are predicted, of no run of this code."
        said += f" Not compiled: {', '.join(left_out)}." if left_out else ""
        write_atomically(REPORT, "\n".join(["# Plans for GPUs", "", f"`{COMMAND}`", "", said, "", HEAD, *rows, ""]))


if __name__ == "__main__":
    main()
