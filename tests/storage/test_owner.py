"""A workdir has one owner; who it is, when it is dead, and what becomes of it then."""

import dataclasses
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time

import pytest

from btlm_jax import notices
from btlm_jax.storage import owner
from btlm_jax.storage.files import write_atomically
from btlm_jax.storage.owner import OWNER_FILE, read_owner, take


@pytest.fixture(autouse=True)
def counted():
    notices.begin(strict=())


def changed(workdir, **values):
    """Rewrite owner.json with other values."""
    found = dataclasses.asdict(read_owner(workdir)) | values
    write_atomically(workdir / OWNER_FILE, json.dumps(found))


def test_a_second_command_is_refused_and_told_who_owns_the_workdir(tmp_path):
    first = take(tmp_path, steal=False)
    with pytest.raises(FileExistsError, match=rf"belongs to process {os.getpid()} on .*--steal"):
        take(tmp_path, steal=False)
    first.release()
    assert first.beat() == "" and not list(tmp_path.iterdir())
    take(tmp_path, steal=False).release()
    assert notices.counts() == {}


def test_a_workdir_that_was_deleted_or_moved_ends_its_run_and_is_not_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.01)
    workdir, lost = tmp_path / "run", queue.Queue()
    workdir.mkdir()
    ownership = take(workdir, steal=False)
    assert ownership.beat() == ""
    shutil.copytree(workdir, tmp_path / "other")
    workdir.rename(tmp_path / "first")
    (tmp_path / "other").rename(workdir)  # with another number, as a mounted bucket may have it later
    assert ownership.beat() == ""
    workdir.rename(tmp_path / "moved")
    assert ownership.beat() == "was deleted or moved" and not workdir.exists()
    workdir.mkdir()  # as a save does that is under way
    ownership.keep(on_loss=lost.put)
    assert lost.get(timeout=60).startswith(f"{workdir} was deleted or moved: this run is ended")
    ownership.release()
    assert not list(workdir.iterdir())


def test_an_owner_whose_process_is_gone_is_replaced_at_once(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    take(tmp_path, steal=False)
    changed(tmp_path, pid=child.pid, began=owner._began(child.pid))
    with pytest.raises(FileExistsError, match=f"process {child.pid} on"):
        take(tmp_path, steal=False)
    changed(tmp_path, began="1")  # another process has that number now
    take(tmp_path, steal=False)
    changed(tmp_path, pid=child.pid, began=owner._began(child.pid))
    child.kill()
    while owner._began(child.pid):  # not waited for: it is there, and dead
        time.sleep(0.01)
    take(tmp_path, steal=False).release()
    child.communicate()
    assert notices.counts() == {"workdir-taken-over": 2}


def test_an_owner_on_another_machine_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(owner, "_LOOK_SECONDS", 0.02)
    take(tmp_path, steal=False)
    changed(tmp_path, machine="elsewhere", host="elsewhere")
    began = time.monotonic()
    take(tmp_path, steal=False)  # it is dead
    assert time.monotonic() - began > 0.5
    changed(tmp_path, machine="elsewhere", host="elsewhere")
    monkeypatch.setattr(owner, "DEAD_SECONDS", 60.0)
    refused = threading.Event()

    def live():
        beat = 0
        while not refused.wait(0.05):
            beat += 1
            changed(tmp_path, beat=beat)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(FileExistsError, match="on elsewhere"):
        take(tmp_path, steal=False)
    refused.set()
    thread.join()
    assert notices.counts() == {"workdir-watched": 2, "workdir-taken-over": 1}


def test_the_first_owner_learns_that_its_workdir_was_stolen(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.02)
    lost = threading.Event()
    first = take(tmp_path, steal=False)
    first.keep(on_loss=lambda line: lost.set())
    time.sleep(0.1)
    assert read_owner(tmp_path).beat > 0 and not lost.is_set()
    second = take(tmp_path, steal=True)
    assert lost.wait(10)
    first.release()
    assert read_owner(tmp_path) is not None  # it is the second one's
    second.release()


def test_of_two_that_begin_at_once_without_locks_one_is_refused(tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError("not supported")

    monkeypatch.setattr(owner.fcntl, "flock", no_lock)
    monkeypatch.setattr(owner, "_READ_BACK_SECONDS", 0.3)
    monkeypatch.setattr(owner, "_is_alive", lambda other: False)  # so that both write
    results = []

    def begin():
        try:
            results.append(take(tmp_path, steal=False))
        except FileExistsError:
            results.append(None)

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert [result is None for result in results].count(True) == 1


def test_a_damaged_file_has_no_owner(tmp_path):
    for text in ("", "[]", '{"token": 1}', '{"token": "a"}'):
        (tmp_path / OWNER_FILE).write_text(text)
        assert read_owner(tmp_path) is None
    take(tmp_path, steal=False).release()
