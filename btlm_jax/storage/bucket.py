"""A workdir in a bucket: a folder of this machine, and a folder behind a URL that is kept equal to it.

A run writes to the local folder as to any other; a thread copies that to the bucket. An object store has neither
renames nor appends, so it is the order of the writes that makes a kill at any moment harmless:

- A checkpoint counts once it has its COMMIT, which names its files with their sizes and hashes. That is written after
  all of them and after the metrics, and deleted before any of them.
- Other files go whole, in the order in which they were changed; what is gone locally is deleted last.
- SESSION says which local folder wrote last: that one goes on from what it has, any other is made anew.

Of a run of several processes each has a local folder of its own, where orbax saves what this process holds: a database
of OCDBT, `state/ocdbt.process_<index>`. All but the first are a PartMirror: it uploads that database, and then an
object that names its files; both have names that no other save has. The first uploads the rest, waits for these
objects, and names all files in the COMMIT. Nothing is deleted before that. Whoever fetches such a checkpoint joins the
databases to the one that orbax reads; only names are copied for that.

Imported only for a workdir that is a URL.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec.asyn

from btlm_jax import notices
from btlm_jax.storage import location
from btlm_jax.storage.files import (
    cache_directory,
    exclusive_lock,
    hash_file,
    hash_json,
    parse_json_object,
    renamed_at_end,
    write_atomically,
)
from btlm_jax.storage.location import DELETED, ORIGIN
from btlm_jax.storage.owner import BEAT_SECONDS, OWNER_FILE

COMMIT = "commit.json"
SESSION = ".session"
NOT_OF_A_CHECKPOINT = (COMMIT, ORIGIN)  # what lies beside its files
STAGING_VARIABLE = "BTLM_STAGING"  # where the local folders are, if not in the user's cache
FILES_SECONDS = 60.0  # between copies of the files beside the checkpoints
_SYNCED = ".synced.json"  # of a local folder: which of its files are as in the bucket
_SPEED, _PROBE = ".speed", ".writable-"  # objects by which the speed of writing is measured, and that one can write
_STATE = "state/"  # of a checkpoint: the arrays, which are fetched when they are read
_PROCESS = f"{_STATE}ocdbt.process_"  # and an index: the database of arrays of one process
_JOINED = (f"{_STATE}manifest.ocdbt", f"{_STATE}d")  # the database of all
_IS_JOINED = ".joined"  # in `state`: it is that of all processes' databases, not of this one's alone
_DIGESTS = "digests/metadata"  # of a checkpoint: hashes of its arrays, the same in all processes
_CHECKPOINTS = "checkpoints"
_NOT_FOR_READERS = ("tensorboard/", "compile_cache/", "trackers/", "profile/", "corpus/", "store/", "replaced/")
_LAST_NAMES = ("manifest.json", "summary.json")  # of files that say that others are complete
_WAITS = (2.0, 8.0)  # seconds before each further attempt, beside those of fsspec's libraries
_CALL_SECONDS, _SLOWEST = 120.0, 4e6  # for a request, and bytes per second for what it carries
_IN_MEMORY = 1 << 28  # bytes; a larger file is not one that grows
_THREADS = 8
_POLL_SECONDS = 0.5
_OTHERS_SECONDS = 30.0  # for the parts of other processes, which are uploaded before they are waited for
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "PermissionError")


class RemoteFolder:
    """A folder behind a URL. Each call is tried again after each of `waits`, and raises an OSError.

    An attempt is bounded in time where fsspec's library is asynchronous, as those of gs:// and s3:// are.
    """

    def __init__(self, url: str, *, waits: tuple[float, ...] | None = None, seconds: float = _CALL_SECONDS):
        self.url = url.rstrip("/")
        self._waits, self._seconds = waits, seconds
        self._system, self._path = location.open_system(self.url)
        self.times: dict[str, float] = {}  # when each object was written, in seconds since 1970, as last listed

    def __str__(self) -> str:
        return self.url

    def list(self) -> dict[str, list]:
        """Return the version stamp of each object, its size first, by name relative to the folder.

        Raises:
          ValueError: an object's name is no path below the folder; nothing is read or written then.
        """
        self._system.invalidate_cache()  # of listings
        infos = self._try("find", "", self._path, detail=True)
        files = location.files_below(infos, self._path)
        location.check_names(files, root=self.url)

        def known(file: tuple[str, tuple[str, dict]]) -> tuple[str, dict]:
            name, (at, info) = file
            # HTTP says how long a file is only where it is asked for that file.
            return name, info if info.get("size") is not None else self._try("info", name, at)

        found = dict(_in_threads(known, files.items()))
        self.times = {name: seconds for name, info in found.items() if (seconds := location.time_of(info))}
        return {name: location.stamp_of(info) for name, info in found.items()}

    def read(self, name: str) -> bytes:
        """Return an object's contents.

        Raises:
          FileNotFoundError: it is not there.
        """
        return self._try("cat_file", name, self._at(name))

    def write(self, name: str, data: bytes) -> None:
        """Replace an object, or create it."""
        self._try("pipe_file", name, self._at(name), data, num_bytes=len(data))

    def upload(self, path: Path, name: str) -> None:
        """Replace an object by a file, or create it."""
        self._try("put_file", name, str(path), self._at(name), num_bytes=path.stat().st_size)

    def download(self, name: str, path: Path, *, num_bytes: int) -> None:
        """Replace a file by an object, or create it.

        Raises:
          FileNotFoundError: there is no such object.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_at_end(path) as temporary:
            self._try("get_file", name, self._at(name), str(temporary), num_bytes=num_bytes)
            if not temporary.exists():  # some systems make none of an empty object
                temporary.touch()

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the bucket.

        Raises:
          FileNotFoundError: there is no such object.
        """
        self._try("cp_file", name, self._at(name), self._at(target))

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._try("rm_file", name, self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    def _try(self, method: str, name: str, *arguments: Any, num_bytes: int = 0, **options: Any) -> Any:
        waits = _WAITS if self._waits is None else self._waits
        for attempt, wait in enumerate((*waits, None), start=1):
            try:
                return self._call(method, *arguments, seconds=self._seconds + num_bytes / _SLOWEST, **options)
            except ImportError as error:
                raise location.missing_library(self.url, error) from error
            except Exception as error:  # fsspec's libraries raise errors of their own types
                is_write = method in ("pipe_file", "put_file")
                if isinstance(error, FileNotFoundError) and not is_write:
                    raise FileNotFoundError(f"{self.url}/{name} is not there") from error
                if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
                    raise
                why = _reason(error) if not isinstance(error, FileNotFoundError) else "there is no such bucket"
                is_final = isinstance(error, FileNotFoundError) or _is_refusal(error)
                if wait is None or is_final:
                    raise OSError(
                        f"{self.url}/{name} cannot be {'written' if is_write else 'reached'} "
                        f"({attempt} attempt{'s' * (attempt > 1)}): {why}"
                    ) from error
                notices.report(
                    "bucket-again",
                    f"{self.url}/{name}: attempt {attempt} of {len(waits) + 1} failed, again in {wait:.0f} s: {why}",
                )
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _call(self, method: str, *arguments: Any, seconds: float, **options: Any) -> Any:
        if getattr(self._system, "async_impl", False):
            coroutine = getattr(self._system, f"_{method}")
            return fsspec.asyn.sync(self._system.loop, coroutine, *arguments, timeout=seconds, **options)
        return getattr(self._system, method)(*arguments, **options)


def _reason(error: Exception) -> str:
    """Return an error in one line."""
    if type(error).__name__ in ("FSTimeoutError", "TimeoutError"):
        return "no answer in time"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _is_refusal(error: Exception) -> bool:
    """Return whether an error says that this user may not, which will be so again."""
    code = getattr(error, "code", None)
    return type(error).__name__ in _REFUSED or str(code) in ("401", "403") or "Forbidden" in str(error)


class Mirror:
    """A workdir that is a folder of this machine and one in a bucket; `close` it at the end.

    Of the first of `count` processes, or of the only one.
    """

    is_remote = True

    def __init__(self, remote: RemoteFolder, folder: Path, *, count: int = 1):
        self.remote, self.folder, self.url, self.count = remote, folder, remote.url, count
        self.run = ""  # what names this start of several processes
        self._uploaded: dict[int, dict[str, list]] = {}  # own files of a checkpoint that waits for others' parts
        self._attempt = 0  # of the saves that failed in one process, and so in all
        self.owned = RemoteFolder(remote.url, waits=(), seconds=2 * BEAT_SECONDS)
        self._known: dict[str, dict] = {}  # objects that are there; of each the local file that it is equal to
        self._token, self._token_before = secrets.token_hex(8), ""  # of this folder's SESSION, of the bucket's at first
        self._has_session = False
        self._error: Exception | None = None  # of the last copy, if that failed
        self._lock = threading.RLock()  # of one copy at a time
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    # What a run asks for.

    def begin(self) -> None:
        """Bring the local folder to what the bucket has, and copy in the background from here on.

        Raises:
          OSError: the bucket cannot be reached or written.
        """
        with self._lock:
            listing = self.remote.list()
            self._adopt(listing)
            self._bring(listing)
            self._delete_gone()  # checkpoints that were not committed
        self._thread = threading.Thread(target=self._work, name="bucket", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the last copy, if a checkpoint waits for it.

        Raises:
          OSError: it is one of the bucket.
        """
        if self._error is not None and (self.is_behind() or not isinstance(self._error, OSError)):
            raise self._error

    def is_behind(self) -> bool:
        """Return whether a checkpoint is complete here, and not in the bucket."""
        return bool(self._waiting())

    def settle(self) -> None:
        """Wait until no checkpoint is behind; raises as `check`."""
        while self.is_behind():
            self.check()
            time.sleep(_POLL_SECONDS / 5)

    def flush(self) -> None:
        """Copy everything now, and return when it is in the bucket.

        Raises:
          OSError: it cannot be.
          StrictError: an earlier copy failed, which is an error by --strict.
        """
        until = time.monotonic() + _OTHERS_SECONDS
        self._purge()
        while True:
            with self._lock:
                missing = self._copy()
            if not missing:
                break
            if time.monotonic() > until:
                raise OSError(
                    f"checkpoint {self._waiting()[0]:,} is not in {self.url}: process {', '.join(map(str, missing))} "
                    "has not uploaded its part"
                )
            time.sleep(_POLL_SECONDS)
        error, self._error = self._error, None
        if isinstance(error, notices.StrictError):
            raise error

    def upload(self) -> None:
        """Upload this process's files of the checkpoints that wait; of several processes, each does before a `flush`.

        Raises:
          OSError: they cannot be.
        """
        self._purge()
        with self._lock:
            for step in self._waiting():
                self._upload_part(step)

    def forget(self, steps: Iterable[int]) -> None:
        """Delete checkpoints that are complete here and not in all processes; what is uploaded of them counts no more.

        All processes call it together.
        """
        with self._lock:
            self._attempt += 1
            for step in steps:
                self._uploaded.pop(step, None)
                shutil.rmtree(self.folder / _CHECKPOINTS / str(step))

    def committed(self) -> list[int]:
        """Return the steps of the checkpoints here that are in the bucket, with the parts of all processes."""
        return [step for step in self._steps() if self._has_commit(step)]

    def upload_rate(self, num_bytes: int) -> float:
        """Return the bytes per second of writing an object of that size, or of 8 MiB if that is less."""
        data, began = os.urandom(min(num_bytes, 8 << 20)), time.monotonic()
        name = f"{_SPEED}-{secrets.token_hex(4)}"
        self.remote.write(name, data)
        rate = len(data) / max(time.monotonic() - began, 1e-6)
        self.remote.delete(name)
        return rate

    def close(self) -> None:
        """Copy what is left, and end the copying in the background.

        Raises:
          OSError: something could not be copied; says what to do.
        """
        self._closed.set()
        if self._thread is None:
            return
        try:
            self.flush()
        except OSError as error:
            kept = f"What is not uploaded is kept in this machine's folder {os.fspath(self.folder)!r}: "
            lost = "The same command goes on from the last checkpoint there"
            raise OSError(
                f"{error}. " + (f"{kept}the same command here goes on with it" if self.count == 1 else lost)
            ) from error
        finally:
            self._thread.join(timeout=5.0)
            self._thread = None
        if set(self._known) == {SESSION}:  # of a run that was refused
            self.remote.delete(SESSION)

    def copy_now(self, folder: str) -> None:
        """Copy the files of a folder of the workdir, once and in little time: the process ends.

        Raises:
          OSError: they cannot be written.
        """
        for path in (self.folder / folder).glob("*"):
            self.owned.upload(path, f"{folder}/{path.name}")

    # The copying.

    def _work(self) -> None:
        wait, at = _POLL_SECONDS, time.monotonic() + FILES_SECONDS
        while not self._closed.wait(wait):
            wait = _POLL_SECONDS
            self._purge()
            if not self._waiting() and time.monotonic() < at:
                continue
            try:
                with self._lock:
                    if self._closed.is_set():
                        return
                    if self._copy():  # another process's part is missing
                        if time.monotonic() < at:
                            continue
                        self._copy_files()
                self._caught_up()
            except Exception as error:  # raised where the run asks for it
                wait = self._failed(error)
            at = time.monotonic() + FILES_SECONDS

    def _purge(self) -> None:
        """Delete the checkpoints that the run has moved away: one deleted in place would look like a new one."""
        for path in (self.folder / _CHECKPOINTS / DELETED).glob("*"):
            shutil.rmtree(path, ignore_errors=True)

    def _failed(self, error: Exception) -> float:
        self._error = error
        wait = FILES_SECONDS / 4
        try:
            notices.report("upload-failed", f"{error}; the run goes on, and it is tried again in {wait:.0f} s")
        except notices.StrictError as strict:
            self._error = strict
        return wait

    def _caught_up(self) -> None:
        if isinstance(self._error, OSError):
            notices.report("upload-caught-up", f"{self.url} has all of the run's files again")
            self._error = None

    def _copy(self) -> list[int]:
        """Copy everything; return the processes whose parts are missing of a checkpoint, for which all else waits."""
        self._copy_moved()  # before there is a new checkpoint of that step
        for step in self._waiting():
            if missing := self._copy_checkpoint(step):
                return missing
        self._copy_files()
        self._delete_gone()
        write_atomically(self.folder / _SYNCED, json.dumps(self._known))
        return []

    def _steps(self) -> list[int]:
        folder = self.folder / _CHECKPOINTS
        names = os.listdir(folder) if folder.is_dir() else ()
        return sorted(int(name) for name in names if name.isdecimal())

    def _has_commit(self, step: int) -> bool:
        return (self.folder / _CHECKPOINTS / str(step) / COMMIT).is_file()

    def _waiting(self) -> list[int]:
        """Return the steps of checkpoints that are complete here, and not in the bucket."""
        return [step for step in self._steps() if not (self.folder / _CHECKPOINTS / str(step) / ORIGIN).is_file()]

    def _copy_checkpoint(self, step: int) -> list[int]:
        """Copy a checkpoint; return the processes whose parts are missing, without which it has no COMMIT yet."""
        base = f"{_CHECKPOINTS}/{step}"
        folder = self.folder / base
        self._write_session()
        if f"{base}/{COMMIT}" in self._known:  # of an earlier one of this step
            self._delete(f"{base}/{COMMIT}")
        self._upload_part(step)
        parts = self._parts_of_others(step)
        if missing := [index for index in range(1, self.count) if index not in parts]:
            return missing
        files = self._uploaded.pop(step)
        for part in parts.values():
            files |= part
        self._copy_files()  # the metrics up to this step
        commit = json.dumps({"written": folder.stat().st_mtime, "files": files})
        self.remote.write(f"{base}/{COMMIT}", commit.encode())
        self._known |= {f"{base}/{name}": {} for name in (COMMIT, *files)}
        write_atomically(folder / COMMIT, commit)
        write_atomically(folder / ORIGIN, f"{self.url}/{base}")
        for name in [name for name in self._known if name.startswith(f"{base}/")]:
            if name.removeprefix(f"{base}/") not in (COMMIT, *files):
                self._delete(name)
        for index in parts:
            self.remote.delete(f"{base}/{self._part_name(step, index)}")
        self._free(before=step)
        return []

    def _upload_part(self, step: int) -> None:
        """Upload a checkpoint's files; of several processes, those of the first one's part."""
        if step not in self._uploaded:
            files = self._upload(step, lambda name: "" if self.count > 1 and name.startswith(_JOINED) else name)
            self._known |= {f"{_CHECKPOINTS}/{step}/{name}": {} for name in files}
            self._uploaded[step] = files

    def _upload(self, step: int, name_there: Callable[[str], str]) -> dict[str, list]:
        """Upload files of a checkpoint under their names there, if they have one; return size and hash by these."""
        base = f"{_CHECKPOINTS}/{step}"
        folder = self.folder / base
        names = [
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".") and path.name != COMMIT
        ]

        def upload(name: str) -> tuple[str, list]:
            path = folder / name
            facts = [path.stat().st_size, hash_file(path)]
            self.remote.upload(path, f"{base}/{name_there(name)}")
            return name_there(name), facts

        return dict(_in_threads(upload, [name for name in names if name_there(name)]))

    def _parts_of_others(self, step: int) -> dict[int, dict[str, list]]:
        """Return size and hash of each file by its name, by process, of the parts of a checkpoint in the bucket."""

        def read(index: int) -> tuple[int, dict]:
            try:
                return index, _parse(self.remote.read(f"{_CHECKPOINTS}/{step}/{self._part_name(step, index)}"))
            except FileNotFoundError:
                return index, {}

        parts = _in_threads(read, range(1, self.count))
        return {index: part["files"] for index, part in parts if part}

    def _identity(self, step: int) -> str:
        """Return what tells a save from any other of that step: the start, its attempt, the hashes of the arrays."""
        digests = hash_file(self.folder / _CHECKPOINTS / str(step) / _DIGESTS)
        return hash_json([self.run, self._attempt, digests])[:16]

    def _part_name(self, step: int, index: int) -> str:
        """Return the name, in a checkpoint, of the object that a process writes when its part is uploaded."""
        return f"part.{index}.{self._identity(step)}.json"

    def _free(self, *, before: int) -> None:
        """Delete the local arrays of earlier checkpoints that are in the bucket."""
        for step in self._steps():
            if step < before and self._has_commit(step):
                shutil.rmtree(self.folder / _CHECKPOINTS / str(step) / _STATE, ignore_errors=True)

    def _copy_moved(self) -> None:
        """Copy the checkpoints that were set aside from where they were in the bucket to where they are now."""
        places = (f"replaced/[!.]*/checkpoints/*/{ORIGIN}", f"damaged/*/{ORIGIN}")
        for origin in [path for place in places for path in self.folder.glob(place)]:
            base = origin.parent.relative_to(self.folder).as_posix()
            before = origin.read_text(encoding="utf-8").removeprefix(f"{self.url}/")
            if before == base or not (origin.parent / COMMIT).is_file():
                continue
            commit = (origin.parent / COMMIT).read_bytes()
            names = parse_json_object(commit, name=origin.parent / COMMIT)["files"]

            def copy(name: str, before: str = before, base: str = base) -> None:
                with contextlib.suppress(FileNotFoundError):  # which may be what is damaged
                    self.remote.copy(f"{before}/{name}", f"{base}/{name}")

            _in_threads(copy, names)
            self.remote.write(f"{base}/{COMMIT}", commit)
            self._known |= {f"{base}/{name}": {} for name in (COMMIT, *names)}
            write_atomically(origin, f"{self.url}/{base}")

    def _copy_files(self) -> None:
        """Copy the files beside the checkpoints that have changed, in the order of the changes."""
        changed = []
        for name, path in self._local_files():
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if self._known.get(name, {}).get("local") != (facts := _facts(path)):
                    changed.append((path.name in _LAST_NAMES, facts[1], name, path, facts))
        for _, _, name, path, facts in sorted(changed):
            self._write_session()
            try:
                if facts[0] > _IN_MEMORY:
                    self.remote.upload(path, name)
                else:
                    data = path.read_bytes()
                    self.remote.write(name, data[: data.rfind(b"\n") + 1] if path.suffix == ".jsonl" else data)
            except FileNotFoundError:
                continue
            self._known[name] = {"local": facts}

    def _local_files(self) -> Iterator[tuple[str, Path]]:
        """Yield (name, path) of the files that are copied beside checkpoints."""
        for at, folders, files in os.walk(self.folder):
            root = Path(at)
            if ORIGIN in files or root == self.folder / _CHECKPOINTS:
                folders.clear()
                continue
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = root / name
                if not name.startswith(".") and not (root == self.folder and name == OWNER_FILE) and path.is_file():
                    yield path.relative_to(self.folder).as_posix(), path

    def _delete_gone(self) -> None:
        """Delete the objects of files and checkpoints that are not here any more, each checkpoint's COMMIT first."""
        here = {name for name, _ in self._local_files()}
        bases = {f"{_CHECKPOINTS}/{step}" for step in self._steps()}
        for at in [Path(at) for at, _, files in os.walk(self.folder) if ORIGIN in files]:
            bases.add(at.relative_to(self.folder).as_posix())
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                # Of one that was set aside and is not copied yet: where it is in the bucket.
                bases.add((at / ORIGIN).read_text(encoding="utf-8").removeprefix(f"{self.url}/"))
        kept = tuple(f"{base}/" for base in bases)
        gone = [name for name in self._known if name not in here and not name.startswith(kept) and not _is_others(name)]
        for name in sorted(gone, key=lambda name: not name.endswith(f"/{COMMIT}")):
            self._delete(name)

    def _delete(self, name: str) -> None:
        self.remote.delete(name)
        self._known.pop(name, None)

    # The beginning.

    def check_writable(self) -> None:
        """Write an object, to see that this works.

        Raises:
          OSError: it does not.
        """
        probe = f"{_PROBE}{secrets.token_hex(4)}"
        try:
            self.remote.write(probe, b"")
            self.remote.delete(probe)
        except OSError as error:
            raise OSError(f"workdir {self.url} cannot be written: {error}; choose another --workdir") from error

    def _adopt(self, listing: dict[str, list]) -> None:
        """Commit checkpoints that were copied to the bucket by other means, of which no run has written there."""
        if SESSION in listing:
            return
        for base, files in _uncommitted(listing).items():
            commit = json.dumps({"written": time.time(), "files": files})
            self.remote.write(f"{base}/{COMMIT}", commit.encode())
            listing[f"{base}/{COMMIT}"] = [len(commit)]

    def _bring(self, listing: dict[str, list]) -> None:
        """Make the local folder what the bucket has, unless it is the one that wrote last."""
        if self.count > 1:  # what the next start would find here is a part
            (self.folder / SESSION).unlink(missing_ok=True)
        synced = _read_json(self.folder / _SYNCED)
        session = _read_json(self.folder / SESSION)
        last = (_parse(self.remote.read(SESSION)).get("token") if SESSION in listing else "") or ""
        self._token_before = last
        if session.get("boot") == _boot() and last in (session["token"], session.get("token_before")):
            self._has_session = last == session["token"]
            ours = {*synced, *(name for name, _ in self._local_files())}  # others may have put theirs there
            self._known = {
                name: synced.get(name, {})
                for name in listing
                if name in ours or name.startswith((f"{_CHECKPOINTS}/", "."))
            }
            for step in self._steps():  # those that btlm checkpoints --prune has deleted in the bucket
                if f"{_CHECKPOINTS}/{step}/{COMMIT}" not in listing and step not in self._waiting():
                    shutil.rmtree(self.folder / _CHECKPOINTS / str(step))
        else:
            self._drop()
            (self.folder / SESSION).unlink(missing_ok=True)
            self._known = pull(self.remote, self.folder, listing, is_wanted=lambda name: True)
            _settle_moves(self.folder)
        self._known = {name: facts for name, facts in self._known.items() if name != OWNER_FILE}

    def _drop(self) -> None:
        """Delete checkpoints that an earlier run could not upload."""
        why = "another command has written there since, or this machine was started anew"
        why = why if self.count == 1 else "a run of several processes goes on from what is there"
        for step in self._waiting():
            said = f"checkpoint {step:,} is on this machine and not in {self.url}, and is dropped: {why}"
            notices.report("not-uploaded", said)
            shutil.rmtree(self.folder / _CHECKPOINTS / str(step))

    def _write_session(self) -> None:
        """Say that this folder is the one that writes, before it first does."""
        if self._has_session:
            return
        session = {"token": self._token, "boot": _boot() if self.count == 1 else "that of several processes"}
        # Should the bucket not take it: with the token that it has, by which the next start knows this folder.
        write_atomically(self.folder / SESSION, json.dumps(session | {"token_before": self._token_before}))
        self.remote.write(SESSION, json.dumps({"token": self._token}).encode())
        write_atomically(self.folder / SESSION, json.dumps(session))
        self._known[SESSION] = {}
        self._has_session = True


