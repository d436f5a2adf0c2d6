"""What W&B gets of a run: each step once, whatever happens to the run; and what happens to it never ends the run.

With a stand-in for wandb, and with wandb itself, offline, where it is installed.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import fake_run
from support.fake_run import FakeRun, fake_config, record_steps, result

from btlm_jax import notices
from btlm_jax.train import CONFIG_FILE, METRICS_FILE, REPLACED, TRACKERS, trackers
from btlm_jax.train.metric_writer import read_metrics
from btlm_jax.train.trackers import TrackerProcess, check_installed

SERVICES = Path(fake_run.__file__).parent / "services"
FOLDERS = (Path(fake_run.__file__).parents[1], Path(trackers.__file__).parents[2])  # of the tests and of the package
IS_WANDB_HERE = importlib.util.find_spec("wandb") is not None


@pytest.fixture(params=["stand-in", "wandb"])
def wandb(request, monkeypatch):
    """Which wandb the trackers' processes find."""
    if request.param == "stand-in":
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (SERVICES, *FOLDERS))))
    elif IS_WANDB_HERE:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, FOLDERS)))
        monkeypatch.setenv("WANDB_MODE", "offline")
    else:
        pytest.skip("wandb is not installed: pip install 'btlm_jax[wandb]'")
    notices.begin(strict=())
    return request.param


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in alone."""
    monkeypatch.setenv("PYTHONPATH", str(SERVICES))
    notices.begin(strict=())


def begin(workdir: Path, **changes) -> None:
    workdir.mkdir(exist_ok=True)
    (workdir / CONFIG_FILE).write_text(fake_config(**changes).to_json())


def train(workdir: Path, first_step: int, last_step: int, *, tracker: str = "wandb") -> None:
    run = FakeRun(workdir, first_step=first_step, followers=[TrackerProcess(tracker, workdir, first_step=first_step)])
    with run.writer:
        record_steps(run, first_step, last_step)
        if last_step == 9:
            run.writer.sample(9, prompt="Return <the", continuation=" number")


def starts(workdir: Path, *, of: str = "stand-in") -> list[dict]:
    """What W&B got in each start of a run: its id, name and config, {step: values}, and the exit code at its end."""
    if of == "stand-in":
        paths = sorted((workdir / TRACKERS / "wandb").glob("start-*.jsonl"))
        return [_start(map(json.loads, path.read_text().splitlines())) for path in paths]
    paths = sorted((workdir / TRACKERS / "wandb").glob("offline-run-*/*.wandb"))
    return [_start(_rows_of_wandb(path)) for path in paths]


def _start(rows) -> dict:
    found = {"steps": {}}
    for row in rows:
        if "step" in row:
            values = found["steps"].setdefault(row["step"], {})
            assert row["step"] == max(found["steps"]) and not values.keys() & row["values"].keys(), row
            values |= row["values"]
        else:
            found |= row
    return found


def _rows_of_wandb(path: Path):
    """Read wandb's own file: LevelDB's log format, after seven bytes, of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + size]
        position += 7 + size
        whole = chunk if kind in (1, 2) else whole + chunk
        if kind not in (1, 4):
            continue
        record = Record.FromString(whole)
        if record.WhichOneof("record_type") == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            config.pop("_wandb")
            yield {"id": record.run.run_id, "name": record.run.display_name, "config": config}
        elif record.WhichOneof("record_type") == "history":
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            own = {name: value for name, value in values.items() if not name.startswith("_")}
            yield {"step": record.history.step.num, "values": own}
        elif record.WhichOneof("record_type") == "exit":
            yield {"exit": record.exit.exit_code}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def step_numbers(start: dict) -> list[int]:
    return list(start["steps"])


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_in_the_tracker_with_no_step_twice(tmp_path, wandb, capsys):
    workdir = tmp_path / "mine"
    begin(workdir, log__every_steps=2)
    command = [sys.executable, fake_run.__file__, str(workdir), "1", "7", "wandb"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "recorded\n" in process.stdout
        wait_for(workdir / TRACKERS / "wandb.json")
        process.send_signal(signal.SIGKILL)
    with open(workdir / TRACKERS / "wandb.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # its tracker ends by itself
    train(workdir, 5, 9)  # the last checkpoint was that of step 4
    first, second = starts(workdir, of=wandb)
    assert first["id"] == second["id"] == json.loads((workdir / TRACKERS / "wandb.json").read_text())["run_id"]
    assert (first["name"], second["name"]) == ("mine", "mine")
    assert first["config"] == json.loads(fake_config(log__every_steps=2).to_json())
    # Steps 1, the even ones, and those evaluated. Whether step 6, the last that is due, had all its lines nobody knows.
    assert step_numbers(first) == [1, 2, 3, 4] and step_numbers(second) == [6, 8, 9]
    assert (first.get("exit"), second["exit"]) == (1, 0)
    rows = [row for row in read_metrics(workdir / METRICS_FILE) if row["kind"] == "train"]
    steps = first["steps"] | second["steps"]
    for step in (1, 2, 4, 8):
        (row,) = (row for row in rows if row["step"] == step)
        names = row.keys() - {"kind", "step", "seconds"}
        assert steps[step] == {f"train/{name}": row[name] for name in names}
    assert steps[3] == {
        "heldout/all": 1 / 3, "heldout/code": 1 / 3, "heldout/prose": 2 / 3,
        "heldout_bits_per_byte/code": 1.5, "heldout_bits_per_byte/prose": 0.75,
    }  # fmt: skip
    assert steps[6]["train/loss"] == 10 / 6 and steps[6]["heldout/all"] == 1 / 6
    assert "sample" in steps[9] or steps[9]["sample/_type"] == "html-file"
    said = capsys.readouterr().out
    assert f"wandb: goes on with run {first['id']} in " in said
    assert notices.counts() == {}


def test_the_next_start_gives_a_step_with_the_evaluation_that_a_stop_left_to_it(tmp_path, stand_in):
    begin(tmp_path)
    for first, last in ((1, 6), (7, 9)):
        followers = [TrackerProcess("wandb", tmp_path, first_step=first)]
        run = FakeRun(tmp_path, first_step=first, followers=followers, evaluates_before=True)
        with run.writer:
            if first == 7:
                run.writer.evaluation(6, result(1 / 6))
            for step in range(first, last + 1):
                run.step(step)
            if last == 6:
                run.writer.evaluation_follows()
    first, second = starts(tmp_path)
    assert (step_numbers(first), step_numbers(second)) == ([1, 2, 3, 4, 5], [6, 7, 8, 9])
    assert second["steps"][6]["heldout/all"] == 1 / 6 and second["steps"][6]["train/loss"] == 4.5


def test_the_sample_is_shown_as_it_is(tmp_path, stand_in):
    begin(tmp_path)
    train(tmp_path, 1, 9)
    (start,) = starts(tmp_path)
    assert start["steps"][9]["sample"] == "<pre>Return &lt;the\u2502 number</pre>"
    assert (tmp_path / TRACKERS / "wandb.log").read_text() == "chatter of wandb\n"


def test_a_tracker_that_fails_does_not_end_the_run_and_gets_the_rest_later(tmp_path, stand_in, monkeypatch, capsys):
    begin(tmp_path)
    monkeypatch.setenv("FAKE_WANDB", "fail:4")
    train(tmp_path, 1, 6)
    assert notices.counts() == {"tracker-stopped": 1}
    said = capsys.readouterr().err
    assert "the run goes on without it: it ended (exit code 1): RuntimeError: the network is down" in said
    assert f"python -m btlm_jax.train.trackers wandb {tmp_path}" in said.replace(sys.executable, "python")
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE) if row["kind"] == "train"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    monkeypatch.delenv("FAKE_WANDB")
    train(tmp_path, 7, 9)
    first, second = starts(tmp_path)
    assert first["id"] == second["id"] and "exit" not in first
    assert (step_numbers(first), step_numbers(second)) == ([1, 2, 3], [4, 5, 6, 7, 8, 9])


def by_hand(workdir: Path, *options: str, **named) -> subprocess.Popen:
    command = [sys.executable, "-m", "btlm_jax.train.trackers", "wandb", str(workdir), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SERVICES), *sys.path])}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **named)


