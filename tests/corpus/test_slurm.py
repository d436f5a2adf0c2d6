"""The Slurm executor over a Slurm of this machine (fake_slurm.py): the same bytes, and nothing lost when jobs die."""

import os
import pickle
import signal
import sys

import pytest
from support import fake_slurm
from support.corpus_files import contents
from support.corpus_run import make_store
from support.counting_stage import begun, count, counting, die, refuse, write
from support.slow_run import is_alive, start_slow_stage
from support.slow_stage import END, slow_stage

from btlm_jax.cli import USAGE, main
from btlm_jax.corpus.engine import slurm
from btlm_jax.corpus.engine.slurm import SlurmWorkers
from btlm_jax.corpus.engine.slurm_worker import (
    CLAIMS_FOLDER,
    FAILED_FOLDER,
    WORK_FILE,
    TaskList,
    claim_path,
    run_unclaimed_tasks,
)
from btlm_jax.corpus.engine.stage import Stage, accept_all, run_stage
from btlm_jax.corpus.engine.tasks import record_path
from btlm_jax.corpus.engine.workers import LocalWorkers


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of a Slurm, which is on PATH; its jobs find the functions of the tests."""
    folder = tmp_path / "slurm"
    fake_slurm.install(folder)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(slurm, "VISIBLE_SECONDS", 0.3)
    yield folder
    for job in fake_slurm.jobs_of(folder):
        assert all(element["state"] not in ("PENDING", "RUNNING") for element in job["elements"])


def run(step, directory, *, workers=None, said=None, count=3) -> dict:
    log = ([] if said is None else said).append
    workers = workers or SlurmWorkers(count=count, options=("--partition=cpu",), log=log)
    return run_stage(counting(step), directory, workers=workers, log=log, check=accept_all)


@pytest.mark.slow
def test_every_stage_gives_the_store_that_local_workers_give(cluster, tmp_path):
    local = make_store(tmp_path / "local", LocalWorkers(1))
    found = make_store(tmp_path / "jobs", SlurmWorkers(count=1, options=("--partition=cpu",), log=print))
    assert contents(found) == contents(local)
    jobs = fake_slurm.jobs_of(cluster)
    steps = ["clean", "dedup-signatures", "dedup-pairs", "dedup-clusters", "dedup"]
    steps += ["split-assign", "split-heldout", "split", "tokenize", "pack"]
    assert [job["name"].rsplit("-", 1)[0] for job in jobs] == [f"btlm-{step}" for step in steps]
    assert {job["partition"] for job in jobs} == {"cpu"}


def test_jobs_share_all_tasks_each_is_done_once_and_counted(cluster, tmp_path):
    said = []
    (tmp_path / "out").mkdir()
    for name in (fake_slurm.DOWN, fake_slurm.HELD):
        (cluster / name).touch()
    manifest = run(count, tmp_path / "out", said=said)
    assert begun(tmp_path / "out") == {f"begun-{index}": 1 for index in range(5)}
    assert manifest == run(count, tmp_path / "local", workers=LocalWorkers(1))
    states = [element["state"] for element in fake_slurm.jobs_of(cluster)[0]["elements"]]
    assert states == ["COMPLETED", "COMPLETED", "CANCELLED"]
    assert "submitted as Slurm job 100, 3 jobs; Ctrl-C cancels it" in said[0]
    assert any("Unable to contact slurm controller" in line for line in said)
    assert "5/5 shards, 50 documents" in said[-1] and not (tmp_path / "out" / "slurm").exists()


@pytest.mark.slow
def test_a_killed_job_is_named_with_its_log_the_rest_is_done_and_the_next_start_finishes(cluster, tmp_path):
    with pytest.raises(ValueError) as raised:
        run(die, tmp_path / "out")
    log = tmp_path / "out" / "slurm" / "0.log"
    for part in ("left 1 of 5 tasks: task 2 was taken by job 100_", "OUT_OF_MEMORY", "of its log", "run the same"):
        assert part in str(raised.value)
    assert log.is_file() and len(list((tmp_path / "out" / "done").iterdir())) == 4
    manifest = run(count, tmp_path / "out")
    assert begun(tmp_path / "out") == {f"begun-{index}": 1 for index in range(5)}
    assert manifest == run(count, tmp_path / "local", workers=LocalWorkers(1))


@pytest.mark.slow
def test_what_a_task_raises_is_raised_here_and_no_other_begins(cluster, tmp_path):
    with pytest.raises(ValueError, match="^task 0 cannot be done$"):
        run(refuse, tmp_path / "out", count=1)
    assert begun(tmp_path / "out") == {}
    run(count, tmp_path / "out")
    assert len(begun(tmp_path / "out")) == 5


def test_a_task_whose_output_is_gone_is_done_again(cluster, tmp_path):
    run(write, tmp_path / "out")
    (tmp_path / "out" / "written-3").unlink()
    run(write, tmp_path / "out")
    assert begun(tmp_path / "out") == {f"begun-{index}": 1 + (index == 3) for index in range(5)}
    assert len(fake_slurm.jobs_of(cluster)[1]["elements"]) == 1


def test_ctrl_c_cancels_the_array_and_leaves_nothing_half_written(cluster, tmp_path):
    process, pids = start_slow_stage(tmp_path / "out", num_workers=2, flags=["--executor=slurm"])
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == "btlm corpus: interrupted; the same command resumes where it can\n"
    assert not any(map(is_alive, pids)) and list((tmp_path / "out").glob(".output*")) == []


def test_a_start_waits_for_the_jobs_of_one_that_was_killed(cluster, tmp_path, monkeypatch):
    directory = tmp_path / "out"
    process, pids = start_slow_stage(directory, num_workers=2, flags=["--executor=slurm"])
    process.kill()
    process.communicate()
    assert all(map(is_alive, pids)) and len(list(directory.glob(".output*.tmp"))) == 2
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(OSError, match="may still be at work .* squeue is not installed here"):
            run_again(directory)
    said = []

    def log(line):
        said.append(line)
        (directory / END).touch()

    run_again(directory, log)
    assert "in the queue as btlm-slow-" in said[0] and "2 RUNNING" in said[0]
    began = {path.name: path.read_text() for path in directory.glob("began-*")}
    assert len(began) == 9 and set(began.values()) == {str(pid) for pid in pids}


def run_again(directory, log=print):
    run_stage(slow_stage(), directory, workers=LocalWorkers(1), log=log, check=accept_all)


def test_what_slurm_refuses_is_told(cluster, tmp_path, monkeypatch, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("text " * 100)
    command = ["corpus", "clean", f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'out'}", "--executor=slurm"]
    assert main([*command, "--workers=2", "--sbatch=--partition=closed"]) == 1
    assert "sbatch failed: sbatch: error: invalid partition specified: closed" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    command[-2] = f"--output={tmp_path / 'two'}"
    assert main([*command, "--workers=2"]) == 1
    assert "sbatch is not installed here; give --executor=slurm on a login node" in capsys.readouterr().err
    assert main([*command[:-1], "--workers=1"]) == 0  # nothing is left to wait for


def prepare_by_hand(folder) -> Stage:
    """Write what a job finds in `folder`/slurm."""
    stage = counting(count)
    for made in ("out/done", f"slurm/{CLAIMS_FOLDER}", f"slurm/{FAILED_FOLDER}"):
        (folder / made).mkdir(parents=True)
    plan = TaskList(run=stage.run, tasks=tuple(stage.tasks), directory=folder / "out")
    (folder / "slurm" / WORK_FILE).write_bytes(pickle.dumps(plan))
    return stage


def test_a_job_that_starts_anew_takes_up_its_own_task_and_no_other(tmp_path):
    stage = prepare_by_hand(tmp_path)
    for index, worker in ((0, "1.0"), (1, "0.0"), (2, "1.0")):
        claim_path(tmp_path / "slurm", stage.tasks[index]).symlink_to(worker)
    record_path(tmp_path / "out", stage.tasks[2]).touch()  # had been done before the machine was lost
    assert run_unclaimed_tasks(tmp_path / "slurm", array_task="1", process="0") == 0
    assert begun(tmp_path / "out") == {"begun-0": 1, "begun-3": 1, "begun-4": 1}


def test_no_task_begins_after_one_has_failed(tmp_path):
    prepare_by_hand(tmp_path)
    (tmp_path / "slurm" / FAILED_FOLDER / "00004").touch()
    assert run_unclaimed_tasks(tmp_path / "slurm", array_task="1", process="0") == 0
    assert begun(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--executor=dask"], "--executor=dask is not known; it may be local, ray, slurm"),
        (["--executor=slurm"], "--workers=N is needed: how many tasks run at a time"),
        (["--executor=ray", "--workers=0"], "--workers=0 must be 1 or more: how many tasks run at a time"),
        (["--executor=slurm", "--workers=2", "--ray_address=a:1"], "--ray_address needs --executor=ray; it is slurm"),
        (["--sbatch=--mem=4G"], "--sbatch needs --executor=slurm; it is local"),
        (["--executor=slurm", "--workers=2", "--sbatch='--mem"], "cannot be split into options: No closing quotation"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message, capsys):
    assert main(["corpus", "dedup", "--input=x", "--output=y", *flags]) == USAGE
    assert message in capsys.readouterr().err