class PartMirror(Mirror):
    """The workdir of a run in a bucket, in a process other than the first: its part of checkpoints is uploaded."""

    def __init__(self, remote: RemoteFolder, folder: Path, *, index: int, count: int):
        super().__init__(remote, folder, count=count)
        self._index = index

    def _bring(self, listing: dict[str, list]) -> None:
        self._drop()
        pull(self.remote, self.folder, listing, is_wanted=lambda name: True)
        _settle_moves(self.folder)

    def _adopt(self, listing: dict[str, list]) -> None:
        """Do nothing: the first process has done so."""

    def _copy(self) -> list[int]:
        self.upload()
        return []

    def _upload_part(self, step: int) -> None:
        base, own = f"{_CHECKPOINTS}/{step}", f"{_PROCESS}{self._index}"
        there = f"{own}.{self._identity(step)}"
        files = self._upload(step, lambda name: name.replace(own, there) if name.startswith(f"{own}/") else "")
        self.remote.write(f"{base}/{self._part_name(step, self._index)}", json.dumps({"files": files}).encode())
        write_atomically(self.folder / base / ORIGIN, f"{self.url}/{base}")
        for earlier in [each for each in self._steps() if each < step]:  # all are in the bucket before a save
            shutil.rmtree(self.folder / _CHECKPOINTS / str(earlier) / _STATE, ignore_errors=True)

    def _copy_files(self) -> None:
        """Do nothing: the first process does so."""

    def _delete_gone(self) -> None:
        """Do nothing: the first process does so."""