def test_a_process_whose_run_is_gone_sends_what_there_is(tmp_path, stand_in):
    begin(tmp_path)
    run = FakeRun(tmp_path)
    with run.writer:
        record_steps(run, 1, 5)
    read, write = os.pipe()
    os.close(read)  # nobody hears what it says
    with by_hand(tmp_path, "--follow", stdout=write) as process:
        os.close(write)
    assert process.returncode == 0
    (start,) = starts(tmp_path)
    assert step_numbers(start) == [1, 2, 3, 4]  # step 5 might have been without its evaluation


def test_one_process_of_a_tracker_waits_for_the_other(tmp_path, stand_in):
    begin(tmp_path)
    run = FakeRun(tmp_path)
    with run.writer:
        record_steps(run, 1, 2)
    (tmp_path / TRACKERS).mkdir()
    with open(tmp_path / TRACKERS / "wandb.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = by_hand(tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)  # it needs 0.3 s
        assert not (tmp_path / TRACKERS / "wandb").exists()
    with process:
        assert process.wait(60) == 0
    assert step_numbers(starts(tmp_path)[0]) == [1, 2]


def test_what_is_missing_can_be_sent_by_hand_and_only_once(tmp_path, stand_in):
    begin(tmp_path)
    run = FakeRun(tmp_path)  # without trackers
    with run.writer:
        record_steps(run, 1, 9)
    for _ in range(2):
        with by_hand(tmp_path) as process:
            pass
        assert process.returncode == 0
    first, second = starts(tmp_path)
    assert step_numbers(first) == [1, 2, 3, 4, 5, 6, 7, 8, 9] and first["exit"] == 0
    assert first["id"] == second["id"] and step_numbers(second) == []


def test_steps_that_are_trained_with_other_settings_are_another_run_with_all_steps(tmp_path, stand_in, capsys):
    begin(tmp_path)
    train(tmp_path, 1, 6)
    begin(tmp_path, optimizer__z_loss=0.001)
    train(tmp_path, 7, 8)  # no step of the first run is trained again
    begin(tmp_path, optimizer__z_loss=0.002)
    train(tmp_path, 4, 9)
    begin(tmp_path, optimizer__z_loss=0.002, log__every_steps=2)
    train(tmp_path, 4, 9)  # as after a kill
    first, second, third, fourth = starts(tmp_path)
    assert fourth["id"] == third["id"] and step_numbers(fourth) == []
    assert first["id"] == second["id"] != third["id"]
    assert (step_numbers(first), step_numbers(second)) == ([1, 2, 3, 4, 5, 6], [7, 8])
    assert step_numbers(third) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    record = json.loads((tmp_path / TRACKERS / "wandb.json").read_text())
    del record["settings"]
    assert record == {"run_id": third["id"], "last_step": 9, "earlier_run_ids": [first["id"]], "replaced": []}
    assert notices.counts() == {"tracker-begun-again": 1}
    assert f"{first['id']} has steps from 4 on, which are trained anew" in capsys.readouterr().err


def test_steps_that_are_trained_anew_after_resume_step_are_another_run_once(tmp_path, stand_in, capsys):
    begin(tmp_path)
    train(tmp_path, 1, 6)
    aside = tmp_path / REPLACED / "from-3"
    aside.mkdir(parents=True)
    (aside / METRICS_FILE).write_text("one course\n")
    train(tmp_path, 4, 6)  # a start without --resume_step, as the one with it died before its steps
    train(tmp_path, 5, 9)  # one with --resume_step again, which does nothing
    aside.rename(tmp_path / REPLACED / "kept")
    aside.mkdir()
    (aside / METRICS_FILE).write_text("another\n")
    train(tmp_path, 4, 9)
    first, second, third, fourth = starts(tmp_path)
    assert second["id"] == third["id"] and len({first["id"], second["id"], fourth["id"]}) == 3
    assert [step_numbers(start) for start in (second, third)] == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert step_numbers(fourth) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert capsys.readouterr().err.count("has steps from 4 on, which are trained anew") == 2


@pytest.mark.parametrize(
    "damage", [b"{", b'{"run_id": 3}', b'{"run_id": "a", "last_step": "6", "earlier_run_ids": []}']
)
def test_a_damaged_record_is_reported_and_another_run_begins(tmp_path, stand_in, damage):
    begin(tmp_path)
    (tmp_path / TRACKERS).mkdir()
    (tmp_path / TRACKERS / "wandb.json").write_bytes(damage)
    train(tmp_path, 1, 2)
    assert notices.counts() == {"tracker-begun-again": 1}
    assert step_numbers(starts(tmp_path)[0]) == [1, 2]


def test_a_tracker_that_hangs_is_ended(tmp_path, stand_in, monkeypatch, capsys):
    begin(tmp_path)
    monkeypatch.setenv("FAKE_WANDB", "hang")
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1.5)
    train(tmp_path, 1, 2)
    assert notices.counts() == {"tracker-stopped": 1}
    assert "it has not taken all in 2 s after the run's end" in capsys.readouterr().err
    with open(tmp_path / TRACKERS / "wandb.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_last_step_of_a_run_that_failed_waits_for_its_evaluation(tmp_path, stand_in):
    begin(tmp_path)
    run = FakeRun(tmp_path, followers=[TrackerProcess("wandb", tmp_path, first_step=1)])
    with pytest.raises(OSError), run.writer:
        record_steps(run, 1, 2)
        run.step(3)
        raise OSError
    train(tmp_path, 3, 4)
    first, second = starts(tmp_path)
    assert (step_numbers(first), step_numbers(second)) == ([1, 2], [3, 4])
    assert {"train/loss", "heldout/all"} <= second["steps"][3].keys()


def test_mlflow_gets_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'btlm_jax[mlflow]'")
    notices.begin(strict=())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, FOLDERS)))
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "mine"
    begin(workdir)
    train(workdir, 1, 6, tracker="mlflow")
    train(workdir, 5, 9, tracker="mlflow")
    with contextlib.closing(sqlite3.connect(workdir / TRACKERS / "mlflow.db")) as database:
        ((name, status),) = database.execute("select name, status from runs").fetchall()
        values = database.execute("select key, step, value from metrics order by step").fetchall()
        settings = dict(database.execute("select key, value from params").fetchall())
    assert (name, status) == ("mine", "FINISHED")
    assert [(step, value) for key, step, value in values if key == "train/loss"] == [(n, 10 / n) for n in range(1, 10)]
    assert [(step, value) for key, step, value in values if key == "heldout/all"] == [(n, 1 / n) for n in (3, 6, 9)]
    assert settings["model.d_model"] == "40" and settings["curriculum.seq_len"] == "[16, 48]"
    (sample,) = workdir.rglob("sample-9.txt")
    assert sample.read_text() == "Return <the\u2502 number"
    assert notices.counts() == {} and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else object())
    check_installed(("wandb",))
    with pytest.raises(
        ImportError, match=r"log.trackers=wandb, ?mlflow needs .* mlflow: .* install 'btlm_jax\[mlflow\]'"
    ):
        check_installed(("wandb", "mlflow"))
