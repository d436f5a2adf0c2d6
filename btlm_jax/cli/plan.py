"""`btlm plan`: compile a config's train steps for TPUs or GPUs, or time them here; search a layout; table of pods."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from btlm_jax.cli import DONE, ERROR, UsageError
from btlm_jax.cli.parse import Flags
from btlm_jax.storage.files import write_atomically

if TYPE_CHECKING:
    from btlm_jax.plan.compiling import CompileCache
    from btlm_jax.plan.own_runs import OwnRun
    from btlm_jax.recipe.config import TrainConfig

PLAN_HELP = """btlm plan: compile a config's train steps for a TPU slice or for GPUs, here, without one.

examples:  btlm plan --config=pods/v5e_256 --topology=v5e:16x16 --usd_per_chip_hour=1.2 --json=plan.json
           btlm plan --config=btlm_3b_8k --topology=v5p:4x4x2 --search
           btlm plan --config=gpu/80gb_8:1.3B --topology=h100-8
           btlm plan --config=btlm_3b_8k --topology=v6e-64 --check
           btlm plan --table=configs/pods/table.json

What is compiled is what btlm train would run on that slice, for every phase. Says whether it fits the memory and by
how much, which sizes the mesh does not divide and which layouts would, what the chips exchange, and a prediction of
step time, MFU, days and cost. Takes minutes and libtpu (pip install 'btlm_jax[tpu]'). Exit code 0 when the config would
run on the slice, 1 when it would not.

GPUs: h100-N, h200-N, a100-N (of 80 GB) with N = 1, 2, 4, 8, and machines of eight: h100-16. With JAX's CUDA plugin
(pip install 'btlm_jax[cuda]', 3 GB) the steps are compiled; without it memory is by a formula, and says so.
--topology=cpu compiles the steps for the CPU here and times them, as btlm new --machine=this does.

--slices=2 compiles for two such slices, joined over the data-center network: each stores all parameters, sequences are
split between them, and only gradients are exchanged over the network.
--search tries mesh x model.remat x mesh.accumulation, the most promising first, and prints the flags of the fastest
layout that fits, of those that leave a tenth of the memory if there are any. What cannot win is not compiled. The same
command goes on after an interruption, or after --max_compiles.
--measured=WORKDIR plans the config of a run that has trained a few steps on the slice, prints what they took beside
what was planned, and keeps that: later plans for the same chips are corrected by it.
--check compiles nothing: it asks the table of layouts, table.json of the config's folder if that is pods or family,
else of a folder pods beside the config. Exit code 1 when the layout does not divide or, by the table, does not fit; 0
with a note when the table does not have it.
--table compiles the configs in the folder of FILE and their OTHERS again, and writes FILE and the same in Markdown;
--only=v5e_256,family:111M@v5e-8 those alone, and the other rows stay.