def pull(
    remote: RemoteFolder, folder: Path, listing: dict[str, list], *, is_wanted: Callable[[str], bool]
) -> dict[str, dict]:
    """Make a folder what the bucket has of the wanted names, of checkpoints all but the arrays.

    Return, of each object, what of the local folder it is equal to. A file that is as in the bucket is not read again.

    Raises:
      OSError: the bucket cannot be reached, or the folder not be written.
    """
    synced = _read_json(folder / _SYNCED)
    commits, open_ones = {}, _uncommitted(listing)
    for base in [name.removesuffix(f"/{COMMIT}") for name in listing if name.endswith(f"/{COMMIT}")]:
        try:
            commits[base] = remote.read(f"{base}/{COMMIT}")
        except FileNotFoundError:  # the run has begun to delete it since
            open_ones[base] = {}
    if SESSION not in listing:  # no run has written here: what lies there was copied, and is taken for whole
        commits |= {base: json.dumps({"written": 0.0, "files": files}).encode() for base, files in open_ones.items()}
        open_ones = {}
    stubs = tuple(f"{base}/{_STATE}" for base in commits)
    left_out = tuple(f"{base}/" for base in open_ones)
    chosen = [
        name
        for name in listing
        if is_wanted(name) and not name.startswith((*stubs, *left_out, ".")) and not name.endswith(f"/{COMMIT}")
    ]
    same = tuple(f"{base}/{_STATE}" for base, commit in commits.items() if _text(folder / base / COMMIT) == commit)
    kept = {*chosen, _SYNCED}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        name = path.relative_to(folder).as_posix()
        if name not in kept and not name.startswith(same):
            path.unlink()

    def fetch_one(name: str) -> tuple[str, dict]:
        path, before = folder / name, synced.get(name, {})
        if before.get("remote") != listing[name] or not path.is_file() or before.get("local") != _facts(path):
            try:
                remote.download(name, path, num_bytes=listing[name][0])
            except FileNotFoundError:  # deleted since
                path.unlink(missing_ok=True)
                return name, {}
            if seconds := remote.times.get(name):
                os.utime(path, (seconds, seconds))
        return name, {"remote": listing[name], "local": _facts(path)}

    known: dict[str, dict] = {name: {} for name in listing} | dict(_in_threads(fetch_one, chosen))
    for base, commit in commits.items():
        if not is_wanted(f"{base}/{COMMIT}"):
            continue
        place = folder / base
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / COMMIT, commit)
        write_atomically(place / ORIGIN, f"{remote.url}/{base}")
        _as_written(place)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # it is not empty
            path.rmdir()
    write_atomically(folder / _SYNCED, json.dumps(known))
    return known


