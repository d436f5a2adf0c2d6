"""Write files so that a reader sees the old contents or the new, never a part."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write to a temporary name beside `path`, sync it to disk, and rename it over `path`."""
    data = contents.encode() if isinstance(contents, str) else contents
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
