"""Interrupt real training runs at random moments, resume them, and compare every bit with an undisturbed run.

Command: python benchmarks/kill_resume.py --config=FILE --switch=STEP --folder=DIR --hits=60

Each run takes --per-run hits and is then left to end: SIGKILL, SIGTERM or SIGSTOP, of one process or of all, during
imports, compilation, a restore, quarantine (a bit of the newest checkpoint was flipped), a step, a save, around the
switch of phases, an evaluation, or the end report. Kinds of runs: one process; two processes of a device each;
"elastic", where every start is at random one process of two devices or two of one. What each process of a hit run ended
with must be as documented: 75 after SIGTERM, 77 within 60 s where another one is gone, 0 where the run was done. What
ends must have the state, and every logged number, of an undisturbed run with as many devices; each step once. Hits are
appended to DIR/hits.jsonl: the same command goes on until there are so many. Prints a table by moment; exits with 1
when anything differs. The config should take some tens of steps.

Where imports and compilation are not what is hit, starts are forks of a process that has imported what a run imports
and has touched no device, and the workdir has the compilation cache of an undisturbed run, which each run then writes
to as a user's does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import orbax.checkpoint as ocp

from btlm_jax.train import COMPILE_CACHE

MOMENTS = (
    *("imports", "compilation", "a restore", "quarantine", "a step", "a save"),
    *("the switch", "an evaluation", "the end report"),
)
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGSTOP": signal.SIGSTOP}
SHARES = (75, 15, 10)  # of the hits; a run of one process that is only stopped for a while comes to its end
KINDS = ("one", "two", "elastic")
UNDISTURBED = "none"  # in place of a moment
TIMING_KEYS = ("tokens_per_second", "mfu", "seconds")
DONE, PREEMPTED, PEER_GONE = 0, 75, 77
POLL_SECONDS = 0.005
COMMAND = [sys.executable, "-m", "btlm_jax"]
GONE_SECONDS = 60.0  # in which a process must end when another one is gone
GIVE_UP_SECONDS = 1500.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit:
    """What to do to a run."""

    moment: str
    signal: str
    victims: str  # "one" or "all"
    delay: float  # share of a moment that lasts: 0 at its beginning


@dataclasses.dataclass
class Started:
    """The processes of one start of a command."""

    workdir: Path
    outputs: Path  # the folder of what they say
    processes: list[subprocess.Popen | Fork]
    output_from: int  # where process 0 began to write

    def output(self) -> str:
        """Return what process 0 has said since this start."""
        with open(output_file(self.outputs, 0), "rb") as file:
            file.seek(self.output_from)
            return file.read().decode(errors="replace")

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)


def output_file(folder: Path, number: int) -> Path:
    return folder / f"output-{number}.txt"


class Fork:
    """A process that Forks has started, with what is used of Popen."""

    def __init__(self, forks: Forks, pid: int):
        self._forks, self.pid = forks, pid

    def poll(self) -> int | None:
        return self._forks.codes.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """A process that has imported what a run imports, and forks commands; it has no devices and no threads."""

    def __init__(self, environment: dict[str, str]):
        self.codes: dict[int, int] = {}
        self._pids: queue.Queue[int] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OPENBLAS_NUM_THREADS": "1"},  # it would start others
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            pid, code = map(int, line.split())
            if code == _BEGUN:
                self._pids.put(pid)
            else:
                self.codes[pid] = code

    def start(self, arguments: Sequence[str], *, output: Path) -> Fork:
        """Fork a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(output), *arguments]) + "\n")
        self._process.stdin.flush()
        pid = self._pids.get(timeout=60)
        self.codes.pop(pid, None)  # of an earlier process with this id
        return Fork(self, pid)


_BEGUN = 1000  # in place of an exit code


def fork_commands() -> int:
    """Fork a command for each line of the standard input, [output, arguments...]; print "PID CODE" of each end."""
    import select

    from btlm_jax import cli
    from btlm_jax.cli import train  # noqa: F401
    from btlm_jax.generate import sample  # noqa: F401  the end report's
    from btlm_jax.storage import owner  # noqa: F401
    from btlm_jax.train import loop  # noqa: F401

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads cannot be forked"
    running: set[int] = set()
    pending = b""
    while True:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                return 0
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                output, *arguments = json.loads(line)
                if (pid := os.fork()) == 0:
                    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    os.dup2(file, 1)
                    os.dup2(file, 2)
                    sys.argv = ["btlm", *arguments]
                    try:
                        cli.entry()
                    except SystemExit as end:
                        sys.stdout.flush()
                        os._exit(end.code if isinstance(end.code, int) else 1)
                running.add(pid)
                print(pid, _BEGUN, flush=True)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                print(pid, os.waitstatus_to_exitcode(status), flush=True)