def _settle_moves(folder: Path) -> None:
    """Delete one of the two of each checkpoint that a kill has left both at its place and set aside.

    They are copied one after another, then the files beside them, and only then deleted where they were: without such
    a file the copies are not all there, and the command that goes back begins anew.
    """
    for target in folder.glob("replaced/*"):
        commits = {folder / _CHECKPOINTS / path.name: _text(path / COMMIT) for path in target.glob(f"{_CHECKPOINTS}/*")}
        both = [original for original, commit in commits.items() if commit and commit == _text(original / COMMIT)]
        if any(path.is_file() for path in target.iterdir()):
            for original in both:
                shutil.rmtree(original)
        elif all(original in both or (original / COMMIT).is_file() and not commits[original] for original in commits):
            shutil.rmtree(target)


def fetch(folder: Path) -> int:
    """Fetch what a local folder of a checkpoint in a bucket lacks of it; return how many files that were.

    Raises:
      ValueError: a file is gone, or is not as it was committed; or a name that was committed is no path of a file.
      OSError: the bucket cannot be reached.
    """
    remote = RemoteFolder((folder / ORIGIN).read_text(encoding="utf-8"))
    if not (folder / COMMIT).is_file():  # this process has uploaded a part of it
        try:
            write_atomically(folder / COMMIT, remote.read(COMMIT))
        except FileNotFoundError as error:
            raise ValueError(f"{COMMIT} is gone") from error
    files = parse_json_object((folder / COMMIT).read_bytes(), name=f"{remote.url}/{COMMIT}")["files"]
    location.check_names(files, root=remote.url)
    missing = [name for name, (size, _) in files.items() if _size(folder / name) != size]

    def fetch_one(name: str) -> None:
        size, digest = files[name]
        path = folder / name
        try:
            remote.download(name, path, num_bytes=size)
        except FileNotFoundError as error:
            raise ValueError(f"{name} is gone") from error
        if path.stat().st_size != size or digest not in ("", hash_file(path)):
            path.unlink()
            raise ValueError(f"{name} is not as it was written")

    _in_threads(fetch_one, missing)
    join_databases(folder, files)
    _as_written(folder)
    return len(missing)


