"""`btlm tune`: check the parametrization on tiny models."""

from __future__ import annotations

from collections.abc import Sequence

from btlm_jax.cli import DONE, ERROR, USAGE, UsageError
from btlm_jax.cli.parse import Flags, did_you_mean

TUNE_HELP = """btlm tune coord-check: train tiny models at several widths and see that nothing depends on the width.

example:  btlm tune coord-check --directory=runs/coord_check

Prints a row for every parametrization: presets btlm and completep must be flat, standard parametrization and a dozen
deliberately broken ones must be caught. Exit code 0 when all are as expected, 1 otherwise; a table and a plot stay in
the directory.
"""


VERBS = ("coord-check",)


def tune(arguments: Sequence[str]) -> int:
    """Run `btlm tune`; return the exit code."""
    if not arguments:
        print(TUNE_HELP)
        return USAGE
    verb, *rest = arguments
    if verb.startswith("-"):
        rest = list(arguments)
    elif verb.replace("_", "-") not in VERBS:
        raise UsageError(f"btlm tune needs coord-check, got {verb!r}{did_you_mean(verb, VERBS)}")
    flags = tune_flags()
    if not flags.parse(rest):
        return DONE
    directory = flags.path("directory")
    from btlm_jax.tune.coord_check import FULL
    from btlm_jax.tune.coord_report import report_coord_check

    report = report_coord_check(FULL, directory=directory)
    print(report.table)
    return DONE if report.passed else ERROR


def tune_flags() -> Flags:
    """Define the flags of `btlm tune coord-check`."""
    flags = Flags(TUNE_HELP)
    flags.define_string("directory", "", "where the table and the plot go")
    return flags