Times are a central value and its range, calibrated on published runs of other models, with the parts under them.
"""


# What each mode takes beside --config and --topology.
_FLAGS_OF = {
    "plan": ("json", "usd_per_chip_hour", "cache", "slices", "measured"),
    "search": ("json", "usd_per_chip_hour", "cache", "max_compiles"),
    "check": (),
    "table": ("cache", "only"),
}


def plan(arguments: Sequence[str]) -> int:
    """Run `btlm plan`; return the exit code."""
    flags = plan_flags()
    if not flags.parse(arguments):
        return DONE
    mode = _mode(flags)
    if mode == "table":
        return _make_table(flags)
    target = flags.optional_path("json")
    if target is not None and (target.is_dir() or not os.access(target.parent, os.W_OK)):  # before minutes of compiling
        raise OSError(f"--json={target} cannot be written: it is a directory, or {target.parent} is none to write to")
    measured = _own_run(flags)
    config = measured.config if measured else flags.config()
    if not flags.string("topology"):
        raise UsageError("btlm plan needs --topology, for example --topology=v5e:16x16, v5litepod-256, h100-8 or cpu")
    price = flags.number("usd_per_chip_hour")
    if price < 0:
        raise UsageError(f"--usd_per_chip_hour={price:g} must not be negative")
    if flags.string("topology") == "cpu":
        return _plan_cpu(flags, config, mode)
    from btlm_jax.plan.chips import topology_named

    topology = topology_named(flags.string("topology"))
    if mode == "check":
        return _check(config, flags, topology=topology)
    _use_no_accelerator()
    slices = flags.integer("slices")
    if slices < 1:
        raise UsageError(f"--slices={slices} must be at least 1")
    if measured:
        from btlm_jax.plan import own_runs

        if slices > 1:
            raise UsageError("--measured takes a run on one slice: leave out --slices")
        own_runs.check_slice(measured, topology=topology)
    run = _search if mode == "search" else functools.partial(_plan, slices=slices, measured=measured)
    content, text, works = run(config, topology=topology, cache=_cache(flags, mode), price=price)
    if target is not None:
        write_atomically(target, json.dumps(content, indent=2))
    print(text)
    return DONE if works else ERROR


def _plan_cpu(flags: Flags, config: TrainConfig, mode: str) -> int:
    """Measure a config's steps on the CPU here; return the exit code."""
    given = [f"--{name}" for name in (*_FLAGS_OF["plan"], *_FLAGS_OF["search"]) if flags.is_given(name)]
    if mode != "plan" or given:
        raise UsageError(f"--topology=cpu measures the config as it is: leave out {', '.join(given) or f'--{mode}'}")
    _use_no_accelerator()
    from btlm_jax.plan.measured_step import format_here, measure_as_laid_out

    measured = measure_as_laid_out(config, report_progress=_print_progress)
    print(format_here(measured))
    return DONE if measured.fits else ERROR


def _own_run(flags: Flags) -> OwnRun | None:
    """Return the run whose steps were measured, if one is given."""
    if not flags.is_given("measured"):
        return None
    if flags.is_given("config") or flags.changes:
        raise UsageError("--measured takes the config from the run: leave out --config")
    from btlm_jax.plan.own_runs import read_own_run

    return read_own_run(flags.run_path("measured"))


def _plan(
    config: TrainConfig,
    *,
    topology: str,
    cache: CompileCache,
    price: float,
    slices: int,
    measured: OwnRun | None,
) -> tuple[dict, str, bool]:
    """Return the plan as JSON, as a table, and whether it works; keep what was measured for later plans."""
    from btlm_jax.plan.plan_report import format_plan, plan_to_json
    from btlm_jax.plan.slice_plan import plan_run

    published = dataclasses.replace(cache, measured=None) if measured else cache  # a run is not held against itself
    planned = plan_run(config, topology=topology, cache=published, report_progress=_print_progress, slices=slices)
    content = plan_to_json(planned, usd_per_chip_hour=price)
    text = format_plan(planned, usd_per_chip_hour=price)
    if measured:
        from btlm_jax.plan.calibration import keep_points
        from btlm_jax.plan.own_runs import format_measured, measured_points

        points = measured_points(measured, planned)
        assert cache.measured is not None, "plans have it"
        keep_points(points, directory=cache.measured)
        content["measured"] = {point.name: point.measured for point in points}
        text += f"\n\n{format_measured(points, planned)}\nKept in {cache.measured}: later plans of "
        text += f"{measured.chip.name} are corrected by steps of about such a length, in place of the published runs."
    return content, text, planned.works


def _search(config: TrainConfig, *, topology: str, cache: CompileCache, price: float) -> tuple[dict, str, bool]:
    """Return the same of a search, which works if any layout does."""
    from btlm_jax.plan.search import search_layouts
    from btlm_jax.plan.search_report import format_search, search_to_json

    result = search_layouts(config, topology=topology, cache=cache, report_progress=_print_progress)
    return search_to_json(result, usd_per_chip_hour=price), format_search(result), result.best is not None


