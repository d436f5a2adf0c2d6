"""btlm status: what it says of runs in every state, from files that are written as a run writes them."""

import dataclasses
import json
import math
import os
import socket
import time

import pytest
from support import fake_gcs
from support.fake_run import CURRICULUM, FakeRun, fake_config, record_steps, result

from btlm_jax.cli import main
from btlm_jax.runs.status import status_of, status_text
from btlm_jax.storage import bucket, owner
from btlm_jax.train import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, STARTS, SUMMARY_FILE
from btlm_jax.train.metric_writer import StartRecord

LAST = CURRICULUM.num_steps
CONFIG = fake_config(checkpoint__every_steps=3)


def checkpoint(workdir, step):
    (workdir / CHECKPOINTS / str(step)).mkdir(parents=True)
    (workdir / CHECKPOINTS / str(step) / "state").write_bytes(b"x" * 1000)


def begin(workdir, *, first_step=1):
    """Begin a run of this process: its owner, its config and the record of its start."""
    workdir.mkdir(exist_ok=True)
    ownership = owner.take(workdir, steal=True)
    (workdir / CONFIG_FILE).write_text(CONFIG.to_json())
    run = FakeRun(workdir, first_step=first_step)
    return ownership, run, StartRecord(workdir, run.ledger)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def test_a_running_run(workdir, capsys):
    _, run, record = begin(workdir)
    with run.writer:
        record_steps(run, 1, 5)
        checkpoint(workdir, 3)
        with run.ledger.measure("evaluation"):
            run.clock.now += 5
            record.write()
            status = status_of(str(workdir))
        assert (status.state, status.exit_code, status.doing) == ("running", None, "evaluation")
        assert f"process {os.getpid()} on {socket.gethostname()}" in status.detail
        assert (status.step, status.num_steps, status.tokens, status.num_tokens) == (5, 9, 5 * 192, 9 * 192)
        assert (status.phase, status.num_phases, status.seq_len) == (2, 2, 48)
        assert status.loss == pytest.approx(sum(10 / step for step in range(1, 6)) / 5)
        assert (status.heldout["step"], status.heldout["loss"]) == (3, 1 / 3)
        assert status.heldout["sources"]["code"]["bits_per_byte"] == 1.5
        assert status.tokens_per_second == 96 and status.last_step_age < 60
        # 4 steps of 2 s; up to here stood 5 s beside 10 s of steps.
        assert status.eta == pytest.approx(8 * 1.5)
        assert status.checkpoint["step"] == 3 and status.checkpoint["bytes"] == 1000 and status.steps_at_risk == 2
        assert (status.next_save_step, status.next_save) == (6, 2)
        assert status.wall_time == {"step": 10, "evaluation": 5} and status.goodput == 10 / 15
        assert main(["status", str(workdir)]) == 0
    out = capsys.readouterr().out
    for said in (": running, process", "5 of 9 (55.6%), phase 2 of 2, length 48", "in 2 s", "goodput 66.7%"):
        assert said in out, out


def test_the_steps_left_of_a_longer_phase_are_slower(workdir):
    _, run, record = begin(workdir)
    with run.writer:
        record_steps(run, 1, 2)
    record.write()
    from btlm_jax.train.flops import flops_per_token

    ratio = flops_per_token(CONFIG.model, seq_len=48) / flops_per_token(CONFIG.model, seq_len=16)
    assert ratio > 1.01 and status_of(str(workdir)).eta == pytest.approx(2 * 2 + 5 * 2 * ratio)