def environment_of(*, num_devices: int) -> dict[str, str]:
    """Return the environment of a process with so many devices."""
    names = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices), "PYTHONUNBUFFERED": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | names


def start_run(
    config: Path,
    workdir: Path,
    *,
    outputs: Path,
    num_processes: int,
    num_devices: int,
    changes: Sequence[Sequence[str]],
    command: Sequence[str] = COMMAND,
    forks: Forks | None = None,
) -> Started:
    """Start the real command, in so many processes that share the devices; `changes` are flags of each."""
    arguments = ["train", f"--config={config}", f"--workdir={workdir}"]
    environment = environment_of(num_devices=num_devices // num_processes)
    outputs.mkdir(parents=True, exist_ok=True)
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            arguments += [f"--coordinator=localhost:{free.getsockname()[1]}", f"--num_processes={num_processes}"]
    processes: list[subprocess.Popen | Fork] = []
    first = output_file(outputs, 0)
    output_from = first.stat().st_size if first.exists() else 0
    for number in range(num_processes):
        own = [*arguments, *changes[number], *([f"--process_id={number}"] if num_processes > 1 else [])]
        with open(output_file(outputs, number), "ab") as output:  # it is there before a fork comes to open it
            if forks:
                processes.append(forks.start(own, output=output_file(outputs, number)))
                continue
            processes.append(subprocess.Popen([*command, *own], stdout=output, stderr=output, env=environment))
    return Started(workdir, outputs, processes, output_from)


def rows_of(workdir: Path) -> list[dict]:
    """Return the complete lines of metrics.jsonl, oldest first."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def wait_for(started: Started, moment: str, *, switch: int) -> bool:
    """Wait until a run comes to the beginning of a moment; return False when it ended before."""
    began, fewest = time.monotonic(), len(rows_of(started.workdir))
    while started.is_running():
        # A resumed run first drops the lines after its checkpoint, then adds its own.
        rows = rows_of(started.workdir)
        fewest = min(fewest, len(rows))
        if time.monotonic() - began > GIVE_UP_SECONDS:
            raise TimeoutError(f"the run in {started.workdir} did not come to {moment!r} in {GIVE_UP_SECONDS:.0f} s")
        if _is_now(started, moment, rows[-1] if len(rows) > fewest else None, switch=switch):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _is_now(started: Started, moment: str, last: dict | None, *, switch: int) -> bool:
    """Return whether a moment has begun; `last` is the last line that this start has logged."""
    if moment == "imports":
        return True
    if moment in ("compilation", "a restore", "quarantine"):
        return "Model:" in started.output()
    if moment == "a save":
        return any("tmp" in path.name for path in (started.workdir / "checkpoints").glob("*"))
    if moment == "the end report":
        return "All steps are trained" in started.output()
    if last is None or last["kind"] != "train":
        return False
    if moment == "the switch":
        return last["step"] >= switch - 1
    return moment == "a step" or last["step"] % 10 == 9  # an evaluation is soon after this line


# Seconds that a moment lasts about, over which a hit's delay is spread.
LASTING = {"imports": 4.0, "compilation": 6.0, "a restore": 1.5, "quarantine": 1.5, "a step": 0.4, "a save": 0.1}
LASTING |= {"the switch": 0.3, "an evaluation": 0.3, "the end report": 2.0}


def strike(started: Started, hit: Hit, *, switch: int, rng: random.Random) -> dict:
    """Do a hit to a run and wait for its end; return what happened, with "problem" if that is not as documented."""
    if not wait_for(started, hit.moment, switch=switch):
        codes = [process.wait() for process in started.processes]
        return {"codes": codes, "problem": "" if set(codes) == {DONE} else f"ended by itself with {codes}"}
    time.sleep(hit.delay * LASTING[hit.moment])
    victims = started.processes if hit.victims == "all" else [rng.choice(started.processes)]
    began = time.monotonic()
    for victim in victims:
        victim.send_signal(SIGNALS[hit.signal])
    others = [process for process in started.processes if process not in victims]
    if hit.signal == "SIGSTOP" and not others:  # nobody misses them: they go on as if nothing had been
        time.sleep(2.0)
        for victim in victims:
            victim.send_signal(signal.SIGCONT)
    waited_for = others if hit.signal == "SIGSTOP" and others else started.processes
    codes = []
    for process in waited_for:
        try:
            codes.append(process.wait(timeout=GIVE_UP_SECONDS))
        except subprocess.TimeoutExpired:
            codes.append("none")
    seconds = time.monotonic() - began
    for process in started.processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    rows = rows_of(started.workdir)
    allowed = {
        "SIGKILL": {-signal.SIGKILL, DONE} | ({PEER_GONE} if others else set()),
        "SIGTERM": {PREEMPTED, DONE, -signal.SIGTERM} if hit.moment == "imports" else {PREEMPTED, DONE},
        "SIGSTOP": {PEER_GONE, DONE} if others else {DONE},
    }[hit.signal]
    problem = "" if set(codes) <= allowed else f"ended with {codes}"
    if others and PEER_GONE in codes and seconds > GONE_SECONDS:
        problem = f"ended after {seconds:.0f} s"
    return {
        "codes": [int(code) if code != "none" else code for code in codes],
        "seconds": round(seconds, 1),
        "step": rows[-1]["step"] if rows else 0,
        "problem": problem,
    }


def differences(found: Path, expected: Path) -> list[str]:
    """Return what differs between two finished workdirs: parameters, moments, every logged number, every evaluation."""
    problems = []
    states = [_final_state(workdir) for workdir in (found, expected)]
    for name, leaf in states[1].items():
        if name not in states[0] or not np.array_equal(states[0][name], leaf):
            problems.append(f"state {name}")
    kinds = ("train", "eval", "sample")
    logs = [[_numbers(row) for row in rows_of(workdir) if row["kind"] in kinds] for workdir in (found, expected)]
    if len(logs[0]) != len(logs[1]):
        problems.append(f"{len(logs[0])} logged lines instead of {len(logs[1])}")
    problems += [f"line of step {a['step']}" for a, b in zip(*logs, strict=False) if a != b]
    return problems


def _numbers(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIMING_KEYS}


def _final_state(workdir: Path) -> dict[str, np.ndarray]:
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    path = (workdir / "checkpoints" / str(steps[-1]) / "state").resolve()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:  # on the host, whatever devices wrote it
        shapes = checkpointer.metadata(path).item_metadata.tree
        arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arrays))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def flip_newest(workdir: Path, *, rng: random.Random) -> None:
    """Flip a bit of the arrays of the newest checkpoint, where there is one to fall back to."""
    folder = workdir / "checkpoints"
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    if len(steps) < 2:
        return
    path = max((folder / str(steps[-1]) / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


class Runs:
    """Runs of one config."""

    def __init__(self, config: Path, folder: Path, *, switch: int, changes: Sequence[str]):
        self._config, self._folder, self._switch, self._changes = config, folder, switch, changes
        self._forks: dict[int, Forks] = {}

    def undisturbed(self, num_devices: int) -> Path:
        """Return the workdir of a run in one process that nobody hits; it is made once."""
        workdir = self._folder / f"undisturbed-{num_devices}"
        if not (workdir / "whole").exists():
            shutil.rmtree(workdir, ignore_errors=True)
            options = {"num_devices": num_devices, "rng": random.Random(0), "moment": UNDISTURBED}
            self.finish(workdir, kind="one", **options)
            if num_devices > 1:  # two processes have other executables
                pair = self._folder / "undisturbed-pair"
                self.finish(pair, kind="two", **options)
                shutil.copytree(pair / COMPILE_CACHE, workdir / COMPILE_CACHE, dirs_exist_ok=True)
                shutil.rmtree(pair)
            (workdir / "whole").touch()
        return workdir

    def start(self, workdir: Path, *, kind: str, num_devices: int, rng: random.Random, moment: str) -> Started:
        """Start the command, as what is to be hit asks for."""
        num_processes = {"one": 1, "two": 2, "elastic": rng.choice((1, 2))}[kind]
        if moment == "compilation":
            shutil.rmtree(workdir / COMPILE_CACHE, ignore_errors=True)
        elif not (workdir / COMPILE_CACHE).exists() and moment != UNDISTURBED:
            shutil.copytree(self.undisturbed(num_devices) / COMPILE_CACHE, workdir / COMPILE_CACHE)
        if moment == "quarantine":
            flip_newest(workdir, rng=rng)
        return start_run(
            self._config,
            workdir,
            outputs=workdir,
            num_processes=num_processes,
            num_devices=num_devices,
            changes=[self._changes] * num_processes,
            forks=None if moment == "imports" else self.forks_of(num_devices // num_processes),
        )

    def forks_of(self, num_devices: int) -> Forks:
        """Return what forks processes with so many devices."""
        if num_devices not in self._forks:
            self._forks[num_devices] = Forks(environment_of(num_devices=num_devices))
        return self._forks[num_devices]

    def finish(self, workdir: Path, *, kind: str, num_devices: int, rng: random.Random, moment: str = "") -> None:
        """Run the command until it ends by itself.

        Raises:
          RuntimeError: it ended with an error; with the end of its output.
        """
        started = self.start(workdir, kind=kind, num_devices=num_devices, rng=rng, moment=moment)
        codes = [process.wait(timeout=GIVE_UP_SECONDS) for process in started.processes]
        if set(codes) != {DONE}:
            raise RuntimeError(f"exit codes {codes}:\n{started.output()[-3000:]}")

    def hit(self, workdir: Path, hits: Sequence[Hit], *, kind: str, rng: random.Random) -> list[dict]:
        """Run to the end through hits; return what became of each. A run that ends early is hit no more."""
        num_devices, results = (1 if kind == "one" else 2), []
        for hit in hits:
            started = self.start(workdir, kind=kind, num_devices=num_devices, rng=rng, moment=hit.moment)
            result = strike(started, hit, switch=self._switch, rng=rng)
            results.append({**dataclasses.asdict(hit), "kind": kind, "processes": len(started.processes), **result})
            if set(result["codes"]) == {DONE}:
                break
        self.finish(workdir, kind=kind, num_devices=num_devices, rng=rng)
        problems = differences(workdir, self.undisturbed(num_devices))
        steps = [row["step"] for row in rows_of(workdir) if row["kind"] == "train"]
        if steps != list(range(1, len(steps) + 1)):
            problems.append("steps are missing or repeated")
        results[-1]["end"] = ", ".join(problems[:5])
        return results


def choose_hit(rng: random.Random, *, moment: str) -> Hit:
    """Return a hit of a moment, the rest at random."""
    (signal_name,) = rng.choices(list(SIGNALS), weights=SHARES)
    return Hit(moment=moment, signal=signal_name, victims=rng.choice(("one", "all")), delay=rng.random())


def table(results: Sequence[dict]) -> str:
    """Return a row a moment: hits, codes, the longest times from signal to end, runs that ended otherwise."""
    lines = [
        "| moment | hits | SIGKILL | SIGTERM | SIGSTOP | one / two / elastic | SIGTERM to end, s: median, longest | "
        "77 after, s: longest | not as documented |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for moment in (*MOMENTS, "all"):
        mine = [row for row in results if moment in (row["moment"], "all") and "seconds" in row]
        if not mine:
            continue
        counts = [sum(row["signal"] == name for row in mine) for name in SIGNALS]
        kinds = [sum(row["kind"] == kind for row in mine) for kind in KINDS]
        ends = sorted(row["seconds"] for row in mine if PREEMPTED in row["codes"])
        gone = [row["seconds"] for row in mine if PEER_GONE in row["codes"]]
        stops = f"{ends[len(ends) // 2]}, {ends[-1]}" if ends else ""
        bad = sum(bool(row["problem"]) for row in mine)
        cells = [moment, len(mine), *counts, " / ".join(map(str, kinds)), stops, max(gone, default=""), bad]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="keeps hits.jsonl, the cache, undisturbed runs")
    parser.add_argument("--hits", type=int, default=60)
    parser.add_argument("--per-run", type=int, default=3, help="hits a run must survive before it may end")
    parser.add_argument("--switch", type=int, required=True, help="the last step of the first phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments, changes = parser.parse_known_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    log = arguments.folder / "hits.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    runs = Runs(arguments.config, arguments.folder, switch=arguments.switch, changes=changes)
    while (num_hits := sum("seconds" in row for row in results)) < arguments.hits:
        rng = random.Random(arguments.seed * 10**6 + len(results))
        kind = rng.choice(arguments.kinds)
        hits = [choose_hit(rng, moment=rng.choice(MOMENTS)) for _ in range(arguments.per_run)]
        hits.sort(key=lambda hit: MOMENTS.index(hit.moment) == len(MOMENTS) - 1)  # after the end there are no others
        workdir = arguments.folder / f"run-{len(results)}"
        shutil.rmtree(workdir, ignore_errors=True)
        found = runs.hit(workdir, hits, kind=kind, rng=rng)
        results += found
        with open(log, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        for row in found:
            print(f"{num_hits}: {json.dumps(row)}", flush=True)
        if not any(row["problem"] or row.get("end") for row in found):
            shutil.rmtree(workdir)
    print(table(results))
    ends = [row["end"] for row in results if "end" in row]
    print(f"{num_hits} hits, {len(ends)} ends, {sum(not end for end in ends)} of them bit-identical")
    return int(any(ends) or any(row["problem"] for row in results))


if __name__ == "__main__":
    sys.exit(fork_commands() if sys.argv[1:] == ["--forks"] else main())
