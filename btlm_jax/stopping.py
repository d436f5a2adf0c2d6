"""How a training run ends before its end: a signal, steps that stand still, another process of the run that is gone.

A thread of its own watches, because Python runs signal handlers in the main thread, which may be compiling for minutes.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

ERROR, PREEMPTED, PEER_GONE, INTERRUPTED = 1, 75, 77, 130  # exit codes
BEGINNING, STEPPING, ENDING = "before the first step", "between steps", "after the last save"
STACKS = "stacks"  # directory in a workdir: every thread's stack, of a run whose steps stood still
GRACE_SECONDS = 5.0  # for the main thread to end by itself where there is nothing to save
# Without a step for so long, or for so many times the median step, whichever is longer, a run stands still. First
# steps, evaluations and saves may take longer.
STILL_SECONDS, STILL_STEPS, LONG_SECONDS = 300.0, 30, 3600.0
_FIRST_STEPS = 3
_TICK_SECONDS = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that of a closed terminal saves too
_SUSPENDED_SECONDS = 10.0  # the watching thread was late by so much: the whole process was suspended


class Stopped(KeyboardInterrupt):
    """The run stops where it stands: there is nothing to save. Raised in the main thread, anywhere."""


class ProcessesDifferError(ValueError):
    """The processes of a run do not agree on what they do."""


class MissingProcessesError(OSError):
    """Processes of the run have not come to its beginning."""


class AgreedError(OSError):
    """What failed in one process of a run or in several, raised in all; `reason` says in which, and why."""

    def __init__(self, message: str, *, reason: str):
        super().__init__(message)
        self.reason = reason


class OthersFailedError(Exception):
    """Other processes have failed at what this one waits for; they say why."""


class Peers(Protocol):
    """The other processes of a run, as parallel/peers.py has them."""

    index: int

    def request(self, reason: str) -> None:
        """Tell them that the run shall stop."""
        ...

    def is_agreed(self, step: int) -> bool:
        """Return whether all stop after `step`."""
        ...

    def hold_if_stopping(self) -> None:
        """Wait for the end of this process if all are stopping."""
        ...

    def end(self, code: int, reason: str) -> None:
        """Tell them that this process ends with `code`."""
        ...

    def suspended(self, seconds: float) -> None:
        """Count no silence from before: this whole process stood still for so long."""
        ...

    def wait_for_verdict(self) -> None:
        """Wait as long as it takes to see that one of them is gone, at which this process is ended."""
        ...

    def gone(self) -> tuple[int, str] | None:
        """Return the exit code and the reason with which to end because of one of them, if that must be."""
        ...

    def agree(self, name: str, facts: Mapping[str, str]) -> None:
        """Check that all have the same facts."""
        ...


class Stop:
    """Whether the run of this process shall stop, and why.

    Before its first step and after its last save nothing is lost when it ends where it stands, within GRACE_SECONDS.
    Between steps the loop asks `is_agreed` after each, saves, and ends.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.reason = ""  # of the request, "" without one
        self.stage = BEGINNING
        self.kept = f"nothing to save {BEGINNING}"  # what is said of a stop there
        self.workdir: Path | None = None
        self._clock = clock
        self.began = self._requested_at = self._ticked = clock()
        self._deadline = 0.0  # for the next step; 0: none
        self._stepped_at = 0.0
        self._intervals = collections.deque(maxlen=50)  # seconds between the last steps
        self._peers: Peers | None = None
        self._at_exit: list[Callable[[int, str], None]] = []
        self._is_signalled = False

    def watch_signals(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP from here on; call it in the main thread, once."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as below nohup
                signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # A forked child has the same pipe: what it is sent would stop the run.
        os.register_at_fork(after_in_child=_forget_signals)
        threading.Thread(target=self._watch, args=(reading,), name="stopping", daemon=True).start()

    def join(self, peers: Peers) -> None:
        """Stop together with other processes from here on."""
        self._peers = peers
        if self.reason:
            peers.request(self.reason)

    def at_exit(self, function: Callable[[int, str], None]) -> None:
        """Have a function called, with the exit code and the reason, before this process ends at once."""
        self._at_exit.append(function)

    @contextlib.contextmanager
    def calling_at_exit(self, function: Callable[[int, str], None]) -> Iterator[None]:
        """Do as `at_exit`, within the `with` block alone; those of blocks in it come later."""
        self._at_exit.append(function)
        try:
            yield
        finally:
            self._at_exit.remove(function)

    def begin_run(self, workdir: Path) -> None:
        """A run begins in a process that may have made others: as of the first, nothing of it is to be saved yet.

        Raises:
          Stopped: a stop was requested.
        """
        self.stage, self.workdir = BEGINNING, workdir
        self._deadline = self._stepped_at = 0.0
        self._intervals.clear()
        self._leave_if_requested()

    def request(self, reason: str) -> None:
        """Have the run stop; only the first request counts."""
        if not self.reason:
            self.heed(reason)
            if self._peers:
                self._peers.request(reason)

    def heed(self, reason: str) -> None:
        """Stop because another process of the run was requested to."""
        if not self.reason:
            self._requested_at, self.reason = self._clock(), reason

    @property
    def seconds_since(self) -> float:
        """How long ago the stop was requested."""
        return self._clock() - self._requested_at

    def begin_steps(self) -> None:
        """The loop begins: from here on it asks `is_agreed` after each step.

        Raises:
          Stopped: a stop was requested.
        """
        self._leave_if_requested()
        self.stage = STEPPING
        self.allow_long()

    def is_agreed(self, step: int) -> bool:
        """Return whether to save after `step` and end; every process gets the same answer for the same step."""
        now = self._clock()
        if self._stepped_at:
            self._intervals.append(now - self._stepped_at)
        self._stepped_at = now
        is_first = len(self._intervals) < _FIRST_STEPS
        median = sorted(self._intervals)[len(self._intervals) // 2] if self._intervals else 0.0
        still = LONG_SECONDS if is_first else max(STILL_SECONDS, STILL_STEPS * median)
        self._deadline = now + still
        return self._peers.is_agreed(step) if self._peers else bool(self.reason)

    def allow_long(self) -> None:
        """Let what comes until the next step, an evaluation or a save, take LONG_SECONDS."""
        self._deadline = self._clock() + LONG_SECONDS

    def leave_if_beginning(self) -> None:
        """Leave the run if a stop was requested, before the first step; wait for the end if there are other processes.

        Raises:
          Stopped: a stop was requested.
        """
        if self.stage == BEGINNING:
            self._leave_if_requested()

    def begin_end(self) -> None:
        """The last state is saved: from here on nothing is lost.

        Raises:
          Stopped: a stop was requested.
        """
        self._deadline = 0.0
        self.stage = ENDING
        self._leave_if_requested()

    def finish(self) -> None:
        """The run is done, or has saved: a signal no longer changes how it ends."""
        self._deadline = 0.0
        self.stage = STEPPING

    def leave(self, code: int) -> bool:
        """Tell the other processes that this one ends with `code`; return whether it has to end at once.

        Python's end would wait for JAX's, which waits for all processes; and a preempted one has no time for it.
        """
        self.finish()
        if self._peers:
            self._peers.end(code, "see what it said")
        return self._peers is not None or code == PREEMPTED

    def said(self) -> str:
        """Return what is said of a stop where there was nothing to save."""
        at_end = "all steps are saved; the same command repeats what comes after them"
        what = at_end if self.stage == ENDING else f"{self.kept}; the same command goes on"
        return f"preempted ({self.reason}): {what}"

    def end_now(self, code: int, reason: str, advice: str = "") -> None:
        """End this process at once with one line, and tell the others the reason."""
        line = f"btlm {' '.join(sys.argv[1:2])}: {reason}{advice}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode(errors="backslashreplace"))
        if self._peers:
            self._peers.end(code, reason)
        for function in self._at_exit:
            with contextlib.suppress(OSError):
                function(code, reason)
        if files := sys.modules.get("btlm_jax.storage.files"):
            files.delete_unfinished()
        os._exit(code)

    def write_stacks(self, reason: str) -> str:
        """Write every thread's stack to the workdir; return where they are."""
        if self.workdir is None:
            return "No stacks are written: there is no workdir yet"
        process = self._peers.index if self._peers else 0
        path = self.workdir / STACKS / f"process-{process}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"\n{now} process {process}, {os.uname().nodename}, pid {os.getpid()}: {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f"The stacks cannot be written to {path}: {error.strerror}"
        return f"The stacks of all threads are in {path}"

    def end_standing(self, reason: str) -> None:
        """End this process at once because the run does not go on, with every thread's stack."""
        self.end_now(PEER_GONE, reason, f"; run the same command again. {self.write_stacks(reason)}")

    def tick(self) -> None:
        """Look at the clock: end the process if it is late."""
        now = self._clock()
        late, self._ticked = now - self._ticked - _TICK_SECONDS, now
        if late > _SUSPENDED_SECONDS:
            self._deadline += late if self._deadline else 0.0
            if self._peers:
                self._peers.suspended(late)
        is_idle = self.reason and not self._peers and self.stage != STEPPING
        if is_idle and self.seconds_since > GRACE_SECONDS:  # the main thread is in code that no signal interrupts
            self.end_now(PREEMPTED, self.said())
        if self._deadline and now > self._deadline:
            still = now - self._stepped_at if self._stepped_at else LONG_SECONDS
            self.end_standing(f"no step for {still:,.0f} s: the run stands still")
        if self._peers and (found := self._peers.gone()):
            code, reason = found
            if code == PEER_GONE:
                self.end_standing(reason)
            self.end_now(code, reason)

    def agree(self, name: str, facts: Mapping[str, str]) -> None:
        """Check that all processes of the run have the same facts.

        Raises:
          ProcessesDifferError: they do not.
        """
        if self._peers:
            self._peers.agree(name, facts)

    def wait_for_all(self, name: str) -> None:
        """Return when all processes of the run have called this with `name`, however long that takes."""
        self.agree(name, {})

    @property
    def has_peers(self) -> bool:
        """Whether the run has other processes, which this one has met."""
        return self._peers is not None

    def wait_if_peer_is_gone(self) -> None:
        """Wait for the end of this process if another one is gone, which is what an error here may come from."""
        if self._peers:
            self._peers.wait_for_verdict()

    def _leave_if_requested(self) -> None:
        if self._peers:
            self._peers.hold_if_stopping()
        elif self.reason:
            raise Stopped

    def _on_signal(self, signum: int, frame) -> None:
        if signum == signal.SIGHUP:
            _leave_terminal()
        self.request(signal.Signals(signum).name)
        is_first, self._is_signalled = not self._is_signalled, True
        if not is_first or self._peers or self.stage == STEPPING:  # another one would break off what this one's does
            return
        while frame is not None:  # an import turns an exception into another one
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                self.end_now(PREEMPTED, self.said())
            frame = frame.f_back
        raise Stopped

    def _watch(self, reading: int) -> None:
        import select

        num_interrupts = 0
        while True:
            ready, _, _ = select.select([reading], [], [], _TICK_SECONDS)
            for number in os.read(reading, 64) if ready else ():
                num_interrupts += number == signal.SIGINT
                if num_interrupts == 2:
                    self.end_now(INTERRUPTED, "interrupted twice: ended at once; the same command resumes where it can")
                if number in _SIGNALS:
                    self.request(signal.Signals(number).name)
            self.tick()


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _leave_terminal() -> None:
    """Print nothing more to a terminal or a pipe: it is gone, and a write to it would end the run before it saves."""
    with contextlib.suppress(OSError):
        os.write(2, b"SIGHUP, as of a closed terminal: the run saves and ends, and prints nothing more here\n")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if not stat.S_ISREG(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)


_current: Stop | None = None  # signals are of the whole process
_is_interrupted = False


def begin() -> None:
    """Take the signals of this process, whose command trains; call it in the main thread, once."""
    global _current
    _current = Stop()
    _current.watch_signals()


def current() -> Stop:
    """Return the one that `begin` made, or one that no signal reaches."""
    return _current or Stop()


def interrupt() -> None:
    """Raise KeyboardInterrupt, also wherever `raise_if_interrupted` is called from here on."""
    global _is_interrupted
    _is_interrupted = True
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise what a signal raised before; for where an error came up that may be what a library made of that.

    Raises:
      KeyboardInterrupt: the command was interrupted.
      Stopped: a run that trains was to stop, and has no step yet.
    """
    if _is_interrupted:
        raise KeyboardInterrupt
    current().leave_if_beginning()


def leave(code: int) -> bool:
    """Tell the other processes of a run, if this is one, that this one ends; return whether it has to end at once."""
    return _current is not None and _current.leave(code)
