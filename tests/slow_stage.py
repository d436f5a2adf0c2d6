"""A stage whose tasks take their time; `python slow_stage.py DIRECTORY WORKERS` runs it as `btlm corpus` would."""

import os
import signal
import sys
import time
from pathlib import Path

from btlm_jax import cli
from btlm_jax.corpus.records import AtomicFile
from btlm_jax.corpus.stage import Stage, accept, run_stage
from btlm_jax.corpus.tasks import Task


def slow(task, directory, tick):
    with AtomicFile(directory / f"output-{task.index}") as file:
        file.write(b"half")
        (directory / f"began-{task.index}").write_text(str(os.getpid()))
        time.sleep(60)
    return {"totals": {}, "outputs": []}


def run_slowly(arguments) -> int:
    directory, workers = arguments
    tasks = [Task(index=index, inputs=(), weight=1) for index in range(9)]
    stage = Stage(name="slow", settings={}, tasks=tasks, run=slow)
    run_stage(stage, Path(directory), num_workers=int(workers), log=print, check=accept)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    cli.VERBS["corpus"] = run_slowly
    sys.exit(cli.main(["corpus", *sys.argv[1:]]))
