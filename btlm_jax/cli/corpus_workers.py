"""The flags of a stage that say who does its work: processes of this machine, a Ray cluster, a Slurm cluster."""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
from collections.abc import Callable, Iterator

from absl import flags

from btlm_jax.cli.parse import UsageError

LOCAL, RAY, SLURM = "local", "ray", "slurm"
_FLAG_OF = {"ray_address": RAY, "sbatch": SLURM}

HELP = """--executor says where the --workers are; the bytes written are the same. All machines of a cluster need the
directories and this installation under the same paths.

  local   processes of this machine
  ray     tasks of a Ray cluster: --ray_address=HOST:PORT (or RAY_ADDRESS), else one on this machine
  slurm   jobs of one array, given on a login node: --sbatch='--partition=cpu --mem-per-cpu=4G --time=12:00:00'. Ctrl-C
          cancels the array. A command that is killed leaves it at work; the same command finds it again.

example:  btlm corpus clean --input=RAW --output=corpus/clean --executor=slurm --workers=200 --sbatch='--time=4:00:00'
"""


def define_worker_flags(values: flags.FlagValues) -> None:
    """Define the flags."""
    flags.DEFINE_string("executor", LOCAL, f"{LOCAL}, {RAY} or {SLURM}", flag_values=values)
    flags.DEFINE_integer(
        "workers", 0, "tasks at a time, by default one a processor (local); the result is the same", flag_values=values
    )
    flags.DEFINE_string("ray_address", "", "HOST:PORT of a Ray cluster's head", flag_values=values)
    flags.DEFINE_string("sbatch", "", "further options of sbatch, in one string", flag_values=values)


def check_worker_flags(values: flags.FlagValues) -> None:
    """Refuse flags that contradict each other.

    Raises:
      UsageError: they do.
    """
    executor, count = values["executor"].value, values["workers"].value
    if executor not in (LOCAL, RAY, SLURM):
        raise UsageError(f"--executor={executor} is not known; it may be {LOCAL}, {RAY} or {SLURM}")
    if count < 1 and (values["workers"].present or executor != LOCAL):
        given = f"--workers={count} must be 1 or more" if values["workers"].present else "--workers=N is needed"
        raise UsageError(f"{given}: how many tasks run at a time")
    for name, needed in _FLAG_OF.items():
        if values[name].value and executor != needed:
            raise UsageError(f"--{name} needs --executor={needed}; it is {executor}")
    try:
        shlex.split(values["sbatch"].value)
    except ValueError as error:
        raise UsageError(f"--sbatch={values['sbatch'].value} cannot be split into options: {error}") from error


@contextlib.contextmanager
def chosen_workers(values: flags.FlagValues, *, log: Callable[[str], None]) -> Iterator[object]:
    """Yield the workers that the flags choose."""
    count = values["workers"].value
    if values["executor"].value == RAY:
        address = values["ray_address"].value or os.environ.get("RAY_ADDRESS", "")
        ray_workers = importlib.import_module("btlm_jax.corpus.engine.ray_workers")
        with ray_workers.RayWorkers(count=count, address=address) as workers:
            yield workers
    elif values["executor"].value == SLURM:
        slurm = importlib.import_module("btlm_jax.corpus.engine.slurm")
        yield slurm.SlurmWorkers(count=count, options=tuple(shlex.split(values["sbatch"].value)), log=log)
    else:
        yield importlib.import_module("btlm_jax.corpus.engine.workers").LocalWorkers(count or os.cpu_count())
