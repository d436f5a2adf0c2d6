"""Where the wall time of a run went over its starts, against starts whose every second is told."""

import json

import pytest
from support.fake_run import Clock, FakeRun

from btlm_jax import notices
from btlm_jax.cli import main
from btlm_jax.runs.wall_time import wall_time
from btlm_jax.train import STARTS, loop
from btlm_jax.train.metric_writer import GoodputLedger, StartRecord
from btlm_jax.train.starts import read_starts

TOTAL = "total"


class Runs:
    """Starts of one workdir, one after another."""

    def __init__(self, workdir, monkeypatch):
        self.workdir = workdir
        self.now = 1_000_000.0
        monkeypatch.setattr("btlm_jax.train.metric_writer.time.time", lambda: self.now)

    def start(
        self,
        *,
        first_step,
        last_step,
        seconds=2.0,
        set_up=7.0,
        compile_seconds=11.0,
        end=None,
        each=None,
        written_at=0,
        passed_over=(),
    ):
        """Begin, train steps of so many seconds each, and end with an exit code, or as if killed.

        The record is written at the end, or at a step.
        """
        run = FakeRun(self.workdir, first_step=first_step)
        record = StartRecord(self.workdir, run.ledger)
        began = run.clock.now
        run.ledger.passed_over += passed_over
        run.spend("compile", compile_seconds)
        run.clock.now += set_up
        with run.writer:
            for step in range(first_step, last_step + 1):
                run.step(step, seconds=seconds)
                if each:
                    each(run, step)
                run.ledger.mark()
                if step == written_at:
                    record.write()
        self.now += run.clock.now - began
        if not written_at:
            record.write()
        if end is not None:
            record.end(end, "as told")

    def read(self):
        problems = []
        starts = read_starts(self.workdir, problems)
        assert problems == []
        return starts


@pytest.fixture
def runs(tmp_path, monkeypatch):
    return Runs(tmp_path, monkeypatch)


def test_steps_that_are_trained_again_are_lost_and_the_time_between_starts_counts(runs):
    runs.start(first_step=1, last_step=8)  # killed; it had saved step 5
    runs.now += 100
    runs.start(first_step=6, last_step=9, seconds=3.0, end=0)
    times = wall_time(runs.read())
    assert times.seconds == {
        "step": 5 * 2 + 4 * 3, "lost work": 3 * 2, "between starts": 100, "set-up": 14, "compile": 22,
    }  # fmt: skip
    assert times.total == 100 + (18 + 16) + (18 + 12) == runs.now - 1_000_000
    assert (times.lost_steps, times.goodput) == (3, 22 / 164)
    assert [row.lost_steps for row in times.starts] == [3, 0]
    assert [row.total for row in times.starts] == [34, 30]


def test_steps_after_the_last_write_of_a_killed_starts_record_are_counted(runs):
    runs.start(first_step=1, last_step=8, written_at=6)
    runs.start(first_step=4, last_step=9, end=0)
    assert wall_time(runs.read()).lost_steps == 5


def test_a_start_may_go_back_over_several_starts(runs):
    runs.start(first_step=1, last_step=4)
    runs.start(first_step=5, last_step=7)
    runs.start(first_step=3, last_step=9, end=0)  # two checkpoints were damaged
    times = wall_time(runs.read())
    assert [row.lost_steps for row in times.starts] == [2, 3, 0]
    assert times.seconds["lost work"] == 2 * 2 + 3 * 2 and times.seconds["step"] == 9 * 2
    assert times.starts[1].seconds.get("step", 0) == 0


def test_what_stands_beside_lost_steps_is_lost_with_them(runs):
    def evaluate(run, step):
        if step in (2, 6):
            run.spend("evaluation", 5)

    runs.start(first_step=1, last_step=8, each=evaluate)
    runs.start(first_step=4, last_step=9, end=0)
    times = wall_time(runs.read())
    assert times.seconds["evaluation"] == 5 and times.seconds["lost work"] == 5 * 2 + 5
    assert times.total == runs.now - 1_000_000


def test_steps_that_were_passed_over_are_lost_whichever_start_trained_them(runs):
    runs.start(first_step=1, last_step=4, end=75)
    runs.start(first_step=5, last_step=8, passed_over=[(3, 5), (3, 6)])
    times = wall_time(runs.read())
    assert [row.passed_over_steps for row in times.starts] == [2, 2] and times.lost_steps == 0
    assert times.seconds["step"] == 4 * 2 and times.seconds["lost work"] == 4 * 2
    assert times.total == runs.now - 1_000_000
    runs.start(first_step=5, last_step=9, end=0)  # the second was killed before a checkpoint: what it knew is gone
    times = wall_time(runs.read())
    assert times.lost_steps == 4 and times.seconds["lost work"] == 4 * 2 and times.seconds["step"] == 9 * 2


def test_marks_are_few_and_steps_between_them_are_found(tmp_path):
    clock = Clock()
    ledger = GoodputLedger(clock)
    record = StartRecord(tmp_path, ledger)
    ledger.begin_steps(1)
    for step in range(1, 1001):
        with ledger.measure("step"):
            clock.now += 3
        ledger.step = step
        ledger.mark()
    record.write()
    (start,) = read_starts(tmp_path, [])
    assert 50 < len(start.marks) <= 128
    assert [start.at(step).get("step", 0) for step in (0, 1, 500, 777, 1000)] == pytest.approx([0, 3, 1500, 2331, 3000])


