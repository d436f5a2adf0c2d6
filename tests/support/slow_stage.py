"""A stage whose tasks take their time; `python slow_stage.py DIRECTORY FLAGS` runs it as `btlm corpus` would."""

import os
import signal
import sys
import time
from pathlib import Path

from btlm_jax import cli
from btlm_jax.cli.corpus_workers import chosen_workers, define_worker_flags
from btlm_jax.cli.parse import Flags
from btlm_jax.corpus.engine.stage import Stage, accept_all, run_stage
from btlm_jax.corpus.engine.tasks import Task
from btlm_jax.storage.files import AtomicFile

END = "end"  # a file that lets the tasks end


def slow(task, directory, heartbeat):
    with AtomicFile(directory / f"output-{task.index}") as file:
        file.write(b"half")
        (directory / f"began-{task.index}").write_text(str(os.getpid()))
        deadline = time.monotonic() + 300
        while not (directory / END).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    return {"totals": {}, "outputs": []}


def slow_stage() -> Stage:
    tasks = [Task(index=index, inputs=(), weight=1) for index in range(9)]
    return Stage(name="slow", settings={}, tasks=tasks, run=slow)


def run_slowly(arguments) -> int:
    directory, *given = arguments
    flags = Flags("")
    define_worker_flags(flags)
    assert flags.parse(given)
    with chosen_workers(flags, log=print) as workers:
        run_stage(slow_stage(), Path(directory), workers=workers, log=print, check=accept_all)
    return 0


if __name__ == "__main__":
    from support.slow_stage import run_slowly  # other processes cannot unpickle what is in __main__

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    cli.VERBS["corpus"] = run_slowly
    sys.exit(cli.main(["corpus", *sys.argv[1:]]))
