"""The verb that looks ahead: plan."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli.parse import DONE, ERROR, UsageError, config_file, config_flag, parse_config, parse_flags
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.storage.files import cache_directory, write_atomically

PLAN_HELP = """btlm plan: compile a config's train steps for a TPU slice, here, without one.

examples:  btlm plan --config=configs/pods/v5e_256.py --topology=v5e:16x16 --usd-per-chip-hour=1.2 --json=plan.json
           btlm plan --config=configs/btlm_3b_8k.py --topology=v5p:4x4x2 --search
           btlm plan --config=configs/btlm_3b_8k.py --topology=v6e-64 --check
           btlm plan --table=configs/pods/table.json

What is compiled is what btlm train would run on that slice, for every phase. Says whether it fits the memory and by
how much, which sizes the mesh does not divide and which layouts would, what the chips exchange, and a prediction of
step time, MFU, days and cost. Takes minutes and libtpu (pip install 'btlm_jax[tpu]'). Exit code 0 when the config would
run on the slice, 1 when it would not.

--search tries mesh x model.remat x mesh.accumulation, the most promising first, and prints the flags of the fastest
layout that fits, of those that leave a tenth of the memory if there are any. What cannot win is not compiled. The same
command goes on after an interruption, or after --max-compiles.
--check compiles nothing: it asks the table of layouts in the folder pods beside the config file. Exit code 1 when the
layout does not divide or, by the table, does not fit; 0 with a note when the table does not have it.
--table compiles the configs in the folder of FILE and their OTHERS again, and writes FILE and the same in Markdown.
"""


# What each mode takes beside --config and --topology.
_FLAGS_OF = {
    "plan": ("json", "usd-per-chip-hour", "cache"),
    "search": ("json", "usd-per-chip-hour", "cache", "max-compiles"),
    "check": (),
    "table": ("cache",),
}


def plan(arguments: Sequence[str]) -> int:
    """Run `btlm plan`; return the exit code."""
    values = _flags()
    if any(argument.split("=")[0] in ("--table", "-table") for argument in arguments):
        return _make_table(values, arguments)
    config = parse_config(values, arguments, help_text=PLAN_HELP)
    if config is None:
        return DONE
    mode = _mode(values)
    if not values["topology"].value:
        raise UsageError("btlm plan needs --topology, for example --topology=v5e:16x16 or --topology=v5litepod-256")
    price = values["usd-per-chip-hour"].value
    if price < 0:
        raise UsageError(f"--usd-per-chip-hour={price:g} must not be negative")
    topology = importlib.import_module("btlm_jax.plan.chips").topology_named(values["topology"].value)
    if mode == "check":
        return _check(config, config_file(values), topology=topology)
    _use_no_accelerator()
    act = _search if mode == "search" else _plan
    content, text, works = act(config, topology=topology, cache=_cache(values, mode), price=price)
    if values["json"].value:
        write_atomically(Path(values["json"].value), json.dumps(content, indent=2))
    print(text)
    return DONE if works else ERROR


def _plan(config: TrainConfig, *, topology: str, cache, price: float) -> tuple[dict, str, bool]:
    """Return the plan as JSON, as a table, and whether it works."""
    planned = importlib.import_module("btlm_jax.plan.slice_plan").plan_run(
        config, topology=topology, cache=cache, report_progress=_print_progress
    )
    report = importlib.import_module("btlm_jax.plan.plan_report")
    content = report.plan_to_json(planned, usd_per_chip_hour=price)
    return content, report.format_plan(planned, usd_per_chip_hour=price), planned.works


def _search(config: TrainConfig, *, topology: str, cache, price: float) -> tuple[dict, str, bool]:
    """Return the same of a search, which works if any layout does."""
    found = importlib.import_module("btlm_jax.plan.search").search_layouts(
        config, topology=topology, cache=cache, report_progress=_print_progress
    )
    report = importlib.import_module("btlm_jax.plan.search_report")
    return report.search_to_json(found, usd_per_chip_hour=price), report.format_search(found), found.best is not None


def _check(config: TrainConfig, file: Path, *, topology: str) -> int:
    """Ask the table of layouts; return the exit code."""
    chips = importlib.import_module("btlm_jax.plan.chips")
    chip, count = chips.chip_of(topology), chips.num_chips(topology.partition(":")[2])
    slice_plan = importlib.import_module("btlm_jax.plan.slice_plan")
    if problems := slice_plan.layout_problems(config, num_devices=count, chip=chip):
        raise ValueError(f"the config does not divide {topology}:\n  " + "\n  ".join(problems))
    pod_table = importlib.import_module("btlm_jax.plan.pod_table")
    print(pod_table.check_layout_fits(config, config_file=file, chip=chip.name, num_chips=count))
    return DONE


def _make_table(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Compile the table of layouts again; return the exit code."""
    if not parse_flags(values, arguments, help_text=PLAN_HELP):
        return DONE
    mode = _mode(values)
    if values["config"].present or values["topology"].present:
        raise UsageError("--table takes configs and their slices from the file's folder: leave out the other two flags")
    _use_no_accelerator()
    make_table = importlib.import_module("btlm_jax.plan.make_table").make_table
    wrong = make_table(Path(values["table"].value), cache=_cache(values, mode), report_progress=_print_progress)
    for problem in wrong:
        print(f"PROBLEM: {problem}")
    print(f"Wrote {values['table'].value} and the same in Markdown")
    return ERROR if wrong else DONE


def _mode(values: flags.FlagValues) -> str:
    """Return which of the modes the flags ask for, after checking that no flag is of another."""
    asked = [mode for mode in ("search", "check", "table") if values[mode].value]
    if len(asked) > 1:
        raise UsageError(f"give one of --{' and --'.join(asked)}")
    mode = asked[0] if asked else "plan"
    for name in sorted({name for names in _FLAGS_OF.values() for name in names} - set(_FLAGS_OF[mode])):
        if values[name].present:
            raise UsageError(f"--{name} says nothing {'without --search' if mode == 'plan' else f'to --{mode}'}")
    return mode


def _cache(values: flags.FlagValues, mode: str):
    cache = importlib.import_module("btlm_jax.plan.compiling").CompileCache
    most = values["max-compiles"].value
    if most < 0:
        raise UsageError(f"--max-compiles={most} must not be negative")
    directory = Path(values["cache"].value).expanduser() if values["cache"].value else cache_directory() / "plan"
    return cache(directory=directory, max_compiles=most if mode == "search" else math.inf)


def _use_no_accelerator() -> None:
    """Leave this machine's own accelerators out of it."""
    importlib.import_module("jax").config.update("jax_platforms", "cpu")


def _flags() -> flags.FlagValues:
    values = config_flag()
    flags.DEFINE_string(
        "topology", "", "the slice: v5e:16x16, v5p:4x4x8, ..., or an accelerator type such as v5litepod-256",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("search", False, "try layouts and print the best", flag_values=values)
    flags.DEFINE_integer("max-compiles", 12, "most compilations that --search makes", flag_values=values)
    flags.DEFINE_boolean("check", False, "ask the table of layouts, without compiling", flag_values=values)
    flags.DEFINE_string("table", "", "file of the table of layouts to make again", flag_values=values)
    flags.DEFINE_string("json", "", "file for the plan, or the search, as JSON", flag_values=values)
    flags.DEFINE_float("usd-per-chip-hour", 0.0, "price of a chip; with it the plan has a cost", flag_values=values)
    flags.DEFINE_string(
        "cache", "", "directory of what compilations said, the same one is not repeated; or plan/ in the user's cache",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    return values


def _print_progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
