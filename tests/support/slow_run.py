"""Starts slow_stage.py in a process of its own, to be interrupted or killed."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SLOW_STAGE = Path(__file__).with_name("slow_stage.py")


def start_slow_stage(
    directory: Path, *, num_workers: int, flags: Sequence[str] = (), seconds: float = 200.0
) -> tuple[subprocess.Popen, list[int]]:
    """Return the process and its workers' ids, once they are at work."""
    process = subprocess.Popen(
        [sys.executable, SLOW_STAGE, directory, f"--workers={num_workers}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},  # where the process finds `support`
        start_new_session=True,  # so that Ctrl-C reaches them all, and not us
    )
    deadline = time.monotonic() + seconds
    while len(found := [path.read_text() for path in directory.glob("began-*")]) < num_workers or not all(found):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process, list(map(int, found))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
