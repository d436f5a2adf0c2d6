"""The verb that trains: train."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli.parse import (
    BAD_NUMBERS,
    DONE,
    PREEMPTED,
    config_file,
    parse_config,
    run_flags,
    workdir_of,
)
from btlm_jax.recipe.config import TrainConfig

TRAIN_HELP = """btlm train: train, or resume from the last checkpoint in the workdir.

example:  btlm train --config=configs/local_cpu.py --workdir=runs/local --config.optimizer.peak_learning_rate=0.006

The same command resumes: after a kill, a preemption (exit code 75) or with more tokens configured. On several hosts
run it on each, with --distributed (TPU pods find each other) or with the three flags below it.
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
    training = importlib.import_module("btlm_jax.train.loop")
    if values["dry-run"].value:
        print(training.dry_run(config))
        return DONE
    importlib.import_module("btlm_jax.train.setup").start_processes(
        distributed=values["distributed"].value,
        coordinator=values["coordinator"].value,
        num_processes=values["num_processes"].value,
        process_id=values["process_id"].value,
    )
    outcome = training.train(
        config,
        workdir=workdir_of(values),
        check_devices=functools.partial(_check_devices, config_file=config_file(values)),
        build_store=build_store,
        continue_prompt=continue_prompt,
    )
    return {training.DONE: DONE, training.PREEMPTED: PREEMPTED, training.BAD_NUMBERS: BAD_NUMBERS}[outcome]


def build_store(*arguments, **keywords):
    """Make a token store; the modules that do are imported only where there is none yet."""
    return importlib.import_module("btlm_jax.corpus.installed.build").build_store(*arguments, **keywords)


def continue_prompt(run, params: dict) -> str:
    """Generate the sample at the end of a run.

    Decoding is imported here, after the last step: the last checkpoint is complete by then, so an error loses nothing,
    and the same command would do the end again.
    """
    return importlib.import_module("btlm_jax.generate.sample").continue_prompt(run, params)


def _check_devices(config: TrainConfig, devices: Sequence, *, config_file: Path) -> str:
    """Ask the table of layouts beside the config file, which knows TPUs only."""
    if not devices[0].device_kind.startswith("TPU"):
        return ""
    pod_table = importlib.import_module("btlm_jax.plan.pod_table")
    return pod_table.check_devices(config, devices, config_file=config_file)
