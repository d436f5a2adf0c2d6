"""Two real processes with the checkpoints of one workdir: what is damaged for one, or cannot be written by one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_fall_back_measure_and_hear_of_a_save_that_failed_in_one_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": os.pathsep.join(map(str, _folders()))}
    environment["JAX_COMPILATION_CACHE_DIR"] = ""
    command = [sys.executable, "-m", "support.checkpoint_pair", port]
    pair = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for index in range(2)
    ]  # fmt: skip
    rows = []
    for process in pair:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr[-3000:]
        rows.append(json.loads(stdout.splitlines()[-1]))
    assert rows[0]["said"] == rows[1]["said"]
    for row in rows:
        assert row["found"] == 3 and row["same"]
        assert [text.partition(" is damaged")[0] for text in row["said"]] == ["checkpoint 9", "checkpoint 6"]
        assert row["failed"] == "process 1: File too large" and row["seconds"] < 100
        assert row["steps"] == [3, 9] and row["left"] == [3]
    assert [row["parts"] for row in rows] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    units = [[0, "one"], [1, "one"], [2, "one"]]
    for row, is_first in zip(rows, (True, False), strict=True):  # the other one has no folder, and is told
        assert row["measured"] == {
            "values": [units, units],
            "asked": [0, 1, 2],
            "files": is_first,
            "is_there": is_first,
        }
    assert rows[0]["notices"] == {"checkpoint-damaged": 2, "save-failed": 1}
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["checkpoints-6", "checkpoints-9"]


def _folders() -> list[Path]:
    tests = Path(__file__).parents[1]
    return [tests, tests.parent]
