"""Evaluate a model by several processes on loopback, and compare every number with those of one process.

Command: python benchmarks/evaluate_processes.py --folder=DIR [--processes=2] [--devices=2]

The model is a tiny run with random weights on a store of made-up documents. One process on one device, and then so
many processes with so many devices each, measure held-out loss, loss by position, retrieval, local tasks of
lm-evaluation-harness of all kinds of requests, and summaries; and held-out loss of the model as a model directory and
as a Hugging Face directory. Each process has a folder of its own for results, as hosts that share none. Then the same
command meets what happens: SIGKILL of one process (77), SIGTERM (75), another setting in one process (2), 4 bits (1),
and afterwards the same command goes on. Exits with 1 if anything is not as expected here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests"), str(HERE.parent.parent)]

from machine import machine  # noqa: E402  beside this file

TOLERANCE = 1e-5  # of a number, relative; sums over other batches round otherwise
HELDOUT = ["--heldout", "--batch_tokens=1024", "--length=512"]
OTHERS = ["--positions", "--retrieval", "--position_lengths=24,96", "--position_tokens=2000"]
OTHERS += ["--retrieval_lengths=1024", "--retrieval_cases=6", "--batch_size=4"]
WAIT_SECONDS = 900


def make_models(folder: Path) -> None:
    """Write a token store, a run, its exports, local tasks and summaries, unless they are there."""
    from support.harness_tasks import write_tasks
    from support.made_up_run import run_config, write_run
    from support.real_store import build_real_store

    from btlm_jax.cli import main

    if (folder / "made").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build_real_store(folder / "store")
    write_run(folder / "run", run_config(folder / "store"), steps=(3,))
    write_tasks(folder / "tasks")
    for form in ("native", "hf"):
        if main(["convert", f"--from={folder / 'run'}", f"--to={folder / form}", f"--format={form}"]):
            raise RuntimeError(f"no {form}")
    cases = [{"document": "one two three " * 90, "summary": "one two"}, {"document": "four", "summary": "four five"}]
    (folder / "reports.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    (folder / "made").touch()


def arguments_of(folder: Path, form: str) -> list[str]:
    arguments = ["evaluate", f"--checkpoint={folder / form}", f"--store={folder / 'store'}", *HELDOUT]
    if form == "run":
        names = "local_choice,local_few_shot,local_letter,local_last_word,local_text,local_answer"
        arguments += [*OTHERS, f"--tasks={names}", f"--include_path={folder / 'tasks'}"]
        arguments += ["--summaries", str(folder / "reports.jsonl"), "--summary_lengths=560"]
    return arguments


class Pair:
    """Processes that run one command together."""

    def __init__(self, folder: Path, arguments: list[str], *, processes: int, devices: int, changes=()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        several = [f"--coordinator={address}", f"--num_processes={processes}"] if processes > 1 else []
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent.parent), "MPLBACKEND": "agg"}
        self.processes, self.logs = [], []
        for index in range(processes):
            own = folder / str(index)
            own.mkdir(parents=True, exist_ok=True)
            self.logs.append(own.with_suffix(".txt"))
            number = [f"--process_id={index}"] if several else []
            command = [*arguments, *several, *number, "--output=results"]
            command += list(changes[index]) if changes else []
            with open(self.logs[-1], "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "btlm_jax", *command], cwd=own, stdout=log, stderr=log, env=environment
                    )
                )

    def codes(self) -> list[int]:
        return [process.wait(timeout=WAIT_SECONDS) for process in self.processes]

    def said(self) -> str:
        return "\n".join(log.read_text()[-1500:] for log in self.logs)

    def wait_for(self, text: str) -> None:
        """Wait until process 0 has said something."""
        until = time.monotonic() + WAIT_SECONDS
        while text not in self.logs[0].read_text():
            if self.processes[0].poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"process 0 did not say {text!r}:\n{self.said()}")
            time.sleep(0.05)


def numbers_of(folder: Path) -> dict[str, float]:
    """Return every number of a report by its place."""
    parts = json.loads((folder / "0" / "results" / "evaluation.json").read_text())["parts"]
    found: dict[str, float] = {}

    def add(value, place: str) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                add(each, f"{place}/{key}")
        elif isinstance(value, list):
            for number, each in enumerate(value):
                add(each, f"{place}/{number}")
        elif isinstance(value, (int, float)):
            found[place] = float(value)

    add(parts, "")
    return found


def worst_of(found: dict[str, float], wanted: dict[str, float]) -> float:
    """Return the largest difference, relative to numbers above 1; infinity where there are others."""
    if found.keys() != wanted.keys():
        return float("inf")
    return max(abs(found[place] - value) / max(1.0, abs(value)) for place, value in wanted.items())


def main() -> int:
    """Measure, compare, print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="run native hf killed terminated differs int4")
    arguments = parser.parse_args()
    make_models(arguments.folder / "models")
    models, bad = arguments.folder / "models", 0
    several = {"processes": arguments.processes, "devices": arguments.devices}
    print("| what | seconds | found |\n|---|---:|---|")

    def row(what: str, seconds: float, found: str, is_right: bool, said: str) -> None:
        nonlocal bad
        print(f"| {what} | {seconds:.0f} | {found} |{'' if is_right else ' WRONG'}", flush=True)
        if not is_right:
            bad += 1
            print(said, file=sys.stderr)

    def compared(what: str, folder: Path, form: str) -> None:
        began, one = time.monotonic(), arguments.folder / f"one-{form}"
        expected = Pair(one, arguments_of(models, form), processes=1, devices=1)
        started = Pair(folder, arguments_of(models, form), **several)
        codes, said = expected.codes() + started.codes(), expected.said() + started.said()
        if any(codes):
            row(what, time.monotonic() - began, f"exit codes {codes}", False, said)
            return
        found, wanted = numbers_of(folder), numbers_of(one)
        worst = worst_of(found, wanted)
        others = [path for number in range(1, arguments.processes) for path in (folder / str(number)).iterdir()]
        is_right = worst < TOLERANCE and not others
        text = f"{len(found):,} numbers, at most {worst:.1e} apart; {len(others)} files of other processes"
        row(what, time.monotonic() - began, text, is_right, said)

    def goes_on(folder: Path, wanted: list[int], began: float, what: str, said: str, codes: list[int]) -> None:
        again = Pair(folder, arguments_of(models, "run"), **several)
        codes_again = again.codes()
        same = (
            not any(codes_again) and worst_of(numbers_of(folder), numbers_of(arguments.folder / "one-run")) < TOLERANCE
        )
        is_right = codes == wanted and same
        text = f"exit codes {codes}, then {codes_again}, {'the same numbers' if same else 'OTHER numbers'}"
        row(what, time.monotonic() - began, text, is_right, said + again.said())

    wants = set(arguments.only) or {"run", "native", "hf", "killed", "terminated", "differs", "int4"}
    for form in ("run", "native", "hf"):
        if form in wants:
            shutil.rmtree(arguments.folder / f"several-{form}", ignore_errors=True)
            compared(f"{form}, {several}", arguments.folder / f"several-{form}", form)
    for what, sent, code in (("killed", signal.SIGKILL, 77), ("terminated", signal.SIGTERM, 75)):
        if what in wants:
            folder, began = arguments.folder / what, time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            started = Pair(folder, arguments_of(models, "run"), **several)
            started.wait_for("loading")
            time.sleep(1.0)
            started.processes[-1].send_signal(sent)
            codes = started.codes()
            wanted = [code] * arguments.processes
            wanted[-1] = -9 if what == "killed" else code
            goes_on(folder, wanted, began, f"process {arguments.processes - 1} {what}", started.said(), codes)
    for what, changes, code, text in (
        ("differs", [["--seed=1"], ["--seed=2"]], 2, "the processes of this run differ"),
        ("int4", [["--int4"]] * arguments.processes, 1, "weights of 4 bits run in one process"),
    ):
        if what in wants:
            began = time.monotonic()
            shutil.rmtree(arguments.folder / what, ignore_errors=True)
            started = Pair(arguments.folder / what, arguments_of(models, "run"), changes=changes, **several)
            codes = started.codes()
            is_right = set(codes) == {code} and text in started.said()
            row(what, time.monotonic() - began, f"exit codes {codes}", is_right, started.said())
    print(f"\n`python {' '.join(sys.argv)}`\n\n{machine('jax', 'lm_eval')}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
