"""The real command in processes: a full disk, bad numbers, SIGTERM, and two processes as one run."""

import json
import resource
import shutil
import signal
import socket

import pytest
from support import fake_gcs
from support.real_store import write_config
from support.run_command import (
    NUM_STEPS,
    ONE_PHASE,
    assert_refused,
    assert_same_run,
    checkpoint_steps,
    finish_btlm,
    recorded,
    run_btlm,
    start_btlm,
    train_arguments,
)
from support.run_here import run_here

from btlm_jax.storage import bucket


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(tiny_run, unfinished_run):
    config, workdir = unfinished_run

    # A compilation cache of limited size, as the other tests' is, breaks at a file that is cut here.
    process = start_btlm(*train_arguments(config, workdir), variables={"JAX_COMPILATION_CACHE_DIR": ""})
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))  # a child's preexec_fn would fork under JAX
    result = finish_btlm(process)
    assert_refused(result, code=1, said=("error: ",))
    assert checkpoint_steps(workdir) == [3]
    assert (
        run_btlm(*train_arguments(config, workdir)).returncode == 0
    )  # here its bits are of as many threads as devices
    assert_same_run(workdir, tiny_run[1], config)


@pytest.mark.slow
def test_bad_numbers_stop_with_76_and_are_not_saved(tiny_run, unfinished_run, capsys):
    config, workdir = unfinished_run
    changes = ("optimizer.peak_learning_rate=1e38", "bad_numbers.max_skips=2", "bad_numbers.max_rollbacks=1")
    assert run_here(*train_arguments(config, workdir), *(f"--config.{change}" for change in changes)) == 76
    said = capsys.readouterr()
    assert "went back to step 3; steps 4 to 5 are passed over" in said.err
    assert "Stopped on bad numbers at step 7: the updates of 2 steps in a row were not made" in said.out
    assert "last good checkpoint is step 3" in said.out and checkpoint_steps(workdir) == [3]
    assert [row["loss"] for row in recorded(workdir, "train")][:3] == [
        row["loss"] for row in recorded(tiny_run[1], "train")
    ][:3]
    evidence = workdir / "bad_numbers" / "step-7"
    assert sorted(path.name for path in evidence.iterdir()) == [
        "batch.jsonl", "config.json", "metrics.jsonl", "norms.json"
    ]  # fmt: skip
    rows = [json.loads(line) for line in (evidence / "batch.jsonl").read_text().splitlines()]
    assert [len(row["ids"]) for row in rows] == [49] * 8 and all(row["text"] for row in rows)
    norms = json.loads((evidence / "norms.json").read_text())
    kernel = norms["parameters"]["blocks/mlp/up/kernel"]
    assert norms["targets"] == 384 and len(kernel["gradient"]) == len(kernel["nu"]) == 2  # of each layer
    assert norms["classes"]["mlp_in"]["parameter"] > 0 and norms["classes"]["mlp_in"]["gradient"] > 0


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75(tiny_run, tmp_path):
    """What it has saved is the undisturbed run up to there; test_resume.py goes on from such ends."""
    config, finished = tiny_run
    process = start_btlm(*train_arguments(config, tmp_path / "run"))
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGTERM)
    result = finish_btlm(process)
    assert result.returncode == 75, result.stdout + result.stderr
    (saved,) = checkpoint_steps(tmp_path / "run")
    assert 1 <= saved < NUM_STEPS and f"Preempted (SIGTERM): saved at step {saved}, " in result.stdout
    assert recorded(tmp_path / "run", "train") == recorded(finished, "train")[:saved]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_in_a_folder_and_in_a_bucket(token_store, tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "config.py", store=token_store, **ONE_PHASE)
    finish_pair(train_arguments(config, tmp_path / "pair"), {})
    assert run_here(*train_arguments(config, tmp_path / "one")) == 0
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        found, expected = ([row[name] for row in recorded(run, kind)] for run in (tmp_path / "pair", tmp_path / "one"))
        assert found == pytest.approx(expected, rel=1e-6)
        assert len(found) == (3 if kind == "train" else len(expected)) > 0

    objects = {}
    with fake_gcs.connected(objects, monkeypatch) as url:  # folders that the processes do not share
        shutil.copytree(tmp_path / "pair", tmp_path / "from-2")
        shutil.rmtree(tmp_path / "from-2/checkpoints/3")
        monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
        assert run_here("checkpoints", str(tmp_path / "from-2"), f"--copy={url}/run") == 0
        places = [{bucket.STAGING_VARIABLE: str(tmp_path / f"staging-{index}")} for index in range(2)]
        finish_pair(train_arguments(config, f"{url}/run"), *places)
        folder = bucket.open_for_reading(f"{url}/run")
        for kind in ("train", "eval"):
            assert recorded(folder, kind)[-1] == recorded(tmp_path / "pair", kind)[-1]
        capsys.readouterr()
        assert run_here("checkpoints", f"{url}/run", "--verify") == 0
        assert capsys.readouterr().out.count("verified") == 2
    names = [name.removeprefix("run/checkpoints/3/") for name in objects if name.startswith("run/checkpoints/3/")]
    databases = {name.split("/")[1] for name in names if name.startswith("state/ocdbt")}
    assert {name.split(".")[1] for name in databases} == {"process_0", "process_1"}
    assert not [name for name in names if name.startswith(("part.", "state/manifest.ocdbt"))]
    in_folder = (tmp_path / "pair" / "checkpoints" / "3" / "digests" / "metadata").read_bytes()
    in_bucket = objects["run/checkpoints/3/digests/metadata"]
    assert json.loads(in_folder)["arrays"] == json.loads(in_bucket)["arrays"]


def finish_pair(arguments, *variables):
    """Run a command in two processes, each with some environment variables of its own, to their end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = [f"--coordinator=localhost:{free.getsockname()[1]}", "--num_processes=2"]
    pair = [
        start_btlm(*arguments, *flags, f"--process_id={i}", variables=variables[min(i, len(variables) - 1)])
        for i in range(2)
    ]
    for process in pair:
        result = finish_btlm(process)
        assert result.returncode == 0, result.stdout + result.stderr