def join_databases(folder: Path, files: Iterable[str]) -> None:
    """Make the database of all arrays of a checkpoint, where it has only one of each process among its `files`.

    Raises:
      ValueError: one cannot be read.
    """
    databases = {name.removeprefix(_STATE).partition("/")[0] for name in files if name.startswith(_PROCESS)}
    if _JOINED[0] not in files and databases:
        _join_databases(folder / _STATE, sorted(databases))


def _join_databases(state: Path, names: list[str]) -> None:
    """Make one database of those of a checkpoint's processes; it names their files, and copies no array.

    Source: `merge_ocdbt_per_process_files` of orbax, which does so at the end of a save to a folder that all share.

    Raises:
      ValueError: one cannot be read.
    """
    if (state / _IS_JOINED).is_file():
        return
    import tensorstore as ts

    for name in _JOINED:  # of one process alone, or of a kill here
        path = state.parent / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    context = ts.Context()

    def opened(path: Path) -> ts.KvStore:
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{os.fspath(path)}/"}}
        return ts.KvStore.open(spec, context=context).result()

    whole, transaction = opened(state), ts.Transaction(atomic=True)
    for name in names:
        opened(state / name).experimental_copy_range_to(whole.with_transaction(transaction)).result()
    transaction.commit_async().result()
    write_atomically(state / _IS_JOINED, "")