def test_a_start_without_steps_is_set_up_only(tmp_path):
    clock = Clock()
    ledger = GoodputLedger(clock, began=clock.now - 4)
    record = StartRecord(tmp_path, ledger)
    with ledger.measure("compile"):
        clock.now += 10
        record.write()
        assert json.loads(next((tmp_path / STARTS).iterdir()).read_text())["running"] == "compile"
        clock.now += 10
    clock.now += 1
    notices.report("step-skipped", "one")
    record.end(2, "a  wrong\nline")
    (start,) = read_starts(tmp_path, [])
    assert wall_time([start]).seconds == {"set-up": 5, "compile": 20}
    assert (start.code, start.reason, start.first_step) == (2, "a wrong line", None)
    assert start.notices["step-skipped"] == 1


def test_a_start_that_finds_the_run_finished_is_no_part_of_it(runs):
    runs.start(first_step=1, last_step=9, end=0)
    before = wall_time(runs.read())
    runs.now += 1e6
    ledger = GoodputLedger(Clock())
    StartRecord(runs.workdir, ledger).end(0, "")
    for code in (1, 2):
        StartRecord(runs.workdir, ledger).end(code, "refused")
    assert len(runs.read()) == 4 and wall_time(runs.read()) == before
    StartRecord(runs.workdir, ledger).end(75, "preempted")  # this one had something to do
    assert wall_time(runs.read()).seconds["between starts"] == 1e6


def test_the_end_is_recorded_on_a_full_disk(tmp_path, monkeypatch):
    def fail(path, contents):
        raise OSError(28, "No space left on device")

    clock = Clock()
    record = StartRecord(tmp_path, GoodputLedger(clock))
    monkeypatch.setattr("btlm_jax.train.metric_writer.write_atomically", fail)
    record.end(1, "no record yet")
    assert read_starts(tmp_path, []) == ()
    monkeypatch.undo()
    record = StartRecord(tmp_path, GoodputLedger(clock))
    record.write()
    monkeypatch.setattr("btlm_jax.train.metric_writer.write_atomically", fail)
    clock.now += 5
    record.write()
    assert read_starts(tmp_path, [])[0].seconds == {"total": 0.0}
    record.end(1, "No space left")
    (start,) = read_starts(tmp_path, problems := [])
    assert (start.code, start.reason, start.seconds, problems) == (1, "No space left", {"total": 5.0}, [])


def test_a_record_has_no_secrets_of_urls(tmp_path, monkeypatch):
    words = ["train", "--data=https://me:word@host/a@b.txt?sig=1&x=2", "s3://bucket/run", "--name=is it?"]
    monkeypatch.setattr("sys.argv", ["btlm", *words])
    StartRecord(tmp_path, GoodputLedger(Clock())).end(0, "")
    (start,) = read_starts(tmp_path, [])
    assert start.command == ("btlm", "train", "--data=https://...@host/a@b.txt?...", *words[2:])


def test_the_order_of_starts_is_not_that_of_clocks(runs):
    runs.start(first_step=1, last_step=8)
    runs.now -= 1000  # on another machine
    runs.start(first_step=6, last_step=9, end=0)
    times = wall_time(runs.read())
    assert [row.lost_steps for row in times.starts] == [3, 0] and times.seconds["step"] == (5 + 4) * 2
    assert [row.at for row in times.starts] == [0, 34] and times.total == 34 + 26


def test_the_end_of_a_run_prints_the_time_of_all_its_starts(runs, tmp_path, monkeypatch, capsys):
    def train(config, *, ledger, **others):
        ledger.begin_steps(6)
        ledger.step = 9
        return loop.DONE

    monkeypatch.setattr(loop, "train", train)
    runs.start(first_step=1, last_step=8)
    runs.now += 100
    assert main(["train", "--config=local_cpu", f"--workdir={runs.workdir}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The whole run: ")]
    assert " in 2 starts, goodput " in line and "between starts" in line and "3 steps were trained again" in line
    assert main(["train", "--config=local_cpu", f"--workdir={tmp_path / 'other'}"]) == 0
    assert "The whole run" not in capsys.readouterr().out  # its only start was printed as it ended


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{}", '{"began": "x"}', "\0" * 9, '{"began": 1.0, "seconds": {}}'],
)
def test_a_damaged_record_is_named_and_the_others_are_read(runs, damage):
    runs.start(first_step=1, last_step=2, end=0)
    (runs.workdir / STARTS / "20990101T000000Z-ffffffff.json").write_text(damage)
    (runs.workdir / STARTS / ".20990101T000000Z-ffffffff.json.ab.tmp").write_text("{")
    problems = []
    assert len(read_starts(runs.workdir, problems)) == 1
    assert len(problems) == 1 and "20990101T000000Z" in problems[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("marks", [[1, {}], 2]), ("marks", [["a", {"total": 1}]]), ("seconds", {"total": "x"}), ("step", 1.5),
     ("end", [1]), ("seconds", {"step": 1.0}), ("seconds", {"total": 1e400}), ("passed_over", [[1]]),
     ("passed_over", 3), ("began", 1e300), ("written", -1.0), ("seconds", {"total": 10**400}), ("step", 10**400),
     ("passed_over", [[1, -1]]), ("marks", [[-1, {"total": 1}]])],
)  # fmt: skip
def test_a_record_with_a_wrong_part_is_named(runs, key, value):
    runs.start(first_step=1, last_step=2, end=0)
    (file,) = (runs.workdir / STARTS).iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    problems = []
    assert read_starts(runs.workdir, problems) == () and file.name in problems[0]
