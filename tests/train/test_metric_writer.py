"""The metrics file to the bit and through kills, rates and the ETA against a clock that only moves when told."""

import io
import json
import math
import struct
import threading
import types

import numpy as np
import pytest
from support.fake_run import (
    CURRICULUM,
    EVALUATION,
    FLOPS_OF_PHASE,
    Clock,
    FakeRun,
    fake_config,
    record_steps,
    result,
)
from support.tensorboard import tensorboard_hyperparameters, tensorboard_points, tensorboard_scalars, tensorboard_texts

from btlm_jax import notices
from btlm_jax.recipe.config import config_types
from btlm_jax.train import METRICS_FILE, loop
from btlm_jax.train.flops import flops_per_token
from btlm_jax.train.metric_writer import append_setting_changed, read_metrics, remaining_seconds


def rows_of(workdir, kind):
    return [row for row in read_metrics(workdir / METRICS_FILE) if row["kind"] == kind]


def test_every_step_has_a_line_with_what_depends_on_time_last(tmp_path):
    run = FakeRun(tmp_path, log_every=100)
    with run.writer:
        for step in range(1, 10):
            run.step(step)
    rows = rows_of(tmp_path, "train")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert list(rows[5]) == [
        "kind", "step", "tokens", "seq_len", "learning_rate", "loss", "grad_norm",
        "tokens_per_second", "mfu", "seconds",
    ]  # fmt: skip
    # Step 6 is in the second phase: 192 tokens of 3 MFLOP in 2 s, of a peak of 1 GFLOP/s.
    assert rows[5] == {
        "kind": "train", "step": 6, "tokens": 6 * 192, "seq_len": 48, "learning_rate": 0.01 / 6, "loss": 4.5,
        "grad_norm": 0.5, "tokens_per_second": 96.0, "mfu": 0.288, "seconds": 2.0,
    }  # fmt: skip
    assert [row["seq_len"] for row in rows] == [16] * 4 + [48] * 5


def test_lines_are_on_disk_before_the_next_step(tmp_path):
    run = FakeRun(tmp_path)
    with run.writer:
        run.step(1)
        assert len((tmp_path / METRICS_FILE).read_bytes().splitlines()) == 1


@pytest.mark.parametrize("loss", [0.1 + 0.2, 1 / 3, 5e-324, struct.unpack("<f", b"\xcd\xcc\x8c\x40")[0], -0.0])
def test_floats_come_back_bit_equal(tmp_path, loss):
    run = FakeRun(tmp_path)
    with run.writer:
        run.step(1, loss=loss)
    (row,) = rows_of(tmp_path, "train")
    assert struct.pack("<d", row["loss"]) == struct.pack("<d", loss)


