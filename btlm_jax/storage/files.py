"""Write files and directories atomically: a reader sees the old contents or the new, never a part. Locks; the cache.

And JSON, read with errors that name the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import resource
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self, cast

_TEMPORARY_SUFFIX = ".tmp"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_OTHER_FILES = 256  # of a process: sockets, the XLA cache, checkpoints while they are written


_unfinished: set[Path] = set()  # files and directories that are deleted at the end of the blocks that made them


@contextlib.contextmanager
def _unfinished_until_end(path: Path) -> Iterator[None]:
    """Delete a file or directory, if it is there under its name, at the end of the block."""
    _unfinished.add(path)
    try:
        yield
    finally:
        _unfinished.discard(path)
        _delete(path)


def delete_unfinished() -> None:
    """Delete what the blocks that are running would delete at their ends, of a process that ends without them."""
    for path in list(_unfinished):
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Replace the contents of a file, or create it.

    Raises:
      OSError: it cannot be written; the old contents are kept.
    """
    with AtomicFile(path) as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)


class AtomicFile:
    """A file that is written under a temporary name and renamed when the block ends without an error."""

    def __init__(self, path: Path):
        self.path = path
        self._hash = hashlib.sha256()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(renamed_at_end(self.path))
            self._file = stack.enter_context(open(temporary, "wb"))
            self._stack = stack.pop_all()
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._hash.update(data)
        with naming(self.path):
            self._file.write(data)

    @property
    def sha256(self) -> str:
        """The sha256 of the bytes written so far."""
        return self._hash.hexdigest()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with naming(self.path), self._stack:  # on a full disk even closing fails, and then the file is not renamed
            self._file.flush()
            os.fsync(self._file.fileno())


def open_to_append(path: Path, *, num_bytes: int) -> io.FileIO:
    """Open a file, a new one where there is none, to go on after its first bytes; what follows them is cut off."""
    file = open(path, "r+b" if path.exists() else "xb", buffering=0)
    file.truncate(num_bytes)
    file.seek(num_bytes)
    return file


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write bytes, all of them: on a full disk a single call may write a part, and say so by its number alone."""
    while data:
        data = data[file.write(data) :]


def parse_json(contents: str | bytes, *, name: object) -> Any:
    """Return the value of JSON text; `name` is what errors call it.

    Raises:
      ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(contents)
    except RecursionError:
        raise ValueError(f"{name} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{name} is not valid JSON: {error}") from error


def parse_json_object(contents: str | bytes, *, name: object) -> dict[str, Any]:
    """Return the value of JSON text that must be an object.

    Raises:
      ValueError: it is not JSON, or is another kind of value.
    """
    value = parse_json(contents, name=name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, and is a {type(value).__name__}: {str(value)[:40]}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
      ValueError: it is none, or a Git LFS pointer; names the file.
      OSError: it cannot be read.
    """
    check_no_lfs_pointer(path)
    return parse_json_object(path.read_bytes(), name=path)


def check_no_lfs_pointer(path: Path) -> None:
    """Check that a file is not what git leaves in the place of a large file that was not downloaded.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is such a pointer.
    """
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")


def hash_json(value: Any) -> str:
    """Return the SHA-256, hexadecimal, of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of writing, such as of a full disk, name the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def sync_and_hash(path: Path) -> str:
    """Flush a file that another library has written to disk; return the sha256 of its contents."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return hash_file(path)


@contextlib.contextmanager
def renamed_at_end(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename that file to `path` when the block ends without an error.

    The block must write the file and flush it to disk. After an error the file is deleted.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")  # unique to this process
    with _unfinished_until_end(temporary):
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def scratch_file(folder: Path, *, prefix: str) -> Iterator[BinaryIO]:
    """Yield an open, named file in a folder, which is deleted when the block ends."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{prefix}-", suffix=_TEMPORARY_SUFFIX) as file:
        yield cast(BinaryIO, file)


def delete_temporary_files(folder: Path) -> None:
    """Delete the unfinished files that killed processes have left in a folder."""
    for path in folder.glob(f".*{_TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target`, to write its contents there; the caller renames it, or a file in it.

    It is deleted at the end of the block unless renamed; one left by a killed process is deleted at the beginning.
    """
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with _unfinished_until_end(scratch):
        yield scratch


def cache_directory() -> Path:
    """Return the user's folder for what is built once per machine, such as compiled kernels.

    Raises:
      OSError: the user has no home directory.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "btlm_jax"
    except RuntimeError as error:
        raise OSError(f"there is no home directory to keep a cache in: {error}; set XDG_CACHE_HOME") from error


def allow_open_files(count: int, *, name: object) -> None:
    """Raise this process's limit of open files, if it is too low for so many and for what it opens besides.

    Raises:
      OSError: the system allows no such limit; begins with `name`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:  # macOS has a lower limit than `hard`, which is infinite there
        most = f"{soft if hard == resource.RLIM_INFINITY else hard:,} here (ulimit -Hn)"
        raise OSError(
            f"{name} has {count:,} files to keep open, and a process may open {most}: have the limit raised to "
            f"{needed:,} (LimitNOFILE of systemd, limits.conf), or make larger shards"
        ) from error


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Ensure that this is the only process that makes `path`, by a lock file beside it.

    Raises:
      FileExistsError: another process is making it.
    """
    message = f"{path} is being made by another process; wait for it, or give another name"
    with exclusive_lock(path.with_name(f".{path.name}.lock"), message=message):
        yield


def lock_open_file(file: IO, operation: int) -> None:
    """Lock an open file, as fcntl.flock does.

    Raises:
      BlockingIOError: `operation` has LOCK_NB, and another process holds it.
      OSError: its file system has no locks; says what to do.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"{file.name} cannot be locked ({error.strerror or error}): its file system has to be mounted with locks, "
            "Lustre with -o flock; or give a folder on another one"
        ) from error


@contextlib.contextmanager
def exclusive_lock(lock: Path, *, message: str) -> Iterator[None]:
    """Hold a lock file, which is deleted at the end of the block; if the process is killed, the lock is released.

    Raises:
      FileExistsError: another process holds it; says `message`.
      OSError: its file system has no locks.
    """
    while True:
        is_new = not lock.exists()
        file = open(lock, "w")  # noqa: SIM115
        try:
            lock_open_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FileExistsError(message) from None
        except OSError:
            file.close()
            if is_new:
                lock.unlink(missing_ok=True)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        file.close()  # its last holder deleted it between our open and our lock
    with file, _unfinished_until_end(lock):
        yield
