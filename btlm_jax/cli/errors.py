"""What is said of an error that ended a command: one line, and an exit code."""

from __future__ import annotations

import datetime
import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import metadata

import btlm_jax
from btlm_jax import stopping
from btlm_jax.cli import ERROR, FAULT, PIPE_CLOSED, USAGE, UsageError, is_reader_gone
from btlm_jax.notices import StrictError, is_named, named
from btlm_jax.stopping import (
    INTERRUPTED,
    PEER_GONE,
    PREEMPTED,
    AgreedError,
    MissingProcessesError,
    ProcessesDifferError,
    Stopped,
)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_DISKS = tuple(map(os.strerror, (*_DISK_FULL, errno.EROFS, errno.EFBIG)))
_OF_EXCHANGES = ("Gloo", "CoordinationService", "DEADLINE_EXCEEDED")  # in what JAX says of one that failed
_VERSIONS_OF = ("jax", "jaxlib", "numpy", "flax", "orbax-checkpoint", "grain")


def report(error: BaseException, *, verb: str, arguments: Sequence[str]) -> int:
    """Print one line about an error and return the exit code.

    An error that the user can mend was named by our own code, or by the operating system. Any other is a fault of this
    program: the line says so and names a file with the traceback; `--debug` prints that too.
    """
    if "--debug" in arguments:
        traceback.print_exception(error)
    message = _message_for_user(error)
    if message is not None:
        print(f"btlm {verb}: error: {named(message)}", file=sys.stderr)
        return code_of(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    print(
        f"btlm {verb}: this is a fault of btlm, please report it: {text[:300]} ({_write_traceback(error, arguments)})",
        file=sys.stderr,
    )
    return FAULT


def code_of(error: BaseException) -> int:
    """Return the exit code of a command that an error ends."""
    if isinstance(error, (UsageError, ProcessesDifferError)):
        return USAGE
    if isinstance(error, MissingProcessesError):
        return PEER_GONE
    if isinstance(error, KeyboardInterrupt):
        return PREEMPTED if isinstance(error, Stopped) else INTERRUPTED
    if isinstance(error, BrokenPipeError) and is_reader_gone():
        return PIPE_CLOSED
    return FAULT if _message_for_user(error) is None else ERROR


def wait_if_peer_is_gone(error: Exception) -> None:
    """Wait for the end of this process if the error may come from another process of the run that is gone.

    JAX and orbax, when they wait for a process that is gone, raise RuntimeErrors and OSErrors, and JAX a ValueError
    where an exchange broke that a call waited for: any other ValueError than one of our own `raise` is taken for one.
    That a disk cannot be written comes from no other process.
    An exchange that failed although all are there ends this process in the same way: the run can go on.
    """
    is_own = isinstance(error, AgreedError) or (isinstance(error, ValueError) and is_named(error))
    is_own |= isinstance(error, OSError) and any(reason in str(error) for reason in _OF_DISKS)
    if isinstance(error, (RuntimeError, OSError, ValueError)) and not is_own:
        stop = stopping.current()
        stop.wait_if_peer_is_gone()
        if stop.has_peers and any(name in str(error) for name in _OF_EXCHANGES):
            stop.end_standing(f"an exchange between the processes failed: {str(error).splitlines()[0][:200]}")


def _message_for_user(error: BaseException) -> str | None:
    """Return what to say of an error that is not our fault, or None."""
    is_full = isinstance(error, OSError) and error.errno in _DISK_FULL and "free some space" not in str(error)
    advice = "; free some space and give the same command again" if is_full else ""
    if is_named(error) or isinstance(error, StrictError):
        return f"{error}{advice}"
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error}" if error.errno is None else f"{error}{advice}"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("btlm_jax"):
        return f"the package {error.name} is missing here: install btlm_jax again (docs/reference/files.md, extras too)"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first_line = str(error).splitlines()[0] if str(error) else "an array could not be allocated"
        return (
            f"out of memory: {first_line}; make what was asked for smaller (batch, model, blocks), or give more memory"
        )
    return None


def _write_traceback(error: BaseException, arguments: Sequence[str]) -> str:
    """Write the traceback, the command and the versions to a file; return where they are."""
    installed = {str(found.metadata["name"]).lower(): found.version for found in metadata.distributions()}
    versions = [f"{name} {installed.get(name, 'missing')}" for name in _VERSIONS_OF]
    report = (
        f"{datetime.datetime.now().isoformat(timespec='seconds')} btlm {btlm_jax.__version__}, Python "
        f"{platform.python_version()}, {platform.platform()}, {', '.join(versions)}\n"
        f"btlm {' '.join(arguments)}\n\n{''.join(traceback.format_exception(error))}"
    )
    try:
        handle, name = tempfile.mkstemp(prefix="btlm-fault-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(report)
    except OSError as unwritable:
        print(report, file=sys.stderr)
        return f"the traceback, above, cannot be written to a file: {unwritable}"
    return f"traceback in {name}"
