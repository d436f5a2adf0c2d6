"""Preempt a training run some times, start it again at once, and print what that cost.

Command: python benchmarks/goodput.py --folder=DIR --minutes=30 --preemptions=5 --config=local_cpu [--bucket]
         [-- --config.KEY=VALUE ...]

Sends SIGTERM at equal distances of time, and gives the same command again when the process has ended. With --bucket the
workdir is on tests/support/fake_gcs.py, and the local folder is deleted before each start, as if it were on another
machine. Choose the tokens so that the run takes about --minutes. Prints a row for each start (from the command to its
first line of a step, the step that it went on from, from SIGTERM to the end, the exit code), and the ledger that
`btlm train` prints of all starts. Exits with 1 if a start ends otherwise than with 75, or the last one than with 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SERVER = Path(__file__).parents[1] / "tests" / "support" / "fake_gcs.py"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", default="local_cpu")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--preemptions", type=int, default=5)
    parser.add_argument("--bucket", action="store_true")
    parser.add_argument("flags", nargs="*", help="of btlm train, after --")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    environment, server, workdir = {**os.environ, "PYTHONUNBUFFERED": "1"}, None, str(given.folder / "run")
    if given.bucket:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, SERVER, str(port), "0.001"])
        workdir = "gs://bucket/run"
        environment |= {
            "BTLM_STAGING": str(given.folder / "staging"),
            "FSSPEC_GS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    command = [sys.executable, "-m", "btlm_jax", "train", f"--config={given.config}", f"--workdir={workdir}"]
    began, is_right, last = time.monotonic(), True, []
    print("| start | went on from step | to the first step, s | SIGTERM to the end, s | exit code |")
    print("|---|---|---|---|---|")
    try:
        for number in range(given.preemptions + 1):
            if given.bucket:
                shutil.rmtree(given.folder / "staging", ignore_errors=True)
            is_last = number == given.preemptions
            until = began + 60 * given.minutes * (number + 1) / (given.preemptions + 1)
            row, code, last = run(command + given.flags, environment, until=None if is_last else until)
            print(f"| {number + 1} | {row} | {code} |", flush=True)
            is_right &= code == (0 if is_last else 75)
            if code != 75:
                break
    finally:
        if server is not None:
            server.kill()
    print("\n".join(line for line in last if line.startswith(("The whole run", "Time "))))
    return int(not is_right)


def run(command: list[str], environment: dict[str, str], *, until: float | None) -> tuple[str, int, list[str]]:
    """Run a command to its end, or to a SIGTERM at a time; return cells of its row, its exit code, its lines."""
    began, said, first, stopped, origin = time.monotonic(), [], 0.0, 0.0, "0"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line.rstrip("\n"))
        if found := re.match(r"Resuming from step ([\d,]+)", line):
            origin = found[1]
        if not first and re.match(r"step [\d,]+/[\d,]+ \| len", line):
            first = time.monotonic() - began
        if first and until is not None and not stopped and time.monotonic() > until:  # steps print every few seconds
            process.send_signal(signal.SIGTERM)
            stopped = time.monotonic()
    code = process.wait()
    if code not in (0, 75):
        print("\n".join(said[-20:]), file=sys.stderr)
    end = f"{time.monotonic() - stopped:.1f}" if stopped else ""
    return f"{origin} | {first:.1f} | {end}", code, said


if __name__ == "__main__":
    sys.exit(main())