def num_bytes_of(folder: Path) -> int:
    """Return how large a checkpoint in a bucket is."""
    commit = parse_json_object((folder / COMMIT).read_bytes(), name=folder / COMMIT)
    return sum(size for size, _ in commit["files"].values())


def release(folder: Path) -> None:
    """Delete the local arrays of a checkpoint that was fetched."""
    shutil.rmtree(folder / _STATE, ignore_errors=True)
    _as_written(folder)


def _as_written(folder: Path) -> None:
    """Give a local folder of a checkpoint the time at which the checkpoint was written."""
    seconds = _read_json(folder / COMMIT).get("written") or time.time()
    os.utime(folder, (seconds, seconds))


@contextlib.contextmanager
def opened_for_run(url: str, *, index: int = 0, count: int = 1) -> Iterator[Mirror]:
    """Yield the workdir of a run in a bucket, in one of its processes, which has to `begin` and to `close`.

    All but the first process begin when the first one has.

    Raises:
      OSError: the bucket cannot be reached or written.
    """
    with local_folder(url, role=f"run-process-{index}" if index else "run") as folder:
        remote = RemoteFolder(url)
        mirror = PartMirror(remote, folder, index=index, count=count) if index else Mirror(remote, folder, count=count)
        mirror.check_writable()
        location.add_mirror(mirror)
        notices.call_it(folder, mirror.url)
        yield mirror


