"""Kill `btlm train --data` in each of its stages, give the same command again, and compare the token store's bytes.

Command: python benchmarks/kill_data.py [--megabytes=8] [--kills=2] [--seed=1] [--folder=DIR]
Text of made-up words in three subfolders, one with a document that is divided. The command runs once undisturbed up to
its token store. Then a new workdir is begun: in every stage the command is killed (SIGKILL, its process alone) after a
random part of the time that the stage took, as often as --kills says, and given again. Above 64 MB the stages have
worker processes, which must end by themselves. Prints a line a kill; exits with 1 when a file of the store differs, or
a process is left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("clean", "pieces", "dedup", "split", "tokenizer", "tokenize")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}
POLL_SECONDS = 0.005
GIVE_UP_SECONDS = 1800.0
LEFT_SECONDS = 30.0  # after which a worker process counts as left


def write_text(folder: Path, *, num_bytes: int, seed: int) -> None:
    """Write documents of made-up words: one file of JSON lines each in two folders, and a long text in a third."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(2, 9))) for _ in range(20_000)]

    def text(size: int) -> str:
        lines = []
        while size > 0:
            lines.append(" ".join(rng.choices(words, k=rng.randint(6, 16))))
            size -= len(lines[-1]) + 1
        return "\n".join(lines)

    for name, share in (("a", 0.5), ("b", 0.3)):
        (folder / name).mkdir(parents=True)
        with open(folder / name / "texts.jsonl", "w") as file:
            left = share * num_bytes
            while left > 0:
                row = json.dumps({"text": text(rng.randint(500, 6_000))})
                file.write(row + "\n")
                left -= len(row)
    (folder / "c").mkdir()
    (folder / "c" / "long.txt").write_text(text(int(0.2 * num_bytes)))


def stage_of(workdir: Path) -> str:
    """Return the stage that a run is in, the last that has begun; "" before the first, "done" after the last."""
    if (workdir / "store" / "manifest.json").is_file():
        return "done"
    if (workdir / "store").is_dir():
        return "tokenize"
    names = {path.name.partition("-")[0] for path in (workdir / "corpus").glob("*")}
    return next((stage for stage in reversed(STAGES) if stage in names), "")


def start(text: Path, workdir: Path) -> subprocess.Popen:
    """Start the command."""
    command = [sys.executable, "-m", "btlm_jax", "train", f"--data={text}", f"--workdir={workdir}", "--minutes=1"]
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir.with_suffix(".txt"), "ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT, start_new_session=True
        )


def wait_for(process: subprocess.Popen, workdir: Path, stages: tuple[str, ...]) -> str:
    """Wait until the run is in one of the stages, and return which.

    Raises:
      RuntimeError: the command ends, or takes too long.
    """
    began = time.monotonic()
    while time.monotonic() - began < GIVE_UP_SECONDS:
        if (stage := stage_of(workdir)) in stages:
            return stage
        if process.poll() is not None:
            raise RuntimeError(f"exit code {process.returncode} in stage {stage!r}: {workdir.with_suffix('.txt')}")
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"no stage of {stages} after {GIVE_UP_SECONDS:.0f} s")


def kill(process: subprocess.Popen) -> int:
    """Kill the command alone, wait for the workers of its session, and return how many of them are left."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + LEFT_SECONDS
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return 0
        time.sleep(0.1)
    left = len(subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split())
    os.killpg(process.pid, signal.SIGKILL)
    return left


def hashes(store: Path) -> dict[str, str]:
    """Return a hash of every file of a token store, without those of its stages' work."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.iterdir())
        if path.is_file() and path.suffix != ".lock" and not path.name.startswith(".")
    }


def undisturbed(text: Path, workdir: Path) -> dict[str, float]:
    """Run up to the token store, and return how many seconds each stage took."""
    process = start(text, workdir)
    moments = {}
    while True:
        stage = wait_for(process, workdir, tuple(each for each in (*STAGES, "done") if each not in moments))
        moments[stage] = time.monotonic()
        if stage == "done":
            break
    kill(process)
    ends = list(moments.values())[1:]
    return {stage: end - begin for (stage, begin), end in zip(moments.items(), ends, strict=False)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="btlm-kill-data-"))
    rng, text, problems = random.Random(given.seed), folder / "text", []
    write_text(text, num_bytes=int(given.megabytes * 1e6), seed=given.seed)
    seconds = undisturbed(text, folder / "undisturbed")
    print("seconds:", ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()), flush=True)
    killed, num_kills = folder / "killed", 0
    for stage in seconds:
        for _ in range(given.kills):
            process = start(text, killed)
            later = (*STAGES[STAGES.index(stage) :], "done")
            found = wait_for(process, killed, later)
            time.sleep(0.7 * rng.random() * seconds[stage] if found == stage else 0.0)
            found = stage_of(killed)
            left = kill(process)
            num_kills += 1
            print(f"killed in {found}{f', {left} processes left' if left else ''}", flush=True)
            problems += [f"{left} processes are left of a kill in {found}"] if left else []
            if found == "done":
                break
    process = start(text, killed)
    wait_for(process, killed, ("done",))
    kill(process)
    expected, found = hashes(folder / "undisturbed" / "store"), hashes(killed / "store")
    problems += [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    print(f"{num_kills} kills, {len(expected)} files of the store:", ", ".join(problems) or "the same bytes")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
