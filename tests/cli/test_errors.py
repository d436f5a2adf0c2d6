"""The end of a command that fails: what the user can mend in one line; a fault of ours with its traceback in a file."""

import importlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.tiny import REPOSITORY

from btlm_jax import cli, notices
from btlm_jax.cli import DONE, ERROR, FAULT, INTERRUPTED, USAGE, errors, main, parse
from btlm_jax.stopping import PREEMPTED, Stopped
from btlm_jax.storage.files import parse_json


class PanicException(BaseException):  # as what libraries in Rust raise, which is no Exception
    pass


def panic():
    raise PanicException("range end index 4 out of range for slice of length 3")


def raising(error: BaseException):
    def verb(arguments):
        flags = parse.Flags("")
        flags.parse(arguments)
        raise error

    return verb


def run(monkeypatch, verb, *arguments: str) -> int:
    monkeypatch.setitem(cli.VERBS, "plan", verb)
    return main(["plan", *arguments])


FULL_NAMED = OSError(28, "/full/named")
FULL_NAMED._btlm_is_named = True  # as if raised by our own code


def test_what_our_code_names_is_an_error(capsys):
    assert main(["corpus", "verify", "--store=/nowhere"]) == ERROR
    assert re.fullmatch(r"btlm corpus: error: [^\n]*/nowhere[^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "fault",
    [
        lambda: int("three"),
        lambda: np.zeros(6).reshape(4, 2),
        lambda: {}["key"],
        lambda: [].pop(),
        lambda: None.name,
        lambda: panic(),
    ],
)
def test_what_nobody_named_is_a_fault_with_a_traceback_in_a_file(monkeypatch, tmp_path, capsys, fault):
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    assert run(monkeypatch, lambda arguments: fault()) == FAULT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "this is a fault of btlm" in said and "Traceback" not in said
    file = Path(re.search(r"traceback in (\S+)\)", said)[1])
    assert file.parent == tmp_path and "test_errors.py" in file.read_text() and "jax " in file.read_text()


def test_debug_prints_the_traceback(monkeypatch, capsys):
    assert run(monkeypatch, raising(KeyError("x")), "--debug") == FAULT
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore"), "allocating 9 bytes; make what"),
        (OSError(28, "No space left on device", "/full/file"), "device: '/full/file'; free some space and"),
        (FULL_NAMED, "/full/named; free some space and"),
    ],
)
def test_an_exhausted_machine_is_an_error(monkeypatch, capsys, error, said):
    assert run(monkeypatch, raising(error)) == ERROR
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_fault_is_known_by_who_raised_it():
    def kind(function, *arguments) -> bool:
        try:
            function(*arguments)
        except Exception as error:
            return errors.is_named(error)
        raise AssertionError("nothing was raised")

    assert kind(parse.find_config, "nowhere") is False  # a UsageError has its own door
    assert kind(notices.report, "no such name", "") is False
    from btlm_jax.storage.location import list_sizes

    assert kind(list_sizes, "nonsense://x/y", ["a"])


def test_an_error_of_a_worker_process_is_told_as_what_it_is(monkeypatch, capsys):
    for fault, code in ((lambda: parse_json("[", name="x"), ERROR), (lambda: int("three"), FAULT)):
        try:
            fault()
        except ValueError as error:
            notices.note_whether_named(error)
            sent = pickle.loads(pickle.dumps(error))
        assert run(monkeypatch, raising(sent)) == code
    capsys.readouterr()


def test_a_missing_package_is_named(monkeypatch, capsys):
    assert run(monkeypatch, lambda arguments: importlib.import_module("no_such_package")) == ERROR
    assert "the package no_such_package is missing here" in capsys.readouterr().err


def test_a_broken_pipe_to_anything_but_the_reader_is_an_error(monkeypatch, capsys):
    assert run(monkeypatch, raising(BrokenPipeError(32, "Broken pipe"))) == ERROR
    assert "Broken pipe" in capsys.readouterr().err


PRINT = r"""
import sys
from btlm_jax import cli
cli.VERBS["plan"] = lambda arguments: print("a\u2502b \udcff") or 0
sys.argv = ["btlm", "plan"]
cli.entry()
"""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"a\\u2502b \\udcff\n"), ("latin-1", b"a\\u2502b \\udcff\n"), ("utf-8", b"a\xe2\x94\x82b \\udcff\n")],
)
def test_output_that_is_not_utf8_shows_what_it_lacks(encoding, shown):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINT], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (DONE, shown, b"")


def notify(arguments):
    flags = parse.Flags("")
    flags.parse(arguments)
    for number in range(7):
        notices.report("read-again", f"thing {number}")
    notices.report("kernels-ignored", "these", count=4)
    return DONE


