"""Processes of one run: who meets, what must be the same, when all stop, when one is gone. Without devices."""

import dataclasses
import json
import re
import socket
import threading
import time

import pytest
from support.tiny import tiny_config

from btlm_jax import stopping
from btlm_jax.cli import errors
from btlm_jax.parallel import peers
from btlm_jax.parallel.coordinator import Meeting, differences, listen, meet
from btlm_jax.parallel.peers import Peers, Place
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.stopping import ENDING, PEER_GONE, PREEMPTED, STEPPING, MissingProcessesError, ProcessesDifferError

NAMES = ["process 0 (a)", "process 1 (b)", "process 2 (c)"]


def met(facts_of_processes, *, counts=None, seconds=20.0, indices=None, refused=("",) * 3):
    """What each process is told at a real meeting point: names, or the error's text."""
    server = listen(0, seconds=0)
    port, count = server.getsockname()[1], len(facts_of_processes)
    told: dict[int, object] = {}

    def come(number):
        place = Place(
            address=f"localhost:{port}",
            count=(counts or [count] * count)[number],
            index=(indices or range(count))[number],
        )
        try:
            told[number] = peers._meet(
                "localhost",
                port,
                place,
                facts=facts_of_processes[number],
                log=print,
                refused=refused[number],
                seconds=peers.MEETING_SECONDS,
            )
        except (OSError, ProcessesDifferError) as error:
            told[number] = error

    threads = [threading.Thread(target=come, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    expected = count if counts is None else counts[0]
    may_go = meet(server, count=expected, seconds=seconds)
    for thread in threads:
        thread.join(30)
    server.close()
    return may_go, [told[number] for number in range(count)]


def test_processes_that_were_started_alike_meet():
    may_go, told = met([{"seed": "1"}] * 3)
    assert may_go and all(len(names) == 3 and names[2].startswith("process 2 (") for names in told)


def test_one_that_left_may_come_again(monkeypatch):
    monkeypatch.setattr("btlm_jax.parallel.coordinator._SAY_SECONDS", 0.05)
    server = listen(0, seconds=0)
    port, hello = server.getsockname()[1], {"count": 3, "host": "a", "pid": 7, "facts": {}}
    thread = threading.Thread(target=meet, args=(server,), kwargs={"count": 3, "seconds": 60.0})
    thread.start()

    def come(index):
        connection = socket.create_connection(("localhost", port))
        connection.sendall(json.dumps(hello | {"index": index}).encode() + b"\n")
        return connection

    with come(0) as first, first.makefile("rb") as lines:
        answers = map(json.loads, lines)
        leaving = come(1)
        assert {"missing": [2]} in answers
        leaving.close()
        assert {"missing": [1, 2]} in answers
        with come(1), come(2):
            assert any("go" in answer for answer in answers)
    thread.join(10)
    server.close()


def test_a_difference_names_the_process_the_key_and_both_values(monkeypatch):
    monkeypatch.setattr("btlm_jax.parallel.coordinator._REFUSING_SECONDS", 0.5)
    may_go, told = met([{"seed": "1", "jax": "0.10"}, {"seed": "2", "jax": "0.10"}])
    assert not may_go
    for error in told:
        assert isinstance(error, ProcessesDifferError)
        assert "seed: process 0 (" in str(error) and ") has 1, process 1 (" in str(error) and "jax" not in str(error)
    assert differences([("a", {"x": "1"}), ("b", {"x": "1", "y": "2"}), ("c", {})]) == [
        "y: a has nothing, b has 2",
        "x: a has 1, c has nothing",
    ]


def test_who_is_missing_is_named_to_those_that_came(monkeypatch):
    monkeypatch.setattr("btlm_jax.parallel.coordinator._REFUSING_SECONDS", 0.1)
    may_go, (error,) = met([{}], counts=[3], seconds=0.5)
    assert not may_go and "processes 1, 2 of 3 did not come to localhost:" in str(error)


def test_two_processes_of_one_number_are_refused():
    meeting = Meeting(2)
    hello = {"index": 1, "count": 2, "host": "a", "pid": 7, "facts": {}}
    assert meeting.welcome(hello) == "" and meeting.missing == [0]
    assert "--process_id=1: a, pid 7, and b, pid 8" in meeting.welcome(hello | {"host": "b", "pid": 8})
    assert "--num_processes=3, process 0 for 2" in meeting.welcome(hello | {"count": 3})
    assert "there is no process 2 of 2" in meeting.welcome(hello | {"index": 2})


@pytest.mark.parametrize("number", [0, 2])
def test_a_process_that_cannot_take_part_says_why_to_all(number):
    began = time.monotonic()
    may_go, told = met([{"seed": "1"}] * 3, refused=[f"no {i}" if i == number else "" for i in range(3)])
    assert not may_go and time.monotonic() - began < 10  # not as long as those that never come are waited for
    for error in told:
        assert isinstance(error, ProcessesDifferError)
        assert re.search(rf"process {number} \(\S+, pid \d+\) cannot take part: no {number}$", str(error))


def test_a_process_0_that_cannot_be_reached_is_an_error_that_says_so():
    with listen(0, seconds=0) as server:
        port = server.getsockname()[1]
    place = Place(address=f"localhost:{port}", count=2, index=1)
    said = rf"process 1 of 2 cannot reach process 0 at localhost:{port}.*refused"
    with pytest.raises(MissingProcessesError, match=said) as caught:
        peers._meet("localhost", port, place, facts={}, log=print, refused="", seconds=0.3)
    assert errors.report(caught.value, verb="train", arguments=()) == PEER_GONE


def test_a_port_has_one_owner():
    with listen(0, seconds=0) as server:
        with pytest.raises(OSError, match="cannot be listened at"):
            listen(server.getsockname()[1], seconds=0)


def test_what_is_compared_has_every_key_of_the_config_and_the_code():
    config = tiny_config()
    facts = peers.facts_of(dataclasses.asdict(config), flags={"resume_step": 3})
    sections = {field.name for field in dataclasses.fields(TrainConfig)}
    assert sections <= {name.partition(".")[0] for name in facts}
    assert facts["optimizer.peak_learning_rate"] == repr(config.optimizer.peak_learning_rate)
    assert facts["--resume_step"] == "3" and peers.code_fingerprint() in facts["btlm_jax"]


class Store:
    """The key-value store of all processes."""

    def __init__(self):
        self.rows = {}

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.rows[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.rows.items() if key.startswith(prefix)]


class FakeStop:
    def __init__(self, stage):
        self.stage, self.reason, self.ended = stage, "", []

    def heed(self, reason):
        self.reason = self.reason or reason

    def end_now(self, code, reason):
        self.ended.append((code, reason))

    def said(self):
        return "preempted"


def make_peers(count=2, stage=STEPPING):
    store, now = Store(), [0.0]
    group = []
    for index in range(count):
        place = Place(address="a:1", count=count, index=index)
        stop = FakeStop(stage)
        group.append(Peers(store, place, names=NAMES[:count], stop=stop, clock=lambda: now[0]))
    return group, store, now


def look(group, times=1):
    for number in range(times):
        for each in group:
            each.look(each._exchange(number))


def test_all_stop_after_the_first_step_that_none_has_passed():
    group, _, _ = make_peers(3)
    for index, steps in enumerate((7, 9, 8)):
        for step in range(1, steps + 1):
            assert not group[index].is_agreed(step)
    group[1]._stop.heed("SIGTERM")
    group[1]._set("btlm/stop/1", "SIGTERM")
    look(group, times=2)
    for each, next_step in zip(group, (8, 10, 9), strict=True):
        answers = [each.is_agreed(step) for step in range(next_step, 12)]
        assert answers == [False] * (10 - next_step) + [True, True]  # 11: the run went back from bad numbers at 10
    assert group[0]._stop.reason == "SIGTERM of process 1 (b)" and not group[0]._stop.ended


@pytest.mark.parametrize("stage", ["before the first step", ENDING])
def test_where_nothing_is_to_save_all_end_at_once(stage):
    group, _, _ = make_peers(2, stage)
    group[0]._stop.heed("SIGTERM")
    group[0]._set("btlm/stop/0", "SIGTERM")
    look(group, times=2)
    assert [each._stop.ended[0] for each in group] == [(PREEMPTED, "preempted")] * 2


@pytest.mark.parametrize("done", [0, PREEMPTED])
def test_a_silent_process_is_gone_and_one_that_has_left_is_not(done):
    group, store, now = make_peers(3)
    group[2].is_agreed(5)
    look(group)
    look(group[:2])  # the last word of process 2
    now[0] += peers.GONE_SECONDS - 1
    look(group[:2], times=2)
    assert group[0].gone() is None
    now[0] += 2
    look(group[:2], times=3)
    code, reason = group[0].gone()
    assert code == PEER_GONE and reason.startswith("process 2 (c) has not been heard of for 41 s, last after step 5")
    group[2].end(done, "done")
    look(group[:2])
    assert group[0].gone() is None
    now[0] += peers.ENDED_SECONDS + 1
    look(group[:2], times=2)
    assert group[0].gone() is None
    now[0] += peers.GONE_SECONDS + 1  # the store does not answer
    assert group[0].gone()[1].startswith("process 0 (a) has not answered for 41 s")
    group[0].suspended(100.0)
    assert group[0].gone() is None


@pytest.mark.parametrize(("code", "own", "seconds"), [(PEER_GONE, PEER_GONE, 0), (1, 1, 21), (130, PEER_GONE, 21)])
def test_an_end_with_an_error_ends_the_others(code, own, seconds):
    group, _, now = make_peers(2)
    group[1].end(code, "no space left\nmore")
    look(group)
    if seconds:
        assert group[0].gone() is None  # it may end by itself
    now[0] += seconds
    group[0]._heard = dict.fromkeys(group[0]._heard, now[0])
    assert group[0].gone() == (own, f"process 1 (b) ended with exit code {code}: no space left")
    assert group[1].gone() is None


def test_after_an_exchange_that_failed_less_silence_is_waited_for(monkeypatch):
    group, _, now = make_peers(2)
    look(group)
    group[0].look(group[0]._exchange(8))  # the last word of process 1
    now[0] += peers.SUSPECT_SECONDS + 1
    group[0].look(group[0]._exchange(9))
    assert group[0].gone() is None
    monkeypatch.setattr(peers.time, "sleep", lambda seconds: None)
    group[0].wait_for_verdict()
    assert group[0].gone()[1].startswith("process 1 (b) has not been heard of for 13 s")


def test_facts_that_differ_are_refused_in_every_process():
    group, store, _ = make_peers(2)
    store.key_value_set("btlm-facts/start/1", json.dumps({"devices": "4", "step": "7"}), allow_overwrite=True)
    with pytest.raises(ProcessesDifferError, match=r"devices: process 0 \(a\) has 8, process 1 \(b\) has 4$"):
        group[0].agree("start", {"devices": "8", "step": "7"})


def test_a_workdir_that_is_not_shared_is_found(tmp_path, monkeypatch):
    group, store, now = make_peers(2)
    monkeypatch.setattr(peers, "SEEN_SECONDS", 0.0)
    monkeypatch.setattr(store, "blocking_key_value_get", lambda key, timeout: store.rows[key], raising=False)
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    store.rows["btlm-facts/token"] = "made by process 0"
    store.rows["btlm-facts/seen/0"] = "True"
    with pytest.raises(ProcessesDifferError, match=r"what process 0 \(a\) wrote there is not seen by process 1 \(b\)"):
        group[1].check_workdir(tmp_path / "other")
    store.rows["btlm-facts/seen/1"] = "True"
    group[0].check_workdir(tmp_path / "own")
    assert not list((tmp_path / "own").iterdir())


def test_a_shell_of_slurm_takes_no_devices_from_processes_with_a_coordinator(monkeypatch):
    """JAX would give each the device of SLURM_LOCALID alone, as it shall with --distributed."""
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = peers.place_in_cluster()
    assert (found.address.partition(":")[0], found.count, found.index) == ("node3", 2, 1)
    methods = []

    class Begun(Exception):
        pass

    def begin(*_, cluster_detection_method, **__):
        methods.append(cluster_detection_method)
        raise Begun

    monkeypatch.setattr(peers, "_meet", lambda *_, **__: NAMES)
    monkeypatch.setattr(peers.jax.distributed, "initialize", begin)
    monkeypatch.setattr(peers.jax.config, "update", lambda *_: None)
    for place in (Place(address="localhost:1", count=2, index=1), found):
        with pytest.raises(Begun):
            peers.join(place, facts={}, stop=stopping.Stop(), log=print)
    assert methods == ["deactivate", None]
