"""Files appear whole or not at all, whoever writes beside; a machine's cache is where the user says."""

import errno
import json
import threading
from pathlib import Path

import pytest

from btlm_jax.cli import FAULT, main
from btlm_jax.storage import files
from btlm_jax.storage.files import (
    AtomicFile,
    cache_directory,
    delete_temporary_files,
    only_writer,
    scratch_directory,
    write_atomically,
)


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file.json"
    texts = [json.dumps([number] * 50_000) for number in range(6)]
    threads = [threading.Thread(target=lambda text=text: [write_atomically(path, text) for _ in range(5)])
               for text in texts]  # fmt: skip
    for thread in threads:
        thread.start()
    found = set()
    while any(thread.is_alive() for thread in threads):
        if path.is_file():
            found.add(path.read_text())
    for thread in threads:
        thread.join()
    assert found | {path.read_text()} <= set(texts)
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_failed_writer_leaves_the_old_contents_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(KeyError), AtomicFile(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_unfinished_files_of_killed_processes_are_deleted_and_no_others(tmp_path):
    for name in ("notes.tmp", ".hidden"):
        (tmp_path / name).touch()
    with pytest.raises(KeyError), AtomicFile(tmp_path / "file"):
        assert len(list(tmp_path.iterdir())) == 3
        delete_temporary_files(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.tmp"]


def test_one_writer_at_a_time_and_nothing_stays_of_the_lock(tmp_path):
    path = tmp_path / "model"
    with only_writer(path):
        with pytest.raises(FileExistsError, match="model is being made by another process"), only_writer(path):
            pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named_and_nothing_stays(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    (tmp_path / ".there.lock").touch()
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    for name in ("new", "there"):
        said = (
            f"{tmp_path}/.{name}.lock cannot be locked .Function not implemented.: .* or give a folder on another one"
        )
        with pytest.raises(OSError, match=said), only_writer(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".there.lock"]  # which may be locked on another machine


def test_a_scratch_directory_is_empty_and_goes_unless_it_is_renamed(tmp_path):
    target = tmp_path / "made" / "model"
    with pytest.raises(KeyError), scratch_directory(target) as scratch:
        (scratch / "half").touch()
        raise KeyError
    assert list(target.parent.iterdir()) == []
    scratch.mkdir()
    (scratch / "left by a killed process").touch()
    with scratch_directory(target) as scratch:
        assert list(scratch.iterdir()) == []
        (scratch / "whole").touch()
        scratch.rename(target)
    assert [path.name for path in target.iterdir()] == ["whole"] and list(target.parent.iterdir()) == [target]


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "btlm_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_directory() == Path("/home/somebody/.cache/btlm_jax")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(OSError, match="no home; set XDG_CACHE_HOME"):
        cache_directory()


@pytest.mark.parametrize("flags, expected", [([], "btlm_jax/plan"), (["--cache=other"], "other")])
def test_plan_keeps_what_it_compiled_there(monkeypatch, tmp_path, flags, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asked = []

    def plan_run(config, *, cache, **_):
        asked.append(cache.directory)
        raise ValueError("enough")

    monkeypatch.setattr("btlm_jax.plan.slice_plan.plan_run", plan_run)
    config = Path(__file__).parents[2] / "configs" / "local_cpu.py"
    assert main(["plan", f"--config={config}", "--topology=v5e:2x2", *flags]) == FAULT
    assert [directory.absolute() for directory in asked] == [tmp_path / expected]
