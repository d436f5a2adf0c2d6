"""The verb that checks and tunes the parametrization: tune."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli.parse import DONE, ERROR, USAGE, UsageError, apply

TUNE_HELP = """btlm tune coord-check: train tiny models at several widths and see that nothing depends on the width.

example:  btlm tune coord-check --directory=runs/coord_check

Prints a row for every parametrization: presets btlm and completep must be flat, standard parametrization and a dozen
deliberately broken ones must be caught. Exit code 0 when all are as expected, 1 otherwise; a table and a plot stay in
the directory.
"""


def tune(arguments: Sequence[str]) -> int:
    """Run `btlm tune`; return the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("directory", "", "where the table and the plot go", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    if not arguments or arguments[0] in ("--help", "-h") or "--help" in arguments[1:]:
        print(TUNE_HELP)
        return DONE if arguments else USAGE
    if arguments[0] != "coord-check":
        raise UsageError(f"btlm tune needs coord-check, got {arguments[0]!r}")
    apply(values, arguments[1:])
    if not values["directory"].value:
        raise UsageError("btlm tune coord-check needs --directory=DIR")
    full = importlib.import_module("btlm_jax.tune.coord_check").FULL
    report_coord_check = importlib.import_module("btlm_jax.tune.coord_report").report_coord_check
    report = report_coord_check(full, directory=Path(values["directory"].value))
    print(report.table)
    return DONE if report.passed else ERROR