@pytest.mark.parametrize(("loss", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_numbers_that_are_not_finite_are_strings_in_strict_json(tmp_path, loss, text):
    run = FakeRun(tmp_path)
    with run.writer:
        run.step(1, loss=loss)
        run.writer.evaluation(1, result(loss))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(lines[0], parse_constant=refuse)["loss"] == text
    train, evaluation, _ = read_metrics(tmp_path / METRICS_FILE)
    assert not {("train/loss", 1), ("heldout/all", 1), ("heldout/code", 1)} & tensorboard_scalars(tmp_path)
    assert {("train/grad_norm", 1), ("heldout_bits_per_byte/code", 1)} <= tensorboard_scalars(tmp_path)
    for value in (train["loss"], evaluation["loss"], evaluation["sources"]["code"]["loss"]):
        assert repr(value) == repr(loss)


def test_resuming_drops_what_it_writes_again_and_a_half_written_line(tmp_path):
    run = FakeRun(tmp_path)
    with run.writer:
        for step in (1, 2, 3):
            run.step(step)
        run.writer.evaluation(3, result())
        run.step(4)
        run.writer.evaluation(4, result())
        run.writer.event(4, "seen")
        run.step(5)
    path = tmp_path / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + b'{"kind": "train", "step": 6, "los')
    resumed = FakeRun(tmp_path, first_step=4)
    with resumed.writer:
        # Steps 1 to 3 and the evaluation after them, untouched to the byte; then the event and where the time went.
        assert path.read_bytes() == b"".join([*lines[:4], lines[6], lines[8]])
        for step in range(4, 10):
            resumed.step(step)
    assert [row["step"] for row in rows_of(tmp_path, "train")] == list(range(1, 10))
    assert [row["step"] for row in rows_of(tmp_path, "eval")] == [3]
    assert [row["message"] for row in rows_of(tmp_path, "event")] == ["seen"]
    assert [row["step"] for row in rows_of(tmp_path, "goodput")] == [5, 9]
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_resumed_lines_are_the_uninterrupted_ones(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir, sessions in ((whole, [(1, 10)]), (parts, [(1, 6), (4, 10)])):
        workdir.mkdir()
        for first, end in sessions:
            run = FakeRun(workdir, first_step=first)
            with run.writer:
                for step in range(first, end):
                    run.step(step, loss=10 / step)
    assert rows_of(whole, "train") == rows_of(parts, "train")


def record_start(workdir, first, last, *, number):
    """What a start with given weights records, which has another setting from step 4 on and no targets in step 5."""
    run = FakeRun(workdir, first_step=first)
    with run.writer:
        if first == 1:
            run.writer.event(0, "begins with the weights of a run")
            run.writer.evaluation(0, result())
        if first == 4:
            run.writer.setting_changed(3, key="seed", old=1, new=2)
        for step in range(first, last + 1):
            run.spend("step", 2.0)
            values = {"loss": np.float32(10 / step), "weight": np.float32(step != 5), "grad_norm": np.float32(1)}
            loop._record(run.writer, step, 0.01, values | {"skips": np.int32(0)})
        if last == CURRICULUM.num_steps:
            run.writer.evaluation(last, result())
            run.writer.sample(last, prompt="a", continuation="b")
    (events,) = (workdir / "tensorboard").glob("events*")  # a later start of the same second would write over it
    events.rename(events.with_name(f"{number}.events"))


@pytest.mark.parametrize("starts", [[(1, 2), (1, 5), (4, 7), (4, 9), (4, 9)], [(1, 3), (4, 9), (10, 9)]])
def test_starts_that_were_killed_or_go_back_leave_what_an_uninterrupted_run_does(tmp_path, starts):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir, its_starts in ((whole, [(1, 3), (4, 9)]), (parts, starts)):
        workdir.mkdir()
        for number, (first, last) in enumerate(its_starts):
            record_start(workdir, first, last, number=number)
    kept = [
        [row for row in read_metrics(workdir / METRICS_FILE) if row["kind"] != "goodput"] for workdir in (whole, parts)
    ]
    assert repr(kept[0]) == repr(kept[1]) and len(kept[0]) == 1 + 1 + 1 + 9 + 1 + 1 + 1
    assert tensorboard_points(whole) == tensorboard_points(parts) and ("heldout/all", 0) in tensorboard_points(whole)
    notices.begin(strict=())


def test_a_finished_run_says_each_other_value_of_a_setting_once(tmp_path):
    path = tmp_path / METRICS_FILE
    for new in (2, 2, 3, 2, 2):
        append_setting_changed(path, 9, key="seed", old=1, new=new)
    assert [row["new"] for row in rows_of(tmp_path, "event")] == [2, 3, 2]


def test_an_end_that_is_repeated_is_written_once(tmp_path):
    last = CURRICULUM.num_steps
    run = FakeRun(tmp_path)
    with run.writer:
        record_steps(run, 1, last)
    for _ in range(2):  # the first one is killed after its sample
        ended = FakeRun(tmp_path, first_step=last + 1)
        with ended.writer:
            ended.writer.evaluation(last, result(2.5))
            ended.writer.sample(last, prompt="a", continuation="b")
    rows = read_metrics(tmp_path / METRICS_FILE)
    ends = [(row["kind"], row["step"]) for row in rows if row["kind"] in ("eval", "sample")]
    assert ends == [("eval", 3), ("eval", 6), ("eval", last), ("sample", last)]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, last + 1))


