"""Slurm's commands on one machine, as far as the tests need them: jobs of an array are processes of this machine.

`install(folder)` puts sbatch, squeue, scancel, sacct and srun into a folder for PATH. An array has two nodes; what
does not fit is pending; for good, if there is a file HELD in the folder. DOWN makes squeue fail once, as a restarting
controller does.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

VERBS = ("sbatch", "squeue", "scancel", "sacct", "srun")
NUM_NODES = 2
HELD, DOWN = "held", "down"


def install(folder: Path) -> None:
    """Write the commands; their state is kept in the same folder."""
    folder.mkdir()
    for verb in VERBS:
        (folder / verb).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {verb} "{folder}" "$@"\n')
        (folder / verb).chmod(0o755)


def jobs_of(folder: Path) -> list[dict]:
    """Return what is known of every job that was ever submitted."""
    with _state(folder) as jobs:
        return jobs


@contextlib.contextmanager
def _state(folder: Path) -> Iterator[list[dict]]:
    path = folder / "jobs.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = json.loads(path.read_text()) if path.is_file() else []
        for job in jobs:
            _update(job, is_held=(folder / HELD).exists())
        yield jobs
        path.write_text(json.dumps(jobs))


def _update(job: dict, *, is_held: bool) -> None:
    """See which of a job's processes have ended, and start what is pending."""
    for index, element in enumerate(job["elements"]):
        ended = Path(job["code"].replace("%a", str(index)))
        if element["state"] == "RUNNING" and ended.is_file() and ended.read_text():
            element["code"] = int(ended.read_text())
            killed = {137: "OUT_OF_MEMORY", 143: "CANCELLED"}
            element["state"] = killed.get(element["code"], "FAILED" if element["code"] else "COMPLETED")
        running = sum(element["state"] == "RUNNING" for element in job["elements"])
        if element["state"] == "PENDING" and running < NUM_NODES and not (is_held and index >= NUM_NODES):
            element["pid"] = _start(job, index)
            element["state"] = "RUNNING"


def _start(job: dict, index: int) -> int:
    log, code = (job[name].replace("%a", str(index)) for name in ("output", "code"))
    keeper = '"$0" >>"$1" 2>&1; echo $? >"$2"'
    return subprocess.Popen(
        ["/bin/sh", "-c", f"trap : TERM; {keeper}", job["script"], log, code],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": str(index)},
        cwd=job["chdir"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ).pid


def _sbatch(folder: Path, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--job-name", "--array", "--chdir", "--output", "--open-mode", "--partition"):
        parser.add_argument(flag)
    parser.add_argument("--parsable", action="store_true", required=True)
    parser.add_argument("script")
    given = parser.parse_args(arguments)
    if given.partition == "closed":
        sys.exit("sbatch: error: invalid partition specified: closed")
    with _state(folder) as jobs:
        number = 100 + len(jobs)
        count = int(given.array.removeprefix("0-")) + 1
        os.chmod(given.script, 0o755)
        job = {"number": number, "name": given.job_name, "output": given.output, "script": given.script}
        job |= {"chdir": given.chdir, "code": str(folder / f"code-{number}-%a"), "partition": given.partition}
        jobs.append(job | {"elements": [{"state": "PENDING", "code": 0} for _ in range(count)]})
        _update(jobs[-1], is_held=(folder / HELD).exists())
    print(f"{number};cluster")


def _squeue(folder: Path, arguments: list[str]) -> None:
    flag, array, name, form = arguments
    assert (flag, array, form) == ("--noheader", "--array", "--format=%T (%r)"), arguments
    if (folder / DOWN).exists():
        (folder / DOWN).unlink()
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with _state(folder) as jobs:
        for job in jobs:
            for element in job["elements"]:
                if job["name"] == name.removeprefix("--name=") and element["state"] in ("PENDING", "RUNNING"):
                    print(f"{element['state']} ({'None' if element['state'] == 'RUNNING' else 'Resources'})")


def _scancel(folder: Path, arguments: list[str]) -> None:
    name, *states = arguments
    chosen = [state.removeprefix("--state=") for state in states] or ["PENDING", "RUNNING"]
    with _state(folder) as jobs:
        for job in jobs:
            for element in job["elements"]:
                if job["name"] == name.removeprefix("--name=") and element["state"] in chosen:
                    if element["state"] == "RUNNING":
                        os.killpg(element["pid"], signal.SIGTERM)
                    else:
                        element["state"] = "CANCELLED"


def _sacct(folder: Path, arguments: list[str]) -> None:
    (number,) = (argument.removeprefix("--jobs=") for argument in arguments if argument.startswith("--jobs="))
    with _state(folder) as jobs:
        for job in jobs:
            for index, element in enumerate(job["elements"]):
                if str(job["number"]) == number:
                    print(f"{number}_{index}|{element['state']}|{element['code']}:0")


def _srun(folder: Path, arguments: list[str]) -> None:
    os.environ["SLURM_PROCID"] = "0"
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    verb, state_folder, *rest = sys.argv[1:]
    {"sbatch": _sbatch, "squeue": _squeue, "scancel": _scancel, "sacct": _sacct, "srun": _srun}[verb](
        Path(state_folder), rest
    )