def _check(config: TrainConfig, flags: Flags, *, topology: str) -> int:
    """Ask the table of layouts; return the exit code."""
    from btlm_jax.plan import chips, pod_table, slice_plan

    chip, count = chips.chip_of(topology), chips.num_chips(topology.partition(":")[2])
    if not isinstance(chip, chips.Chip):
        raise UsageError("--check asks a table of layouts, which has TPU slices only: leave it out to plan for GPUs")
    if problems := slice_plan.layout_problems(config, num_devices=count, chip=chip):
        raise ValueError(f"the config does not divide {topology}:\n  " + "\n  ".join(problems))
    file, changes = flags.config_file_and_argument(), flags.changes
    print(pod_table.check_layout_fits(config, config_file=file, changes=changes, chip=chip.name, num_chips=count))
    return DONE


def _make_table(flags: Flags) -> int:
    """Compile the table of layouts again; return the exit code."""
    given = [name for name in ("config", "topology") if flags.is_given(name)]
    given += [f"config.{key}" for key in flags.changes]
    if given:
        raise UsageError(
            "--table takes configs and their slices from the file's folder: leave out "
            + ", ".join(f"--{name}" for name in given)
        )
    _use_no_accelerator()
    from btlm_jax.plan.make_table import make_table

    only = [name for name in flags.string("only").split(",") if name]
    problems = make_table(flags.path("table"), cache=_cache(flags, "table"), report_progress=_print_progress, only=only)
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print(f"Wrote {flags.string('table')} and the same in Markdown")
    return ERROR if problems else DONE


def _mode(flags: Flags) -> str:
    """Return which of the modes the flags ask for, after checking that no flag is of another."""
    modes = [mode for mode in ("search", "check") if flags.boolean(mode)] + ["table"] * flags.is_given("table")
    if len(modes) > 1:
        raise UsageError(f"give one of --{' and --'.join(modes)}")
    mode = modes[0] if modes else "plan"
    for name in sorted({name for names in _FLAGS_OF.values() for name in names} - set(_FLAGS_OF[mode])):
        if flags.is_given(name):
            raise UsageError(f"--{name} has no effect {'without --search' if mode == 'plan' else f'on --{mode}'}")
    return mode


def _cache(flags: Flags, mode: str) -> CompileCache:
    from btlm_jax.plan.calibration import MEASURED_FOLDER
    from btlm_jax.plan.compiling import CompileCache, default_cache

    max_compiles = flags.integer("max_compiles")
    if max_compiles < 0:
        raise UsageError(f"--max_compiles={max_compiles} must not be negative")
    directory = flags.optional_path("cache") or default_cache()
    return CompileCache(
        directory=directory,
        max_compiles=max_compiles if mode == "search" else math.inf,
        measured=None if mode == "table" else directory / MEASURED_FOLDER,  # a table is by the frozen calibration
    )


def _use_no_accelerator() -> None:
    """Leave this machine's own accelerators out of it."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def plan_flags() -> Flags:
    """Define the flags of `btlm plan`."""
    flags = Flags(PLAN_HELP)
    flags.define_config()
    flags.define_string(
        "topology", "", "the slice: v5e:16x16, v5p:4x4x8, ..., an accelerator type as v5litepod-256; h100-8, ...; cpu"
    )
    flags.define_integer("slices", 1, "how many slices of --topology, joined over the data-center network")
    flags.define_boolean("search", False, "try layouts and print the best")
    flags.define_integer("max_compiles", 12, "most compilations that --search makes")
    flags.define_boolean("check", False, "ask the table of layouts, without compiling")
    flags.define_string("table", "", "file of the table of layouts to make again")
    flags.define_string(
        "measured", "", "workdir of a run on the slice: its seconds a step beside the plan, and for later plans"
    )
    flags.define_string("only", "", "names of configs, with commas, of which alone --table makes the rows again")
    flags.define_string("json", "", "file for the plan, or the search, as JSON")
    flags.define_float("usd_per_chip_hour", 0.0, "price of a chip, or a GPU; with it the plan has a cost")
    flags.define_string(
        "cache", "", "directory of what compilations said, the same one is not repeated; or plan/ in the user's cache"
    )
    return flags


def _print_progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
