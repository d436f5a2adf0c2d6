"""The flags of a stage that say who does its work: processes of this machine, a Ray cluster, a Slurm cluster."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from btlm_jax.cli import UsageError
from btlm_jax.cli.parse import Flags

if TYPE_CHECKING:
    from btlm_jax.corpus.engine.workers import Workers

LOCAL, RAY, SLURM = "local", "ray", "slurm"
_FLAG_OF = {"ray_address": RAY, "sbatch": SLURM}
_MOST_WORKERS = 1 << 16

HELP = """--executor says where the --workers are; the bytes written are the same. All machines of a cluster need the
directories and this installation under the same paths.

  local   processes of this machine
  ray     tasks of a Ray cluster: --ray_address=HOST:PORT (or RAY_ADDRESS), else one on this machine
  slurm   jobs of one array, given on a login node: --sbatch='--partition=cpu --mem-per-cpu=4G --time=12:00:00'. Ctrl-C
          cancels the array. A command that is killed leaves it at work; the same command finds it again.

example:  btlm corpus clean --input=RAW --output=corpus/clean --executor=slurm --workers=200 --sbatch='--time=4:00:00'
"""


def define_worker_flags(flags: Flags) -> None:
    """Define the flags."""
    flags.define_string("executor", LOCAL, "where the workers are", choices=(LOCAL, RAY, SLURM))
    flags.define_integer("workers", 0, "tasks at a time; 0 with local: one a processor; the result is the same")
    flags.define_string("ray_address", "", "HOST:PORT of a Ray cluster's head")
    flags.define_string("sbatch", "", "further options of sbatch, in one string")


def check_worker_flags(flags: Flags) -> None:
    """Refuse flags that contradict each other.

    Raises:
      UsageError: they do.
    """
    executor, count = flags.string("executor"), flags.integer("workers")
    if count < 1 and (flags.is_given("workers") or executor != LOCAL):
        given = f"--workers={count} must be 1 or more" if flags.is_given("workers") else "--workers=N is needed"
        raise UsageError(f"{given}: how many tasks run at a time")
    if count > _MOST_WORKERS:
        raise UsageError(f"--workers={count} must be {_MOST_WORKERS:,} or less")
    for name, needed in _FLAG_OF.items():
        if flags.string(name) and executor != needed:
            raise UsageError(f"--{name} needs --executor={needed}; it is {executor}")
    try:
        shlex.split(flags.string("sbatch"))
    except ValueError as error:
        raise UsageError(f"--sbatch={flags.string('sbatch')} cannot be split into options: {error}") from error


@contextlib.contextmanager
def chosen_workers(flags: Flags, *, log: Callable[[str], None]) -> Iterator[Workers]:
    """Yield the workers that the flags choose."""
    count = flags.integer("workers")
    if flags.string("executor") == RAY:
        from btlm_jax.corpus.engine.ray_workers import RayWorkers

        with RayWorkers(count=count, address=flags.string("ray_address") or os.environ.get("RAY_ADDRESS", "")) as ray:
            yield ray
    elif flags.string("executor") == SLURM:
        from btlm_jax.corpus.engine.slurm import SlurmWorkers

        yield SlurmWorkers(count=count, options=tuple(shlex.split(flags.string("sbatch"))), log=log)
    else:
        from btlm_jax.corpus.engine.workers import LocalWorkers

        yield LocalWorkers(count or os.cpu_count() or 1)