_kept_open = contextlib.ExitStack()  # folders that this process reads until it ends


def open_for_reading(url: str, *, may_be_new: bool = False) -> Path:
    """Return a local folder with what the bucket has of a run or a model, arrays of checkpoints not yet.

    Each file has the time at which it was written to the bucket.

    Raises:
      FileNotFoundError: there is nothing, and it may not be a new one.
      OSError: the bucket cannot be reached.
    """
    if not may_be_new and not RemoteFolder(url).list():
        raise FileNotFoundError(f"there is nothing in {url}")
    folder = _kept_open.enter_context(local_folder(url, role="reader"))
    notices.call_it(folder, url.rstrip("/"))
    read_again(url, folder)
    return folder


def read_again(url: str, folder: Path) -> None:
    """Bring a folder of `open_for_reading` to what the bucket has now; raises as it does."""
    remote = RemoteFolder(url)
    pull(remote, folder, remote.list(), is_wanted=lambda name: not name.startswith(_NOT_FOR_READERS))


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint in a bucket, and its local folder."""
    remote = RemoteFolder((folder / ORIGIN).read_text(encoding="utf-8"))
    remote.delete(COMMIT)
    for name in remote.list():
        remote.delete(name)
    shutil.rmtree(folder)


def check_is_new(url: str) -> None:
    """Check that nothing is behind a URL.

    Raises:
      ValueError: something is.
    """
    if RemoteFolder(url).list():
        raise ValueError(f"{url} exists; give the name of a new folder")


def upload_run(folder: Path, url: str) -> None:
    """Copy a local workdir to a bucket where nothing is; it gets this module's files.

    Raises:
      OSError: it cannot be written.
    """
    mirror = Mirror(RemoteFolder(url), folder)
    mirror.check_writable()
    mirror.flush()


@contextlib.contextmanager
def local_folder(url: str, *, role: str) -> Iterator[Path]:
    """Yield the local folder of a URL, which no other process uses meanwhile."""
    staging = os.environ.get(STAGING_VARIABLE)
    root = (Path(staging) if staging else cache_directory() / "workdirs").resolve()
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rstrip("/").rpartition("/")[2]) or "bucket"
    name = f"{last[:60]}-{hash_json(url.rstrip('/'))[:8]}-{role}"
    root.mkdir(parents=True, exist_ok=True)
    for number in range(100):
        place = root / (f"{name}-{number}" if number else name)
        lock = exclusive_lock(place.with_name(f"{place.name}.lock"), message="")
        with contextlib.suppress(FileExistsError):
            lock.__enter__()
            break
    else:
        raise OSError(f"100 folders of {url} are in use in {root}")
    try:
        folder = place / last  # a run has the name of its workdir in trackers
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        lock.__exit__(None, None, None)


def _is_others(name: str) -> bool:
    """Return whether an object is one that no run writes or deletes: hidden, or beside the checkpoints."""
    folder, _, rest = name.partition("/")
    if folder == _CHECKPOINTS:
        return not rest.partition("/")[0].isdecimal()
    return "/." in f"/{name}" and not name.startswith((_SPEED, _PROBE))


def _in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def _uncommitted(listing: dict[str, list]) -> dict[str, dict[str, list]]:
    """Return the folders of checkpoints without COMMIT, and of each its files as a COMMIT has them, without hashes."""
    found: dict[str, dict[str, list]] = {}
    for name, (size, *_) in listing.items():
        parts = name.split("/")
        if parts[0] == _CHECKPOINTS and len(parts) > 2 and parts[1].isdecimal():
            found.setdefault("/".join(parts[:2]), {})["/".join(parts[2:])] = [size, ""]
    return {base: files for base, files in found.items() if COMMIT not in files}


def _facts(path: Path) -> list[int]:
    """Return what changes when a local file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _text(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _read_json(path: Path) -> dict:
    """Return the JSON object in a file of the local folder, an empty one where there is none: it says nothing then."""
    return _parse(_text(path))


def _parse(contents: bytes) -> dict:
    with contextlib.suppress(ValueError):
        return parse_json_object(contents, name="")
    return {}


def _boot() -> str:
    """Return what names this start of the machine: what a crash of it left in a local folder is not trusted."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""