def test_an_evaluation_that_the_next_start_makes_is_written_once(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir, starts in ((whole, [(1, 9)]), (parts, [(1, 6), (7, 6), (7, 9)])):  # the second is killed after it
        workdir.mkdir()
        for number, (first, last) in enumerate(starts):
            run = FakeRun(workdir, first_step=first, evaluates_before=True)
            with run.writer:
                if first == 7:
                    run.writer.evaluation(6, result(1 / 6))
                for step in range(first, last + 1):
                    run.step(step, loss=10 / step)
                    if step % 3 == 0 and (workdir, step) != (parts, 6):
                        run.writer.evaluation(step, result(1 / step))
            (events,) = (workdir / "tensorboard").glob("events*")
            events.rename(events.with_name(f"{number}.events"))
    for kind, steps in (("train", list(range(1, 10))), ("eval", [3, 6, 9])):
        assert rows_of(parts, kind) == rows_of(whole, kind)
        assert [row["step"] for row in rows_of(parts, kind)] == steps
    assert tensorboard_points(parts) == tensorboard_points(whole)


def test_a_resume_with_nothing_to_drop_leaves_the_file_alone(tmp_path):
    run = FakeRun(tmp_path)
    with run.writer:
        run.step(1)
    before = (tmp_path / METRICS_FILE).stat().st_ino
    with FakeRun(tmp_path, first_step=2).writer:
        assert (tmp_path / METRICS_FILE).stat().st_ino == before


GOOD_ROW = {"kind": "train", "step": 1, "tokens": 192, "loss": 4.5, "learning_rate": 0.1}
GOOD_EVAL = {"kind": "eval", "step": 1, "tokens": 192, "loss": 4.5, "sources": {"code": {"loss": 1.0}}}
DAMAGED = (
    b'{"kind": "tr',
    b"[1]",
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"kind": "train", "step": 1, "tokens": 192, "loss": 4.5}',  # no learning rate
    json.dumps({**GOOD_ROW, "step": "1"}).encode(),
    json.dumps({**GOOD_ROW, "step": True}).encode(),
    json.dumps({"kind": "event"}).encode(),
    json.dumps({"step": 3}).encode(),
    json.dumps({**GOOD_ROW, "loss": "low"}).encode(),
    json.dumps({**GOOD_ROW, "tokens": 10**400}).encode(),
    json.dumps({**GOOD_EVAL, "sources": {"code": 3}}).encode(),
    json.dumps({**GOOD_EVAL, "sources": {"code": {}}}).encode(),
    json.dumps({**GOOD_EVAL, "sources": [1]}).encode(),
)


@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda line: line[:40].decode("latin-1"))
def test_a_damaged_line_is_named_and_a_half_written_last_one_ignored(tmp_path, damaged, capsys):
    path = tmp_path / METRICS_FILE
    good = [json.dumps(row).encode() for row in (GOOD_ROW, GOOD_EVAL, {"kind": "event", "step": 1, "message": "m"})]
    path.write_bytes(b"\n".join([*good, damaged]))
    assert read_metrics(path) == [json.loads(line) for line in good]
    path.write_bytes(b"\n".join([good[0], damaged, *good[1:], b""]))
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    notices.begin(strict=())
    with FakeRun(tmp_path, first_step=2).writer:
        assert path.read_bytes().splitlines() == good
    assert notices.counts() == {"metrics-line-dropped": 1} and "line 2" in capsys.readouterr().err


def test_pauses_do_not_count(tmp_path):
    run = FakeRun(tmp_path)
    with run.writer:
        run.step(1)
        run.spend("evaluation", 500)
        run.spend("checkpoint", 700)
        run.clock.now += 900
        run.spend("data wait", 1)
        run.step(2, seconds=3)
    assert rows_of(tmp_path, "train")[1]["seconds"] == 4
    assert rows_of(tmp_path, "train")[1]["tokens_per_second"] == 48


@pytest.mark.parametrize(
    ("step", "flop", "evaluated"),
    [
        (0, 192 * (4 * 1e6 + 5 * 3e6), [3, 4, 6]),  # evaluations after every 3 steps and at the phase's end, 4
        (3, 192 * (1 * 1e6 + 5 * 3e6), [4, 6]),
        (4, 192 * 5 * 3e6, [6]),
        (7, 192 * 2 * 3e6, []),
        (9, 0, []),
    ],
)
def test_time_left_counts_each_phase_at_its_own_cost_and_the_evaluations(step, flop, evaluated):
    left = remaining_seconds(
        CURRICULUM,
        flops_of_phase=FLOPS_OF_PHASE,
        evaluation=EVALUATION,
        step=step,
        flops_rate=4e6,
        evaluation_rate=2e6,
    )
    assert left == pytest.approx(flop / 4e6 + (len(evaluated) * 4e6 + 90e6) / 2e6)


@pytest.mark.parametrize(("average", "times"), [("none", 1), ("last", 2)])
def test_the_average_is_evaluated_at_the_end_too_and_counted(average, times):
    source = types.SimpleNamespace(first_block=0, num_blocks=10)
    split = types.SimpleNamespace(sources={"code": source}, num_blocks=10)
    manifest = types.SimpleNamespace(block_len=48, splits={"heldout": split})
    config = fake_config(optimizer__average=average, optimizer__average_share=0.5, evaluation__batch_size=4)
    run = types.SimpleNamespace(
        config=config, token_store=types.SimpleNamespace(manifest=manifest), most_heldout_tokens=None
    )
    flops = loop._evaluation_work(run).final_flops
    assert flops == pytest.approx(times * 12 * 48 * flops_per_token(config.model, seq_len=48) / 3)


