"""Run a program that a model wrote: its own process, limits, an empty folder, no network where Linux can take it away.

This keeps accidents away: endless loops, memory, files by relative names, traffic. It is no protection against a
program that means harm; for that, run the whole evaluation in a machine or a container that can be lost.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile

from btlm_jax import ending_of, notices

MEMORY_BYTES, FILE_BYTES, NUM_FILES = 2 << 30, 1 << 20, 64
PASSED, TIMED_OUT = "passed", "timed out"
_MOST_BYTES = 1000  # of what is told of an error
# Limits itself, reads the word and the program, and writes the word, or an error, to a pipe of which the program knows
# nothing: one that ends early, by sys.exit(0) too, has not passed.
_RUNNER = f"""
import os, resource, sys
report, seconds = os.fdopen(int(sys.argv[1]), "wb", buffering=0), int(sys.argv[2])
limits = {{"CPU": seconds, "AS": {MEMORY_BYTES}, "FSIZE": {FILE_BYTES}, "NOFILE": {NUM_FILES}, "CORE": 0}}
for kind, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
word, _, program = sys.stdin.buffer.read().partition(b"\\n")
sys.stdin = open(os.devnull)
del sys.argv[1:]
try:
    exec(compile(program.decode(), "program", "exec"), {{"__name__": "__main__"}})
except BaseException as error:
    word = (type(error).__name__ + ": " + str(error)).encode("utf-8", "replace")[:{_MOST_BYTES}]
report.write(word)
"""


def run_program(program: str, *, seconds: float) -> str:
    """Run a program in Python; return PASSED, TIMED_OUT, or what went wrong.

    It has passed if it came to its end, without an error, in so many seconds.
    """
    word = secrets.token_hex(16)
    read, write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="btlm-program-") as folder, os.fdopen(read, "rb", buffering=0) as report:
        os.set_blocking(read, False)
        limits = (str(write), str(int(seconds) + 1))
        process = subprocess.Popen(
            [*_without_network(), sys.executable, "-I", "-c", _RUNNER, *limits],
            cwd=folder, env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(write,),
            start_new_session=True,
        )  # fmt: skip
        os.close(write)
        try:
            process.communicate(f"{word}\n{program}".encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own children too
            process.communicate()
        said = (report.read() or b"").decode("utf-8", "replace")
    if said == word:
        return PASSED
    return said or f"ended early: {ending_of(process.returncode)}"


@functools.cache
def _without_network() -> tuple[str, ...]:
    """Return the beginning of a command that has no network, or nothing where that cannot be.

    All processes that such a command has started end with it, those of sessions of their own too, where there are
    namespaces of processes.
    """
    command = ("unshare", "--user", "--map-root-user", "--net")
    for more in (("--pid", "--fork", "--kill-child"), ()):  # util-linux before 2.32 has no --kill-child
        try:
            subprocess.run([*command, *more, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return (*command, *more)
    notices.report("network-open", "programs that the model writes can reach the network: unshare does not work here")
    return ()
