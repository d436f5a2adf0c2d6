"""Kill a real training run at random moments, resume it until it ends, and compare every bit with an undisturbed run.

Command: python benchmarks/kill_resume.py --config=FILE --kills=20
Prints a line a kill and a verdict; exits with 1 when anything differs. The config should take some tens of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

MOMENTS = ("any time", "during a step", "during a save", "before the switch", "after the switch", "during evaluation")
TIMING_KEYS = ("tokens_per_second", "mfu", "seconds")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
POLL_SECONDS = 0.002
GIVE_UP_SECONDS = 300.0


def start_run(config: Path, workdir: Path, *, changes: Sequence[str]) -> subprocess.Popen:
    """Start the real command as a process."""
    command = [sys.executable, "-m", "btlm_jax", "train", f"--config={config}", f"--workdir={workdir}", *changes]
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "output.txt", "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT)


def rows_of(workdir: Path) -> list[dict]:
    """Return the complete lines of metrics.jsonl, oldest first."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def kill_at(process: subprocess.Popen, workdir: Path, moment: str, *, switch: int, delay: float) -> str:
    """Kill the process with SIGKILL at the moment; return what it had reached, or "" when it ended by itself first.

    `switch` is the last step of the first phase.
    """
    began, fewest = time.monotonic(), len(rows_of(workdir))
    while process.poll() is None:
        # A resumed run first drops the lines after its checkpoint, then adds its own.
        num_rows = len(rows_of(workdir))
        fewest = min(fewest, num_rows)
        if time.monotonic() - began > GIVE_UP_SECONDS:
            raise TimeoutError(f"the run in {workdir} did not come to {moment!r} in {GIVE_UP_SECONDS:.0f} s")
        if _is_now(moment, workdir, has_progressed=num_rows > fewest, switch=switch):
            if moment in ("any time", "during a step"):
                time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
            rows = rows_of(workdir)
            return f"after step {rows[-1]['step']}" if rows else "before the first step"
        time.sleep(POLL_SECONDS)
    return ""


def _is_now(moment: str, workdir: Path, *, has_progressed: bool, switch: int) -> bool:
    if moment == "any time":
        return True
    if moment == "during a save":
        return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
    if not has_progressed:
        return False
    last = rows_of(workdir)[-1]
    if moment == "during a step":
        return last["kind"] == "train"
    if moment == "before the switch":
        return last["step"] >= switch - 1
    if moment == "after the switch":
        return last["step"] > switch
    return last["kind"] == "train" and last["step"] % 10 == 0  # an evaluation begins after this line


def differences(found: Path, expected: Path) -> list[str]:
    """Return what differs between two finished workdirs: parameters, moments, every logged number, every evaluation."""
    problems = []
    states = [_final_state(workdir) for workdir in (found, expected)]
    for name, leaf in states[1].items():
        if name not in states[0] or not np.array_equal(states[0][name], leaf):
            problems.append(f"state {name}")
    logs = [
        [_numbers(row) for row in rows_of(workdir) if row["kind"] in ("train", "eval")] for workdir in (found, expected)
    ]
    if len(logs[0]) != len(logs[1]):
        problems.append(f"{len(logs[0])} logged lines instead of {len(logs[1])}")
    problems += [f"line of step {a['step']}" for a, b in zip(*logs, strict=False) if a != b]
    return problems


def _numbers(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIMING_KEYS}


def _final_state(workdir: Path) -> dict[str, np.ndarray]:
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((workdir / "checkpoints" / str(steps[-1]) / "state").resolve())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def run_with_kills(
    config: Path, workdir: Path, moments: Sequence[str], *, switch: int, seed: int, changes: Sequence[str]
) -> list[str]:
    """Run to the end through one kill a moment; return what each kill hit. A run that ends early is killed no more."""
    rng = random.Random(seed)
    hits = []
    for moment in moments:
        process = start_run(config, workdir, changes=changes)
        hit = kill_at(process, workdir, moment, switch=switch, delay=rng.uniform(0, 0.5 if moment != "any time" else 8))
        if not hit:
            break
        hits.append(f"{moment}: {hit}")
    finish(config, workdir, changes=changes)
    return hits


def finish(config: Path, workdir: Path, *, changes: Sequence[str]) -> None:
    """Run the command until it ends by itself.

    Raises:
      RuntimeError: it ended with an error; with the end of its output.
    """
    process = start_run(config, workdir, changes=changes)
    if process.wait(timeout=GIVE_UP_SECONDS):
        raise RuntimeError(f"exit code {process.returncode}:\n" + (workdir / "output.txt").read_text()[-3000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=4, help="kills a run must survive before it may end")
    parser.add_argument("--switch", type=int, required=True, help="the last step of the first phase")
    parser.add_argument("--seed", type=int, default=0)
    arguments, changes = parser.parse_known_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        finish(arguments.config, undisturbed, changes=changes)
        killed = ends = bad = 0
        while killed < arguments.kills:
            workdir = Path(folder) / f"run{ends}"
            moments = [rng.choice(MOMENTS) for _ in range(min(arguments.per_run, arguments.kills - killed))]
            hits = run_with_kills(
                arguments.config, workdir, moments, switch=arguments.switch, seed=arguments.seed + ends, changes=changes
            )
            problems = differences(workdir, undisturbed)
            killed, ends, bad = killed + len(hits), ends + 1, bad + bool(problems)
            for hit in hits:
                print(f"run {ends}: killed {hit}", flush=True)
            print(f"run {ends}: {'identical' if not problems else 'DIFFERS: ' + ', '.join(problems[:5])}", flush=True)
        print(f"{killed} kills, {ends} ends, {ends - bad} of them bit-identical")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
