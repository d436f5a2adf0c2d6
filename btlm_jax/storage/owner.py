"""A workdir has one owner: the command that writes to it. Another one is refused, and told who the owner is.

The owner is the file owner.json, with a token that no other command has, rewritten every BEAT_SECONDS. Taking it is
writing it and reading it back, which also works where nothing can be locked. Clocks of different machines are not
compared: an owner that may be dead is watched for DEAD_SECONDS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from btlm_jax import notices
from btlm_jax.storage.files import parse_json_object, write_atomically

OWNER_FILE = "owner.json"
BEAT_SECONDS, DEAD_SECONDS = 5.0, 60.0
_READ_BACK_SECONDS = 2.0  # where nothing can be locked: for what another command wrote meanwhile to be seen
_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """What owner.json says."""

    token: str
    host: str
    pid: int
    machine: str  # the boot and the space of process ids in which `pid` means something
    began: str  # when that process began, as the machine counts; another one may have its pid later
    since: str  # time of the start, for a reader
    beat: int  # grows while the owner lives

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Bucket(Protocol):
    """A workdir in a bucket, as bucket.py has it; each raises an OSError where it cannot be reached."""

    url: str

    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def delete(self, name: str) -> None: ...


class Ownership:
    """The ownership of one workdir, until `release`."""

    def __init__(self, workdir: Path | Bucket, owner: Owner):
        self._workdir, self._owner = workdir, owner
        self._folder = _inode(workdir)
        self._released = threading.Event()
        self._lock = threading.Lock()  # between the thread that writes the file and `release`

    def keep(self, *, on_loss: Callable[[str], None]) -> None:
        """Rewrite the file in a thread from here on; call `on_loss` with a line if the workdir is lost."""

        def beat() -> None:
            while not self._released.wait(BEAT_SECONDS):
                if why := self.beat():
                    on_loss(f"{self._workdir} {why}: this run is ended, nothing more is written")

        threading.Thread(target=beat, name="owner", daemon=True).start()

    def beat(self) -> str:
        """Rewrite the file; return why the workdir is lost, "" while it is ours.

        A file that cannot be written is left as it is.
        """
        with self._lock, contextlib.suppress(OSError):
            if self._released.is_set():
                return ""
            folder = _inode(self._workdir)
            if self._folder and not folder:  # what is open there is written to what nobody finds
                return "was deleted or moved"
            with _locked(self._workdir):
                found = read_owner(self._workdir)
                if folder != self._folder and found is None:  # with the file a mounted bucket has numbered it anew
                    return "was deleted or moved"
                self._folder = folder
                if found is not None and found.token != self._owner.token:
                    return f"was taken over by {found}"
                self._owner = dataclasses.replace(self._owner, beat=self._owner.beat + 1)
                _write_file(self._workdir, self._owner)
        return ""

    def release(self) -> None:
        """Give the workdir up; the file is deleted if it is still ours."""
        self._released.set()
        # Without waiting for ever: a process that ends at once may hold the lock in a thread that hangs.
        is_locked = self._lock.acquire(timeout=1.0)
        with contextlib.suppress(OSError):
            found = read_owner(self._workdir)
            if found is not None and found.token == self._owner.token:
                if isinstance(self._workdir, Path):
                    (self._workdir / OWNER_FILE).unlink(missing_ok=True)
                else:
                    self._workdir.delete(OWNER_FILE)
        if is_locked:
            self._lock.release()


def read_owner(workdir: Path | Bucket) -> Owner | None:
    """Return who owns a workdir, None if nobody does, or the file is damaged.

    Raises:
      OSError: the file cannot be read.
    """
    try:
        is_here = isinstance(workdir, Path)
        contents = (workdir / OWNER_FILE).read_bytes() if is_here else workdir.read(OWNER_FILE)
        values = parse_json_object(contents, name=OWNER_FILE)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # damaged: it is written atomically, so by nobody of us
        return None
    kinds = {field.name: int if field.name in ("pid", "beat") else str for field in dataclasses.fields(Owner)}
    if set(values) < set(kinds) or not all(type(values.get(name)) is kind for name, kind in kinds.items()):
        return None
    return Owner(**{name: values[name] for name in kinds})


def take(workdir: Path | Bucket, *, steal: bool) -> Ownership:
    """Become the owner of a workdir that exists. A dead owner is replaced, and with `steal` one that may live.

    Raises:
      FileExistsError: another command owns it; says which.
      OSError: the file cannot be written.
    """
    watched: Owner | None = None
    began = 0.0
    while True:
        with _locked(workdir) as is_locked:
            other = read_owner(workdir)
            seconds = time.monotonic() - began if watched == other else 0.0
            why = _why_taken(other, unchanged_seconds=seconds, steal=steal)
            if other is None or why:
                if other is not None:
                    notices.report("workdir-taken-over", f"{workdir} belonged to {other}: {why}")
                return _write(workdir, is_locked=is_locked)
        if other.machine == _machine() or (watched is not None and other != watched):
            raise FileExistsError(_refusal(workdir, other))
        if watched is None:
            watched, began = other, time.monotonic()
            notices.report(
                "workdir-watched", f"{workdir} belongs to {other}; {DEAD_SECONDS:.0f} s will show whether that lives"
            )
        time.sleep(_LOOK_SECONDS)


def is_alive(owner: Owner) -> bool | None:
    """Return whether the process of an owner is there; None if it is on another machine, where that cannot be seen."""
    return _is_alive(owner) if owner.machine == _machine() else None


def _why_taken(other: Owner | None, *, unchanged_seconds: float, steal: bool) -> str:
    """Return why a workdir may be taken from its owner, "" if it may not."""
    if other is None:
        return ""
    if steal:
        return "it is taken over because of --steal"
    if other.machine == _machine():
        return "" if _is_alive(other) else "that process is gone"
    is_dead = unchanged_seconds > DEAD_SECONDS
    return f"it has not written to {OWNER_FILE} for {DEAD_SECONDS:.0f} s, and is taken for dead" if is_dead else ""


def _refusal(workdir: Path | Bucket, other: Owner) -> str:
    return (
        f"{workdir} belongs to {other}, which is writing to it: wait for its end, stop it, or choose another "
        "--workdir; if you know that it is dead, --steal takes the workdir over"
    )


def _inode(workdir: Path | Bucket) -> int:
    """Return what tells a local folder from another one at its place, 0 if there is none or it is in a bucket."""
    try:
        return workdir.stat().st_ino if isinstance(workdir, Path) else 0
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _write_file(workdir: Path | Bucket, owner: Owner) -> None:
    text = json.dumps(dataclasses.asdict(owner), indent=2)
    if isinstance(workdir, Path):
        write_atomically(workdir / OWNER_FILE, text)
    else:
        workdir.write(OWNER_FILE, text.encode())


def _write(workdir: Path | Bucket, *, is_locked: bool) -> Ownership:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    owner = Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        began=_began(os.getpid()),
        since=now,
        beat=0,
    )
    _write_file(workdir, owner)
    if not is_locked:
        time.sleep(_READ_BACK_SECONDS)
    found = read_owner(workdir)
    if found is not None and found.token != owner.token:
        raise FileExistsError(_refusal(workdir, found))
    return Ownership(workdir, owner)


@contextlib.contextmanager
def _locked(workdir: Path | Bucket) -> Iterator[bool]:
    """Let no other command of this machine look or write meanwhile; yield whether that is so."""
    if not isinstance(workdir, Path):
        yield False
        return
    folder = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            is_locked = True
        except OSError:  # a file system without locks
            is_locked = False
        yield is_locked
    finally:
        os.close(folder)


def _machine() -> str:
    """Return what names the space in which a process id means something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no /proc outside Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _began(pid: int) -> str:
    """Return when a process began, in ticks since the boot; "" where that cannot be known, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _is_alive(owner: Owner) -> bool:
    """Return whether the process of an owner on this machine is there."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return _began(owner.pid) == owner.began