def test_the_pace_of_evaluations_is_theirs_once_one_was_made(tmp_path, capsys):
    run = FakeRun(tmp_path)
    with run.writer:
        for step in (1, 2, 3, 4, 5, 6, 7, 8):
            run.step(step, seconds=2)
            if step in (3, 4, 6):
                run.spend("evaluation", 5)
                run.writer.evaluation(step, result())
        capsys.readouterr()
        run.step(9, seconds=2)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step 9/9"))
    # Three evaluations did 12 MFLOP in 15 s, so the last one's 90 MFLOP take 112.5 s.
    assert line.endswith("ETA 0:01:52 + sample")


def test_console_lines_show_a_smoothed_pace(tmp_path, capsys):
    run = FakeRun(tmp_path)
    with run.writer:
        run.step(1, seconds=1000)  # reads the first batch: not part of the pace
        run.step(2, seconds=1)
        run.step(3, seconds=2)
        run.step(4, seconds=3)
    lines = capsys.readouterr().out.splitlines()
    # Steps 2 to 4 did 576 tokens of 1 MFLOP in 6 s: 96 tokens and 96 MFLOP a second; 2,880 and 94 to evaluate are left.
    pace = "96 tok/s | MFU 9.6% | ETA 0:00:31 + sample"
    assert lines[1] == f"step 4/9 | len 16 | tokens 768 | loss 4.5000 | lr 0.0025 | gnorm 0.5 | {pace}"
    assert lines[2].startswith("Time 0:16:46: step 100.0%")


@pytest.mark.parametrize(("log_every", "shown"), [(3, [1, 4, 9]), (1, [1, 4, 9])])
def test_console_shows_first_last_phase_ends_and_no_flood(tmp_path, capsys, log_every, shown):
    run = FakeRun(tmp_path, log_every=log_every)
    with run.writer:
        for step in range(1, 10):
            run.step(step)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == shown


def test_console_shows_due_steps_once_two_seconds_have_passed(tmp_path, capsys, monkeypatch):
    wall = Clock()
    monkeypatch.setattr("btlm_jax.display.progress.time", types.SimpleNamespace(monotonic=wall))
    run = FakeRun(tmp_path, log_every=2)
    with run.writer:
        for step in range(1, 10):
            wall.now += 0.6
            run.step(step)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    # Of steps 2, 6 and 8, step 2 is 0.6 s after step 1, step 6 is 1.2 s and step 8 2.4 s after step 4.
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [1, 4, 8, 9]


