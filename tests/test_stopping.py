"""When a run stops, and what happens then; the ends of the process are recorded instead of made."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from btlm_jax import stopping
from btlm_jax.cli import errors
from btlm_jax.stopping import BEGINNING, ENDING, PEER_GONE, PREEMPTED, Stop, Stopped
from btlm_jax.storage.files import parse_json_object


class Ended(BaseException):
    pass


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def stop(clock, monkeypatch, tmp_path):
    ended = []

    def end(code):
        ended.append(code)
        raise Ended

    monkeypatch.setattr(stopping.os, "_exit", end)
    made = Stop(clock=lambda: clock[0])
    made.workdir = tmp_path
    made.ended = ended
    return made


def wait(stop, clock, seconds):
    """Let time pass as the watching thread sees it."""
    for _ in range(int(2 * seconds)):
        clock[0] += 0.5
        stop.tick()


def test_before_the_first_step_and_after_the_last_save_a_stop_is_at_once(stop, clock, capfd):
    stop.request("SIGTERM")
    with pytest.raises(Stopped):
        stop.begin_steps()
    assert stop.stage == BEGINNING and "nothing to save before the first step" in stop.said()
    wait(stop, clock, stopping.GRACE_SECONDS)
    with pytest.raises(Ended):  # the main thread has not ended by itself
        wait(stop, clock, 1)
    assert stop.ended == [PREEMPTED] and "preempted (SIGTERM)" in capfd.readouterr().err


def test_a_second_signal_does_not_break_off_what_the_first_one_does(stop):
    with pytest.raises(Stopped):
        stop._on_signal(signal.SIGTERM, None)
    try:
        stop._on_signal(signal.SIGTERM, None)
    except Stopped:
        pytest.fail("it is raised again")


# Prints to its terminal after that is gone, as a save does.
STEPS = """
import fcntl, pathlib, signal, sys, termios, time
from btlm_jax import stopping
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[2] == "nohup" else signal.SIG_DFL)
stopping.begin()
stop = stopping.current()
stop.begin_steps()
print("ready", flush=True)
last = time.monotonic() + (0.3 if sys.argv[2] == "nohup" else 20)
while not stop.is_agreed(1) and time.monotonic() < last:
    time.sleep(0.02)
if sys.argv[2] != "nohup":
    print("preempted", flush=True)
pathlib.Path(sys.argv[1]).write_text(stop.reason or "goes on")
"""


@pytest.mark.parametrize("how, reason", [("", "SIGHUP"), ("nohup", "goes on")])
def test_a_run_whose_terminal_is_closed_saves_but_not_below_nohup(tmp_path, how, reason):
    terminal, inside = pty.openpty()
    command = [sys.executable, "-c", STEPS, str(tmp_path / "saved"), how]
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    said = b""
    while not said.endswith(b"\n"):  # the whole line: its end is written by itself
        said += os.read(terminal, 100)
    os.close(terminal)
    assert process.wait(30) == 0 and (tmp_path / "saved").read_text() == reason


def test_between_steps_the_loop_is_asked_and_the_first_reason_counts(stop, clock):
    stop.begin_steps()
    assert not stop.is_agreed(1)
    stop.request("SIGTERM")
    clock[0] += 3
    stop.request("SIGINT")
    stop.heed("SIGTERM of process 1")
    assert stop.is_agreed(2) and stop.reason == "SIGTERM" and stop.seconds_since == 3
    wait(stop, clock, 20)  # the loop saves
    with pytest.raises(Stopped):
        stop.begin_end()
    assert stop.stage == ENDING and "all steps are saved" in stop.said()
    stop.finish()
    wait(stop, clock, 20)
    assert stop.ended == []


def test_a_run_that_stands_still_is_ended_with_every_stack(stop, clock, capfd):
    stop.begin_steps()
    for step in range(1, 8):
        wait(stop, clock, 20)
        assert not stop.is_agreed(step)
    wait(stop, clock, 590)  # 30 times the median step
    with pytest.raises(Ended):
        wait(stop, clock, 20)
    assert stop.ended == [PEER_GONE]
    stacks = (stop.workdir / "stacks" / "process-0.txt").read_text()
    assert "no step for 600 s" in stacks and "test_a_run_that_stands_still" in stacks
    assert str(stop.workdir) in capfd.readouterr().err


def test_evaluations_saves_and_first_steps_may_take_long(stop, clock):
    stop.begin_steps()
    for step in range(1, 4):  # the first ones compile, too
        wait(stop, clock, 1700)
        stop.is_agreed(step)
    for step in range(4, 60):
        clock[0] += 1
        stop.is_agreed(step)
    stop.allow_long()
    wait(stop, clock, 1700)
    stop.begin_end()
    wait(stop, clock, 4000)
    stop.begin_run(stop.workdir)  # the next one of the process compiles again
    stop.begin_steps()
    for step in range(1, 3):
        wait(stop, clock, 1700)
        stop.is_agreed(step)
    assert stop.ended == []
    stop.request("SIGTERM")
    with pytest.raises(Stopped):
        stop.begin_run(stop.workdir)


def test_a_process_that_was_suspended_is_not_late(stop, clock):
    stop.begin_steps()
    for step in range(1, 8):
        clock[0] += 1
        stop.is_agreed(step)
    stop.tick()
    clock[0] += 5000  # as after Ctrl-Z and fg
    stop.tick()
    wait(stop, clock, 200)
    assert stop.ended == []


def test_what_must_be_done_at_an_end_at_once_is_done(stop):
    released = []
    stop.at_exit(lambda code, reason: released.append((code, reason)))
    with pytest.raises(Ended):
        stop.end_now(1, "it was taken over")
    assert released == [(1, "it was taken over")] and stop.ended == [1]


def test_an_error_that_may_come_from_a_process_that_is_gone_waits_for_the_verdict(stop, monkeypatch):
    class Waited(Exception):
        pass

    class Peers:
        def wait_for_verdict(self):
            raise Waited

    def check_ours():
        parse_json_object(b"[]", name="x")

    monkeypatch.setattr(stopping, "current", lambda: stop)
    errors.wait_if_peer_is_gone(RuntimeError("alone"))
    stop._peers = Peers()
    for error in (RuntimeError("UNKNOWN"), OSError("orbax"), ValueError("UNKNOWN: Gloo AllGather failed")):
        with pytest.raises(Waited):
            errors.wait_if_peer_is_gone(error)
    with pytest.raises(ValueError) as caught:
        check_ours()
    full = OSError("a checkpoint could not be written to runs/a: No space left on device; mend the disk")
    for error in (caught.value, stopping.AgreedError("in all", reason="quota"), full):
        errors.wait_if_peer_is_gone(error)

    Peers.wait_for_verdict, Peers.index, Peers.end = lambda self: None, 0, lambda self, code, reason: None
    errors.wait_if_peer_is_gone(RuntimeError("another"))  # all are there: it is an error of this process
    with pytest.raises(Ended):
        errors.wait_if_peer_is_gone(RuntimeError("UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED"))
    assert stop.ended == [PEER_GONE]
