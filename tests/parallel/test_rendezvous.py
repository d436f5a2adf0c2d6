"""Processes that wait for each other while they save: all pass, or all hear that one has failed. Without devices."""

import threading

import pytest

from btlm_jax.parallel.rendezvous import OTHERS_FAILED, Rendezvous, said_of
from btlm_jax.stopping import OthersFailedError


class Store:
    """The key-value store of all processes, as JAX's client has it."""

    def __init__(self):
        self.rows = {}

    def key_value_set(self, key, value):
        assert key not in self.rows
        self.rows[key] = value

    def key_value_delete(self, key):
        del self.rows[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in list(self.rows.items()) if key.startswith(prefix)]


def pass_through(keys_of_processes, *, timeout_ms=20_000):
    """Have each process come for its keys in a thread; return what each has passed, or how it ended, and the store."""
    store, count = Store(), len(keys_of_processes)
    passed = [[] for _ in range(count)]

    def run(index):
        wait = Rendezvous(store, index=index, count=count, number=3)
        for key in keys_of_processes[index]:
            try:
                wait(key=key, timeout_ms=timeout_ms)
                passed[index].append(key)
            except (OthersFailedError, TimeoutError) as error:
                passed[index].append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return passed, store


def test_all_pass_for_the_same_thing_and_little_is_kept():
    keys = [f"{what} {number % 2}" for number in range(6) for what in ("written", "committed")]  # keys come again
    passed, store = pass_through([keys] * 3)
    assert passed == [keys] * 3 and len(store.rows) == 2 * 3


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_has_failed_lets_nobody_wait(failing):
    keys = [["begin", "written", "committed", "end"], ["begin", "written", "committed", "end"]]
    keys[failing] = ["begin", "end"]  # its part could not be written
    passed, _ = pass_through(keys)
    for found in passed:
        assert found[0] == "begin" and all(isinstance(error, OthersFailedError) for error in found[1:])
    assert len(passed[1 - failing]) == 4


def test_one_that_does_not_come_is_named():
    passed, _ = pass_through([["written"], [], ["written"]], timeout_ms=50)
    assert str(passed[0][0]) == "process 1 did not come to written in 0 s" and isinstance(passed[2][0], TimeoutError)


def test_what_is_said_names_the_first_process_that_says_it():
    assert said_of(["", "", ""]) == ""
    assert said_of([OTHERS_FAILED, "quota"]) == "process 1: quota"
    assert said_of(["", OTHERS_FAILED]) == f"process 1: {OTHERS_FAILED}"
    assert said_of(["", "no space left", "no space left", "quota"]) == "process 1: no space left; process 3: quota"
