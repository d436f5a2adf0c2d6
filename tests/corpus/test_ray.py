"""The Ray executor over a Ray of this machine: the same bytes, and nothing lost when workers die."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from support.corpus_files import contents, write_raw
from support.corpus_run import make_store
from support.counting_stage import begun, count, counting, die, refuse
from support.slow_run import is_alive, start_slow_stage

from btlm_jax.cli import main
from btlm_jax.corpus.engine.ray_workers import RayWorkers
from btlm_jax.corpus.engine.stage import accept_all, run_stage
from btlm_jax.corpus.engine.workers import LocalWorkers

ENVIRONMENT = os.environ | {"PYTHONPATH": ":".join(sys.path)}  # where workers find the tests' functions
START_SECONDS = 300.0  # of a Ray; an idle machine needs 5
TRIES = 3  # Ray gives its parts 30 s to start, which a busy machine may need


pytestmark = pytest.mark.slow  # a Ray starts


@pytest.fixture(scope="module")
def head():
    """The address of a cluster of two processors on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false"]
    flags += ["--disable-usage-stats", "--object-store-memory=100000000"]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for _ in range(TRIES):
        process = subprocess.Popen(command, env=ENVIRONMENT, **options)
        said = [""]
        while "--block" not in said[-1] and (line := process.stdout.readline()):  # the last thing it says
            said.append(line)
        if process.poll() is None and "--block" in said[-1]:
            break
        process.communicate()
    else:
        pytest.fail("".join(said))
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.communicate(timeout=120)


@pytest.fixture(scope="module")
def workers(head):
    with RayWorkers(count=2, address=head) as made:
        yield made


def run(step, directory, by, said=None) -> dict:
    log = ([] if said is None else said).append
    return run_stage(counting(step), directory, workers=by, log=log, check=accept_all)


@pytest.mark.slow
def test_every_stage_gives_the_store_that_local_workers_give(workers, tmp_path):
    local, found = make_store(tmp_path / "local", LocalWorkers(1)), make_store(tmp_path / "ray", workers)
    assert contents(found) == contents(local)


def test_all_tasks_are_done_once_and_counted(workers, tmp_path, monkeypatch):
    said = []
    monkeypatch.chdir(tmp_path)
    manifest = run(count, Path("out"), workers, said)
    assert begun(tmp_path / "out") == {f"begun-{index}": 1 for index in range(5)}
    assert manifest == run(count, tmp_path / "local", LocalWorkers(1))
    assert "5/5 shards, 50 documents" in said[-1]


def test_a_killed_worker_ends_the_stage_and_the_next_start_finishes_it(workers, tmp_path):
    with pytest.raises(ValueError, match=r"the worker that had task 2 was killed.*Finished work is kept"):
        run(die, tmp_path / "out", workers)
    done = {path.stem for path in (tmp_path / "out" / "done").iterdir()}
    assert {"00000", "00001"} <= done and "00002" not in done
    run(count, tmp_path / "out", workers)
    assert begun(tmp_path / "out") == {f"begun-{index}": 1 for index in range(5)}


def test_what_a_task_raises_is_raised_here_and_what_has_begun_is_kept(workers, tmp_path):
    with pytest.raises(ValueError, match="^task 0 cannot be done$"):
        run(refuse, tmp_path / "out", workers)
    assert len(begun(tmp_path / "out")) == len(list((tmp_path / "out" / "done").iterdir()))
    run(count, tmp_path / "out", workers)
    assert begun(tmp_path / "out") == {f"begun-{index}": 1 for index in range(5)}


def test_a_machine_without_the_program_is_told(workers, tmp_path, monkeypatch):
    missing = types.ModuleType("not_on_the_cluster")
    exec("def step(task, directory, heartbeat): pass", missing.__dict__)
    monkeypatch.setitem(sys.modules, missing.__name__, missing)
    with pytest.raises(ValueError, match="needs this installation .*No module named 'not_on_the_cluster'"):
        run(missing.step, tmp_path / "out", workers)


def start(directory, *flags):
    for left in reversed(range(TRIES)):
        try:
            return start_slow_stage(directory, num_workers=2, flags=["--executor=ray", *flags], seconds=START_SECONDS)
        except AssertionError as error:
            if not left or "Ray cannot start" not in str(error):
                raise


@pytest.mark.slow
def test_ctrl_c_ends_a_ray_of_our_own_in_one_line_with_nothing_half_written(tmp_path):
    process, pids = start(tmp_path)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and time.monotonic() - began < 100  # a task left alone takes 300
    assert errors == "btlm corpus: interrupted; the same command resumes where it can\n"
    assert not any(map(is_alive, pids)) and list(tmp_path.glob(".output*")) == list(tmp_path.glob("output*")) == []


def test_tasks_end_with_a_command_that_is_killed(head, tmp_path):
    process, pids = start(tmp_path, f"--ray_address={head}")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 100
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "there is no Ray cluster at 127.0.0.1:9 .*; start one with `ray start --head`"),
        ("ray://host:10001", "'ray://host:10001' of the Ray cluster is not HOST:PORT"),
        ("auto", "'auto' of the Ray cluster is not HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_refused(tmp_path, address, message, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    write_raw(tmp_path / "raw.jsonl", ["text " * 90], source="A")
    command = ["corpus", "clean", f"--input={tmp_path / 'raw.jsonl'}", f"--output={tmp_path / 'out'}", "--workers=2"]
    assert main([*command, "--executor=ray"]) == 1
    assert re.search(message, capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "--executor=ray"]) == 1
    assert "-m pip install 'btlm_jax[ray]'" in capsys.readouterr().err
