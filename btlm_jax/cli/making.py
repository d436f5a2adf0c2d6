"""The verbs that make things: train, tune."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli.parse import (
    BAD_NUMBERS,
    DONE,
    ERROR,
    PREEMPTED,
    USAGE,
    UsageError,
    apply,
    config_file,
    parse_config,
    run_flags,
    workdir_of,
)

TRAIN_HELP = """btlm train: train, or resume from the last checkpoint in the workdir.

example:  btlm train --config=configs/local_cpu.py --workdir=runs/local --config.optimizer.peak_learning_rate=0.006

The same command resumes: after a kill, a preemption (exit code 75) or with more tokens configured. On several hosts
run it on each, with --distributed (TPU pods find each other) or with the three flags below it.
"""

TUNE_HELP = """btlm tune coord-check: train tiny models at several widths and see that nothing depends on the width.

example:  btlm tune coord-check --directory=runs/coord_check

Prints a row for every parametrization: presets btlm and completep must be flat, standard parametrization and a dozen
deliberately broken ones must be caught. Exit code 0 when all are as expected, 1 otherwise; a table and a plot stay in
the directory.
"""


def train(arguments: Sequence[str]) -> int:
    """Run `btlm train`; return the exit code."""
    values = run_flags()
    flags.DEFINE_boolean("dry-run", False, "print the whole plan of the run and exit", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "join the other hosts of a TPU pod slice", flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0, for several processes", flag_values=values)
    flags.DEFINE_integer("num_processes", 1, "how many processes there are", flag_values=values)
    flags.DEFINE_integer("process_id", 0, "which of them this is", flag_values=values)
    config = parse_config(values, arguments, help_text=TRAIN_HELP)
    if config is None:
        return DONE
    training = importlib.import_module("btlm_jax.train")
    if values["dry-run"].value:
        print(training.dry_run(config))
        return DONE
    training.start_processes(
        distributed=values["distributed"].value,
        coordinator=values["coordinator"].value,
        num_processes=values["num_processes"].value,
        process_id=values["process_id"].value,
    )
    outcome = training.train(config, config_file=config_file(values), workdir=workdir_of(values))
    return {training.DONE: DONE, training.PREEMPTED: PREEMPTED, training.BAD_NUMBERS: BAD_NUMBERS}[outcome]


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