def test_notices_are_printed_and_counted(monkeypatch, capsys):
    assert run(monkeypatch, notify) == DONE
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "note: thing 0 (read-again)" and lines[4].startswith("note: thing 4 (read-again; further")
    assert lines[5:] == ["note: these (kernels-ignored)", "notes: 4 kernels-ignored, 7 read-again"]


def test_every_changed_setting_has_a_line(monkeypatch, capsys):
    def change(arguments):
        for number in range(9):
            notices.report("setting-changed", f"key {number}")
        return DONE

    assert run(monkeypatch, change) == DONE
    lines = [f"note: key {number} (setting-changed)" for number in range(9)]
    assert capsys.readouterr().err.splitlines() == [*lines, "notes: 9 setting-changed"]


@pytest.mark.parametrize("strict", ["--strict", "--strict=read-again", "--strict=kernels-not-compiled,read-again"])
def test_strict_makes_notices_errors(monkeypatch, capsys, strict):
    assert run(monkeypatch, notify, strict) == ERROR
    assert "thing 0 (read-again, an error because of --strict)" in capsys.readouterr().err


def test_strict_of_other_names_lets_notices_pass(monkeypatch, capsys):
    assert run(monkeypatch, notify, "--strict=kernels-not-compiled") == DONE
    assert run(monkeypatch, notify, "--strict=read-agan") == USAGE
    assert "did you mean read-again?" in capsys.readouterr().err


def test_every_notice_is_known_and_used():
    source = "\n".join(path.read_text() for path in (REPOSITORY / "btlm_jax").rglob("*.py"))
    used = set(re.findall(r'notices\.report\(\s*"([^"]+)"', source))
    assert used == notices.NAMES.keys()
    assert not re.search(r"\blogging\.(warning|info|error)\(|\bwarnings\.warn\(", source)


WAIT = """
import sys, weakref
from btlm_jax import cli

class Thing: pass

def wait(arguments):
    if arguments:  # where Python drops what is raised
        thing = Thing()
        keep = weakref.ref(thing, lambda _: print("ready", flush=True) or any(False for _ in range(10**9)))
        del thing
    else:
        print("ready", flush=True)
    any(False for _ in range(10**9)); any(False for _ in range(10**9))

cli.VERBS["plan"] = wait
sys.argv = ["btlm", "plan", *sys.argv[1:]]
cli.entry()
"""


@pytest.mark.parametrize("where", [[], ["weak"]])
def test_an_interrupt_is_never_lost(where):
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, *where],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, said
    assert said == "btlm plan: interrupted; the same command resumes where it can\n"


IMPORT = """
import sys
from pathlib import Path
from btlm_jax import cli
from btlm_jax.storage import files

def work(arguments):
    with files.only_writer(Path("x")), files.scratch_directory(Path("x")) as scratch:
        (scratch / "half").write_text("")
        import slow

cli.VERBS["plan"] = work
sys.path.insert(0, "")
sys.argv = ["btlm", "plan"]
cli.entry()
"""


def test_an_interrupt_during_an_import_leaves_nothing_unfinished(tmp_path):
    (tmp_path / "slow.py").write_text("print('ready', flush=True)\nany(False for _ in range(10**9))")
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORT], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (
        INTERRUPTED,
        "btlm plan: interrupted; the same command resumes where it can\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["slow.py"]


SAY = """
import os, sys
from btlm_jax import cli
cli.VERBS["plan"] = lambda arguments: print("an error", file=sys.stderr) or print(os.open("kept", 66) > 2) or 0
sys.argv = ["btlm", "plan"]
cli.entry()
"""


@pytest.mark.parametrize(("closed", "shown"), [("2>&-", "True\n"), ("0<&-", "True\n"), (">&-", "")])
def test_a_closed_stream_is_no_place_for_what_is_said(tmp_path, closed, shown):
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, SAY], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "" if closed == "2>&-" else "an error\n")


@pytest.mark.parametrize(("kind", "code"), [(Stopped, PREEMPTED), (KeyboardInterrupt, INTERRUPTED)])
def test_what_an_interrupt_left_half_built_is_not_freed(monkeypatch, kind, code):
    """JAX's half-built programs crash when they are freed: benchmarks/kill_resume.py, moment "compilation"."""
    freed = []

    class HalfBuilt:
        def __del__(self):
            freed.append(self)

    def interrupted(arguments):
        _half_built = HalfBuilt()
        raise kind

    monkeypatch.setattr(cli, "_not_freed", [])
    monkeypatch.setitem(cli.VERBS, "plan", interrupted)
    assert main(["plan"]) == code
    assert freed == []


FIRST = """
import os, signal, sys

class Interrupting:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "btlm_jax.notices":  # one of the first modules
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting)
sys.argv = ["btlm", "plan"]
from btlm_jax.__main__ import run
run()
"""


def test_an_interrupt_of_the_first_imports_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", FIRST], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    said = "btlm plan: interrupted; the same command resumes where it can\n"
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", said)
