"""Write files so that a reader sees the old contents or the new, never a part; and where a machine's cache is."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Give a file its new contents, all at once.

    Raises:
      OSError: it cannot be written; the old contents stay.
    """
    with AtomicFile(path) as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)


class AtomicFile:
    """A file being written under a temporary name; it gets its own name when the block ends without an error."""

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two processes never share it
        self._hash = hashlib.sha256()

    def __enter__(self) -> AtomicFile:
        self._file = open(self._temporary, "wb")
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._hash.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        """The hash of what was written so far."""
        return self._hash.hexdigest()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            with self._file:  # on a full disk even closing fails
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def cache_directory() -> Path:
    """Return the user's own folder for what is made once a machine.

    Raises:
      OSError: the user has no home directory.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "btlm_jax"
    except RuntimeError as error:
        raise OSError(f"there is no home directory to keep a cache in: {error}; set XDG_CACHE_HOME") from error


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Be the only process that makes `path`, by a locked file beside it; a process that is killed leaves it unlocked.

    Raises:
      FileExistsError: another process is making it.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        file = open(lock, "w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            message = f"{path} is being made by another process; wait for it, or give another name"
            raise FileExistsError(message) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        file.close()  # whoever had it has just deleted it
    try:
        yield
    finally:
        lock.unlink()
        file.close()
