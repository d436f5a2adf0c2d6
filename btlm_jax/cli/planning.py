"""The verb that looks ahead: plan."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli.parse import DONE, ERROR, UsageError, config_flag, parse_config
from btlm_jax.files import cache_directory, write_atomically

PLAN_HELP = """btlm plan: compile a config's train steps for a TPU slice, here, without one.

examples:  btlm plan --config=configs/btlm_3b_8k.py --topology=v5e:4x8
           btlm plan --config=configs/btlm_3b_8k.py --topology=v5p:4x4x2 --config.mesh.accumulation=3 \\
               --usd-per-chip-hour=4.2 --json=plan.json

What is compiled is what btlm train would run on that slice, for every phase. Says whether it fits the memory and by
how much, which sizes the mesh does not divide and which layouts would, what the chips exchange, and a prediction of
step time, MFU, days and cost. Takes minutes and libtpu (pip install 'btlm_jax[tpu]'). Exit code 0 when the config would
run on the slice, 1 when it would not.
"""


def plan(arguments: Sequence[str]) -> int:
    """Run `btlm plan`; return the exit code."""
    values = _flags()
    config = parse_config(values, arguments, help_text=PLAN_HELP)
    if config is None:
        return DONE
    topology, price = values["topology"].value, values["usd-per-chip-hour"].value
    if not topology:
        raise UsageError("btlm plan needs --topology, for example --topology=v5e:16x16")
    if price < 0:
        raise UsageError(f"--usd-per-chip-hour={price:g} must not be negative")
    # This machine's own accelerators have no part in it.
    importlib.import_module("jax").config.update("jax_platforms", "cpu")
    plan_run = importlib.import_module("btlm_jax.plan.slice_plan").plan_run
    cache = Path(values["cache"].value).expanduser() if values["cache"].value else cache_directory() / "plan"
    planned = plan_run(config, topology=topology, cache=cache, say=_say)
    report = importlib.import_module("btlm_jax.plan.report")
    if values["json"].value:
        content = json.dumps(report.plan_json(planned, usd_per_chip_hour=price), indent=2)
        write_atomically(Path(values["json"].value), content)
    print(report.plan_table(planned, usd_per_chip_hour=price))
    return ERROR if planned.problems else DONE


def _flags() -> flags.FlagValues:
    values = config_flag()
    flags.DEFINE_string("topology", "", "the slice, for example v5e:16x16, v5p:4x4x8 or v6e:8x8", flag_values=values)
    flags.DEFINE_string("json", "", "file for the plan as JSON", flag_values=values)
    flags.DEFINE_float("usd-per-chip-hour", 0.0, "price of a chip; with it the plan has a cost", flag_values=values)
    flags.DEFINE_string(
        "cache", "", "directory of what compilations said, the same one is not repeated; or plan/ in the user's cache",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    return values


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