@pytest.mark.parametrize(
    ("code", "state", "said"),
    [
        (75, "stopped", "exit code 75 (preempted and saved; the same command goes on): as told"),
        (76, "stopped", "exit code 76 (bad numbers"),
        (77, "stopped", "exit code 77 (another process is gone"),
        (1, "stopped", "exit code 1 (an error): as told"),
        (None, "killed", "without a word; last heard of"),
    ],
)
def test_a_run_that_ended(workdir, capsys, code, state, said):
    ownership, run, record = begin(workdir)
    with run.writer:
        record_steps(run, 1, 5)
    checkpoint(workdir, 3)
    record.write()
    if code is not None:
        record.end(code, "as told")
    ownership.release()
    status = status_of(str(workdir))
    assert (status.state, status.exit_code) == (state, code) and said in status.detail
    assert status.steps_at_risk == 2 and "2 steps after it" in status_text(status)
    assert status.eta is not None and "once it goes on" in status_text(status)
    capsys.readouterr()
    assert main(["status", str(workdir), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"][0]["state"] == state and printed["errors"] == []


def test_a_finished_run(workdir):
    ownership, run, record = begin(workdir)
    with run.writer:
        record_steps(run, 1, LAST)
    checkpoint(workdir, LAST)
    (workdir / SUMMARY_FILE).write_text(json.dumps({"num_steps": LAST}))
    record.end(0, "")
    ownership.release()
    status = status_of(str(workdir))
    assert (status.state, status.eta, status.next_save_step) == ("finished", None, None)
    (workdir / CHECKPOINTS / str(LAST)).rename(workdir / "elsewhere")
    status = status_of(str(workdir))
    assert (status.state, status.exit_code, status.eta, status.steps_at_risk) == ("finished", 0, None, 0)
    assert "no checkpoint any more" in (text := status_text(status)) and "trained again" not in text
    StartRecord(workdir, run.ledger).write()  # another start, which was killed
    assert status_of(str(workdir)).state == "killed"


def test_a_process_that_is_gone_and_one_on_another_machine(workdir):
    _, _, record = begin(workdir)
    record.write()
    found = owner.read_owner(workdir)
    gone = dataclasses.replace(found, began="1")
    (workdir / owner.OWNER_FILE).write_text(json.dumps(dataclasses.asdict(gone)))
    status = status_of(str(workdir))
    assert status.state == "killed" and "before its first step" in status.detail
    elsewhere = dataclasses.replace(found, machine="another", host="tpu-7")
    (workdir / owner.OWNER_FILE).write_text(json.dumps(dataclasses.asdict(elsewhere)))
    assert status_of(str(workdir)).state == "running"
    long_ago = time.time() - 600
    os.utime(workdir / owner.OWNER_FILE, (long_ago, long_ago))
    status = status_of(str(workdir))
    assert status.state == "unknown" and "tpu-7" in status.detail and "dead, or cut off" in status.detail


def test_a_run_of_a_version_without_records(workdir, capsys):
    workdir.mkdir()
    values = json.loads(CONFIG.to_json())
    del values["bad_numbers"]
    (workdir / CONFIG_FILE).write_text(json.dumps(values))
    run = FakeRun(workdir)
    with run.writer:
        record_steps(run, 1, 4)
    assert main(["status", str(workdir)]) == 0
    assert "it has no record of its starts" in capsys.readouterr().out
    (workdir / CONFIG_FILE).write_text('{"model": 3}')
    assert main(["status", str(workdir)]) == 0
    out = capsys.readouterr().out
    assert "cannot be read by this version" in out and "step      4" in out


def test_a_file_cut_anywhere_and_numbers_that_are_not_finite(workdir):
    _, run, record = begin(workdir)
    with run.writer:
        run.step(1, loss=math.nan)
        run.writer.evaluation(1, result(math.inf))
        run.writer.event(1, "seen \x1b[31m")
    record.write()
    contents = (workdir / METRICS_FILE).read_bytes()
    status = status_of(str(workdir))
    assert math.isnan(status.loss) and status.to_json()["loss"] is None
    with open(workdir / METRICS_FILE, "a") as file:
        row = {"kind": "train", "step": 2, "tokens": 384, "learning_rate": 0.1, "loss": 3.0}
        file.write(json.dumps(row) + "\n")
        file.write(json.dumps(row | {"step": 10**400}) + "\n" + json.dumps(row | {"mfu": 10**400}) + "\n")
    assert (status_of(str(workdir)).loss, status_of(str(workdir)).step) == (3.0, 2)  # of the finite ones
    assert "\x1b" not in status_text(status) and "seen" in status_text(status)
    for length in range(0, len(contents), 7):
        (workdir / METRICS_FILE).write_bytes(contents[:length])
        assert status_text(status_of(str(workdir)))
    (workdir / METRICS_FILE).write_bytes(b"\0\xff\n{}\n" * 100 + contents)
    assert status_of(str(workdir)).step == 1


def test_what_is_no_workdir_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name, said in (
        ("empty", "it is empty"),
        ("store", "a token store"),
        ("file", "is a file"),
        ("no", "there is no"),
    ):
        assert main(["status", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
    begin(tmp_path / "run")
    assert main(["status", *(str(tmp_path / name) for name in ("run", "empty", "file"))]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[:2] == [str(tmp_path / "run"), "running"]
    assert captured.err.count("btlm status:") == 2
    for wrong in ([], [""], ["run", "--seconds=3"], ["run", "--watch", "--seconds=0"]):
        assert main(["status", *wrong]) == 2


def test_watching_ends_with_the_run(workdir, capsys, monkeypatch):
    ownership, run, record = begin(workdir)
    record.write()

    def sleep(seconds):
        assert seconds == 0.5
        record.end(75, "SIGTERM")
        ownership.release()

    monkeypatch.setattr("btlm_jax.cli.status.time.sleep", sleep)
    assert main(["status", str(workdir), "--watch", "--seconds=0.5", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["runs"][0]["state"] for line in lines] == ["running", "stopped"]


def test_nothing_is_written_or_locked(workdir):
    _, _, record = begin(workdir)
    record.write()
    before = {path: path.stat().st_mtime_ns for path in [workdir, *workdir.rglob("*")]}
    status_of(str(workdir))
    assert {path: path.stat().st_mtime_ns for path in [workdir, *workdir.rglob("*")]} == before
    assert next((workdir / STARTS).iterdir()).suffix == ".json"


def test_a_run_in_a_bucket(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
    url = f"gs://{fake_gcs.BUCKET}/a/run"
    _, run, record = begin(workdir)
    with run.writer:
        record_steps(run, 1, 4)
        record.write()
        stored = {}
        with fake_gcs.connected(stored, monkeypatch):
            bucket.upload_run(workdir, url)
            found = dataclasses.asdict(owner.read_owner(workdir))
            stored["a/run/owner.json"] = json.dumps(found).encode()
            status = status_of(url)
            assert (status.workdir, status.state, status.step, status.free_bytes) == (url, "running", 4, None)
            run.step(5)
            stored["a/run/metrics.jsonl"] = (workdir / METRICS_FILE).read_bytes()
            stored["a/run/owner.json"] = json.dumps(found | {"machine": "another"}).encode()
            monkeypatch.setattr("btlm_jax.runs.workdir.time.sleep", lambda seconds: None)
            status = status_of(url)  # the copy is brought up to date
            assert (status.step, status.state) == (5, "unknown")

            def beat(seconds):
                stored["a/run/owner.json"] = json.dumps(found | {"machine": "another", "beat": 9}).encode()

            monkeypatch.setattr("btlm_jax.runs.workdir.time.sleep", beat)
            assert status_of(url).state == "running"
            assert main(["report", url]) == 2 and "--output=FILE is needed" in capsys.readouterr().err
            assert main(["report", url, f"--output={tmp_path / 'page.html'}"]) == 0
            assert main(["status", url.replace("run", "none")]) == 1
    assert "there is nothing in" in capsys.readouterr().err
    assert url in (tmp_path / "page.html").read_text()