def test_a_terminal_gets_a_bar_and_messages_on_lines_of_their_own(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    run = FakeRun(tmp_path, first_step=3)
    with run.writer:
        run.step(3)
        run.writer.event(3, "noted")
        run.step(4)
    shown = terminal.getvalue()
    assert "step 3/9" in shown and "loss 4.5000" in shown and "ETA" in shown
    messages = [line.split("\r")[-1] for line in shown.split("\n")]
    assert "step 3/9 | noted" in messages
    assert any(message.startswith("Time") for message in messages)


def test_a_changed_setting_is_an_event(tmp_path):
    run = FakeRun(tmp_path)
    with run.writer:
        run.writer.setting_changed(6, key="curriculum.num_tokens", old=(8, 4), new=(8, 16))
    (row,) = rows_of(tmp_path, "event")
    message = "curriculum.num_tokens was (8, 4), is now (8, 16)"
    setting = {"setting": "curriculum.num_tokens", "old": [8, 4], "new": [8, 16]}
    assert row == {"kind": "event", "step": 6, "message": message, **setting}


def test_tensorboard_has_due_steps_and_heldout_sources(tmp_path):
    run = FakeRun(tmp_path, log_every=3)
    with run.writer:
        for step in range(1, 10):
            run.step(step)
        run.writer.evaluation(9, result())
    scalars = tensorboard_scalars(tmp_path)
    assert {step for tag, step in scalars if tag == "train/loss"} == {1, 3, 4, 6, 9}
    assert {("heldout/code", 9), ("heldout/prose", 9), ("heldout/all", 9), ("train/mfu", 4)} <= scalars


def test_an_evaluation_is_one_line(tmp_path, capsys):
    run = FakeRun(tmp_path)
    with run.writer:
        run.step(1)
        capsys.readouterr()
        run.writer.evaluation(1, result())
        assert capsys.readouterr().out == (
            "step 1/9 | held-out loss 3.2500 | code 3.2500 (1.5000 bits/byte) | prose 6.5000 (0.7500 bits/byte)\n"
        )
    (row,) = rows_of(tmp_path, "eval")
    assert row == {"kind": "eval", "step": 1, "tokens": 192, **result().to_json()}


def test_goodput_is_written_once_even_when_the_run_fails(tmp_path):
    run = FakeRun(tmp_path)
    with pytest.raises(OSError), run.writer:
        run.step(1)
        run.spend("checkpoint", 7)
        raise OSError
    run.writer.finish()
    (row,) = rows_of(tmp_path, "goodput")
    assert row == {"kind": "goodput", "step": 1, "seconds": {"step": 2, "checkpoint": 7, "total": 9}}


def test_a_second_process_writes_nothing(tmp_path, capsys):
    run = FakeRun(tmp_path, is_writer=False)
    with run.writer:
        run.step(1)
        run.writer.evaluation(1, result())
        run.writer.event(1, "unheard")
        run.writer.setting_changed(1, key="seed", old=1, new=2)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_step_without_targets_is_no_bad_number(tmp_path):
    """It is a line with the loss nan, an event, and a notice; with targets it is an update that was not made."""
    notices.begin(strict=())
    run = FakeRun(tmp_path)
    values = {"loss": np.float32(0), "weight": np.float32(0), "grad_norm": np.float32(0)}
    values["skips"] = np.int32(0)
    with run.writer:
        run.step(1)
        run.spend("step", 2.0)
        assert loop._record(run.writer, 2, 0.005, values) == 0
        bad = {"weight": np.float32(5), "loss": np.float32(np.nan), "skips": np.int32(4)}
        assert loop._record(run.writer, 3, 0.005, {**values, **bad}) == 4
    _, empty, bad = rows_of(tmp_path, "train")
    assert (empty["step"], empty["weight"]) == (2, 0) and math.isnan(empty["loss"]) and math.isnan(bad["loss"])
    event, skipped = rows_of(tmp_path, "event")
    assert event["step"] == 2 and "no update: the batch has no targets" in event["message"]
    assert skipped["step"] == 3 and skipped["message"] == "no update: loss=nan at learning rate 0.005"
    assert bad["skips"] == 4 and "skips" not in empty
    assert notices.counts() == {"no-targets": 1, "step-skipped": 1}
    notices.begin(strict=())


def test_tensorboard_shows_the_config_the_hyperparameters_and_the_sample(tmp_path):
    run = FakeRun(tmp_path, first_step=4)
    config = fake_config()
    with run.writer:
        run.writer.config(config)
        record_steps(run, 4, 9)
        run.writer.sample(9, prompt="Return", continuation=" the number")
    texts = tensorboard_texts(tmp_path)
    assert json.loads(texts["config/text_summary", 4]) == json.loads(config.to_json())
    assert texts["sample/text_summary", 9].strip() == "Return\u2502 the number"
    settings = tensorboard_hyperparameters(tmp_path)
    assert settings["model.d_model"] == config.model.d_model and settings["model.dtype"] == "float32"
    assert settings["curriculum.seq_len"] == "(16, 48)" and settings["data.document_mask"] is False
    assert settings.keys() == config_types().keys()
    (row,) = rows_of(tmp_path, "sample")
    assert row == {"kind": "sample", "step": 9, "prompt": "Return", "continuation": " the number"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_files_that_cannot_be_written_neither_end_nor_block_a_run(tmp_path, monkeypatch, capsys):
    """It writes, and takes long until it fails, while the run has more to write than a queue of tensorboardX holds."""
    recorded = threading.Event()

    def fail(*arguments):
        recorded.wait(60)
        raise OSError(28, "No space left on device")

    notices.begin(strict=())
    run = FakeRun(tmp_path)
    with run.writer:
        record_steps(run, 1, 2)
        monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", fail)
        monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.flush", fail)
        values = {f"x{number}": 1.0 for number in range(100)}
        burst = threading.Thread(target=run.writer._tensorboard.numbers, args=(2, values), daemon=True)
        burst.start()
        burst.join(30)
        assert not burst.is_alive()
        recorded.set()
        run.writer._tensorboard._files.event_writer._worker.join(60)
        record_steps(run, 3, 9)
    assert notices.counts() == {"tracker-stopped": 1}
    assert "TensorBoard's files are not written on" in capsys.readouterr().err
    assert [row["step"] for row in rows_of(tmp_path, "train")] == list(range(1, 10))
    notices.begin(strict=())
