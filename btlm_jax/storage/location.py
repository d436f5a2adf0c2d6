"""Read from a local path or from a URL that fsspec opens, such as gs://bucket/folder or s3://bucket/file.

Knows nothing of what the files contain. Credentials and endpoints are configured for fsspec and its libraries, by
environment variables such as FSSPEC_S3_ANON or by their configuration files. Beside bucket.py, which writes there, the
only importer of fsspec.
"""

from __future__ import annotations

import contextlib
import datetime
import glob
import hashlib
import logging
import math
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import fsspec
import fsspec.core

from btlm_jax import install_command, notices

PathOrUrl = Path | str  # str: a URL

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # of setup.cfg
_LOGGERS = ("fsspec", "gcsfs", "s3fs")  # of libraries that print a traceback with what they also raise
_VERSION_KEYS = (
    *("etag", "ETag", "generation", "md5Hash", "LastModified", "mtime", "updated", "created"),
    *("Content-MD5", "Digest", "Last-Modified"),  # of HTTP
)
_TIME_KEYS = ("mtime", "LastModified", "updated", "last_modified")
_CHUNK_BYTES = 1 << 20
ORIGIN = ".origin"  # in the local folder of a checkpoint in a bucket: its URL there
DELETED = ".deleted"  # in the local folder of checkpoints of a run in a bucket: those that are being deleted
_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each further attempt


class Mirror(Protocol):
    """Where what a run writes to its workdir is copied: to nowhere, or as bucket.py does it."""

    url: str
    folder: Path
    is_remote: bool
    owned: Any  # where the file of the owner is, if not in the workdir: an owner.Bucket
    run: str  # what names this start of several processes in a bucket

    def begin(self) -> None: ...
    def close(self) -> None: ...
    def check(self) -> None: ...
    def is_behind(self) -> bool: ...
    def settle(self) -> None: ...
    def flush(self) -> None: ...
    def upload_rate(self, num_bytes: int) -> float: ...
    def copy_now(self, folder: str) -> None: ...
    def upload(self) -> None: ...
    def forget(self, steps: Iterable[int]) -> None: ...
    def committed(self) -> list[int]: ...


class NoMirror:
    """Of a workdir that is a folder."""

    url, folder, is_remote, owned, run = "", Path(), False, None, ""

    def check(self) -> None:
        """Do nothing, as the others."""

    begin = close = settle = flush = upload = check

    def is_behind(self) -> bool:
        return False

    def upload_rate(self, num_bytes: int) -> float:
        del num_bytes
        return math.inf

    def copy_now(self, folder: str) -> None:
        del folder

    def forget(self, steps: Iterable[int]) -> None:
        del steps

    def committed(self) -> list[int]:
        return []


_mirrors: dict[Path, Mirror] = {}


def add_mirror(mirror: Mirror) -> None:
    """Have `mirror_of` return it from here on."""
    _mirrors[mirror.folder] = mirror


def mirror_of(workdir: Path) -> Mirror:
    """Return what copies a run's workdir to where it belongs."""
    return _mirrors.get(workdir) or NoMirror()


def parse_location(text: str) -> PathOrUrl:
    """Return a URL as it is and anything else as a path; a leading ~ is the home directory."""
    return text if "://" in text else Path(os.path.expanduser(text))


def expand_pattern(text: str) -> list[PathOrUrl]:
    """Return what a pattern with *, ? or [...] matches (of a URL: with *), in order; any other text as one location.

    `**` matches folders of any depth.

    Raises:
      FileNotFoundError: nothing matches.
      OSError: the URL cannot be reached.
    """
    location = parse_location(text)
    if isinstance(location, Path):
        if location.exists() or not glob.has_magic(text):
            return [location]
        matches = sorted(map(Path, glob.glob(str(location), recursive=True)))
    elif "*" not in location:
        return [location]
    else:
        with _plain_errors(location):
            system, path = _file_system(location)
            found = [match for match in system.glob(path) if not (_is_http(location) and _leads_away(match))]
            matches = sorted(map(system.unstrip_protocol, found))
    if not matches:
        raise FileNotFoundError(f"nothing matches {text}")
    return list(matches)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def resolve_location(folder: Path, text: str) -> PathOrUrl:
    """Return a URL as it is and anything else as a path, which starts at `folder` if it is relative."""
    return text if "://" in text else folder / os.path.expanduser(text)


def absolute_location(text: str) -> str:
    """Return a path as an absolute one, and a URL as it is."""
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def is_absolute(text: str) -> bool:
    """Return whether `resolve_location` of the text does not depend on the folder."""
    return "://" in text or os.path.isabs(os.path.expanduser(text))


def join_location(folder: PathOrUrl, name: str) -> PathOrUrl:
    """Return the location of a file in a folder."""
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def list_sizes(folder: PathOrUrl, names: Iterable[str]) -> dict[str, int]:
    """Return the bytes of those of the named files that are directly in a folder; nothing if there is no such folder.

    Raises:
      OSError: the location cannot be reached.
    """
    if isinstance(folder, Path):
        paths = folder.iterdir() if folder.is_dir() else ()
        wanted = set(names)
        return {path.name: path.stat().st_size for path in paths if path.name in wanted and path.is_file()}
    try:
        with _plain_errors(folder):
            system, path = _file_system(folder)
            system.invalidate_cache()
            infos = system.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    found = {info["name"].rsplit("/", 1)[-1]: info.get("size") for info in infos if info["type"] == "file"}
    listed = [(name, join_location(folder, name), found[name]) for name in names if name in found]
    return {name: size for name, _, size in with_sizes(listed)}


def check_names(names: Iterable[str], *, root: str) -> None:
    """Check that names of what lies behind a URL are paths below a folder, so that they can be written below another.

    Raises:
      ValueError: one is absolute or empty, or has an empty part, "." or "..".
    """
    for name in names:
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(
                f"{root}/{name} is not read: {name!r} is no path of a file below a folder, as a part of it is empty, "
                '"." or ".."; move it away, or rename it, and give the command again'
            )


def read_bytes(location: PathOrUrl) -> bytes:
    """Return the contents of a file.

    Raises:
      OSError: it cannot be read.
    """
    with open_binary(location) as file:
        return file.read()


def list_files(
    root: PathOrUrl, *, left_out: Callable[[str, Collection[str]], str]
) -> list[tuple[str, PathOrUrl, int | None]]:
    """Return (name relative to root, location, bytes) of every file below a folder, or of a single file, by name.

    Of HTTP the bytes are None, which `with_sizes` asks for: a server's page of a folder does not say them.
    `left_out` takes the name of a file or folder and all names beside it, and returns why it is left out, "" if it is
    not; a notice says so. Links are followed, each real folder read once; what cannot be read is named by a notice.

    Raises:
      FileNotFoundError: there is no file.
      OSError: the location cannot be reached.
    """
    if isinstance(root, Path):
        if root.is_file():
            return [(_printable(root.name), root, root.stat().st_size)]
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is neither a file nor a folder")
        return sorted(_walk(root, left_out), key=lambda file: file[0])
    why, files = "", []
    with _plain_errors(root):
        system, path = _file_system(root)
        infos = system.find(path, detail=True)  # of a file: itself
        base = path.rstrip("/")
        if not infos:
            try:
                system.info(path)  # what cannot be reached is an error here, and only there, for some systems
            except FileNotFoundError as error:
                cause = error.__cause__  # HTTP: no answer is no file, too
                why = f": {type(cause).__name__}: {cause}" if cause is not None else ""
        found = files_below(infos, path) | ({base.rsplit("/", 1)[-1]: (base, infos[base])} if base in infos else {})
        files = [(name, system.unstrip_protocol(at), info.get("size")) for name, (at, info) in found.items()]
    if not files:
        raise FileNotFoundError(f"{root} holds no file, or is none{why}")
    if len(files) > 1 or base not in infos:
        files = _without_left_out(root, files, left_out)
    return sorted(files)


def files_below(infos: dict[str, dict[str, Any]], path: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (path, what is known) of each file below a path, by name relative to it, of what fsspec's `find` returns.

    Of a page of links by HTTP that is what lies below the page, without the links that sort it.
    """
    base = path.rstrip("/") + "/"
    found = {
        at.removeprefix(base): (at, info)
        for at, info in infos.items()
        if at.startswith(base) and info.get("type") == "file" and not at.endswith("/")
    }
    return {name: file for name, file in found.items() if not (_is_http(path) and _leads_away(name))}


def _leads_away(link: str) -> bool:
    """Return whether a link of a page is none to a file below it: `?C=N;O=D` of Apache's lists, `#top`, `../x`."""
    return link.rsplit("/", 1)[-1].startswith(("?", "#")) or ".." in link.split("/")


def with_sizes(files: Iterable[tuple[str, PathOrUrl, int | None]]) -> list[tuple[str, PathOrUrl, int]]:
    """Return files of `list_files` with the bytes of all, for which the server is asked where they are None.

    Raises:
      OSError: the server does not say them, or cannot be reached.
    """
    return [(name, at, _ask_size(str(at)) if size is None else size) for name, at, size in files]


def _ask_size(url: str) -> int:
    with _plain_errors(url):
        system, path = _file_system(url)
        return _size_of(system.info(path), url=url)


def _walk(root: Path, left_out: Callable[[str, Collection[str]], str]) -> Iterator[tuple[str, Path, int]]:
    """Yield the files below a folder; folders behind links come last, so that a folder is read under its own name."""
    folders, behind_links, seen = [root], [], set()
    while folders or behind_links:
        folder = folders.pop() if folders else behind_links.pop(0)
        try:
            status = folder.stat()
            entries = [(entry, _kind(entry)) for entry in sorted(folder.iterdir())]
        except PermissionError as error:
            if folder == root:
                raise
            notices.report("not-readable", f"{folder} cannot be read and is left out: {error.strerror}")
            continue
        if (status.st_dev, status.st_ino) in seen:
            notices.report("folder-read-once", f"{folder} leads to a folder that is read already under another name")
            continue
        seen.add((status.st_dev, status.st_ino))
        names = {entry.name for entry, _ in entries}
        for entry, kind in entries:
            if why := left_out(entry.name, names):
                notices.report("left-out", f"{entry} is not read: {why}")
            elif not kind:
                notices.report("not-readable", f"{entry} is left out: it cannot be reached, or links to nothing")
            elif stat.S_ISDIR(kind):
                (behind_links if entry.is_symlink() else folders).append(entry)
            elif stat.S_ISREG(kind):
                yield _printable(entry.relative_to(root).as_posix()), entry, entry.stat().st_size


def _kind(path: Path) -> int:
    """Return the mode of a file, behind links; 0 if it cannot be reached."""
    try:
        return path.stat().st_mode
    except OSError:  # not there, a link to itself, a folder above it without permission
        return 0


def _without_left_out(
    root: str, files: list[tuple[str, str, int | None]], left_out: Callable[[str, Collection[str]], str]
) -> list[tuple[str, str, int | None]]:
    """Return the files of which no part of the name is left out; say once what is left out."""
    names_in: dict[str, set[str]] = {}
    for name, _, _ in files:
        for folder, part in _parts(name):
            names_in.setdefault(folder, set()).add(part)
    kept, said = [], set()
    for file in files:
        for folder, part in _parts(file[0]):
            if why := left_out(part, names_in[folder]):
                if (folder, part) not in said:
                    place = join_location(join_location(root, folder) if folder else root, part)
                    notices.report("left-out", f"{place} is not read: {why}")
                said.add((folder, part))
                break
        else:
            kept.append(file)
    return kept


def _parts(name: str) -> list[tuple[str, str]]:
    """Return (folder, name in it) of a file and of every folder above it, from the top."""
    parts = name.split("/")
    return [("/".join(parts[:depth]), part) for depth, part in enumerate(parts)]


def _printable(name: str) -> str:
    """Return a file's name as text; bytes of it that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def version_stamp(location: PathOrUrl) -> list:
    """Return values that change when a file is replaced: its size, and its modification time or the store's version."""
    if isinstance(location, Path):
        status = location.stat()
        return [status.st_size, status.st_mtime_ns]
    with _plain_errors(location):
        system, path = _file_system(location)
        system.invalidate_cache()  # of directory listings, which may be outdated
        return stamp_of(system.info(path))


def stamp_of(info: dict[str, Any]) -> list:
    """Return `version_stamp` of what fsspec says of a file.

    Raises:
      OSError: it does not say its size.
    """
    return [
        _size_of(info, url=info.get("name", "")),
        *(str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None),
    ]


def _size_of(info: dict[str, Any], *, url: str) -> int:
    """Return the bytes of a file by what fsspec says of it, which is what a server says.

    Raises:
      OSError: it does not say them.
    """
    if info.get("size") is None:
        raise OSError(f"{url}: its server does not say how long it is; download it, and give the file")
    return info["size"]


def time_of(info: dict[str, Any]) -> float:
    """Return when a file was written, by what fsspec says of it, in seconds since 1970; 0 where that is not known."""
    for key in _TIME_KEYS:
        if isinstance(info.get(key), datetime.datetime):
            return info[key].timestamp()
    return 0.0


def open_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the URL's path in it.

    Raises:
      ValueError: no installed library opens URLs of this kind.
    """
    with _plain_errors(url):
        return _file_system(url)


@contextlib.contextmanager
def open_binary(location: PathOrUrl) -> Iterator[BinaryIO]:
    """Open a file for reading; close it at the end of the block."""
    if isinstance(location, Path):
        with open(location, "rb") as file:
            yield file
    else:
        with _plain_errors(location):
            system, path = _file_system(location)
            with system.open(path, "rb") as file:
                yield cast(BinaryIO, file)


def hash_range(location: PathOrUrl, *, begin: int, num_bytes: int, copy_to: BinaryIO | None) -> str:
    """Return the sha256 of `num_bytes` of a file from `begin` on; if `copy_to` is given, write them to it as well.

    Raises:
      OSError: the file ends before that.
    """
    digest, num_left = hashlib.sha256(), num_bytes
    with open_binary(location) as file:
        file.seek(begin)
        while num_left and (data := file.read(min(num_left, _CHUNK_BYTES))):
            digest.update(data)
            num_left -= len(data)
            if copy_to is not None:
                copy_to.write(data)
    if num_left:
        raise OSError(f"{location} ended {num_left:,} bytes before it should")
    return digest.hexdigest()


class ByteRange(NamedTuple):
    """A range of a file's bytes."""

    file: str  # relative to the folder that is read
    begin: int
    end: int


class RangeReader:
    """Read byte ranges of the files in a folder behind a URL; safe to use from many threads."""

    def __init__(self, folder: str):
        """Prepare for reading; nothing is requested yet.

        Raises:
          ValueError: no installed library opens URLs of this kind.
        """
        self._folder = folder
        with _plain_errors(folder):
            self._system, _ = _file_system(folder)

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Return the bytes of each range; all are requested at once, and those that fail again after a while.

        Raises:
          FileNotFoundError: a file does not exist.
          OSError: a range could not be read whole in several attempts; names the file.
        """
        results: dict[int, bytes] = {}
        for wait in (*_RETRY_SECONDS, None):
            missing = [index for index in range(len(ranges)) if index not in results]
            if not missing:
                break
            answers = self._request([ranges[index] for index in missing])
            first_error = None
            for index, answer in zip(missing, answers, strict=True):
                if isinstance(answer, bytes):
                    results[index] = answer
                elif first_error is None:
                    first_error = answer, ranges[index]
            if first_error is not None:
                self._wait_or_raise(*first_error, wait=wait)
        return [results[index] for index in range(len(ranges))]

    def _wait_or_raise(self, error: Exception, part: ByteRange, *, wait: float | None) -> None:
        url = join_location(self._folder, part.file)
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{url} is not there any more; restore it") from error
        if wait is None:
            attempts = len(_RETRY_SECONDS) + 1
            raise OSError(f"{url} cannot be read after {attempts} attempts: {type(error).__name__}: {error}") from error
        notices.report("read-again", f"{url} cannot be read now, again in {wait:.0f} s: {error!r}")
        time.sleep(wait)

    def _request(self, ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
        files, begins, ends = zip(*ranges, strict=True)
        paths = [self._system._strip_protocol(join_location(self._folder, file)) for file in files]
        try:
            answers = self._system.cat_ranges(paths, list(begins), list(ends), on_error="return")
        except Exception as error:  # fsspec's libraries raise errors of their own types
            return [error] * len(ranges)
        return [_check_length(answer, part) for answer, part in zip(answers, ranges, strict=True)]


def _check_length(answer: bytes | Exception, part: ByteRange) -> bytes | Exception:
    if isinstance(answer, Exception) or len(answer) == part.end - part.begin:
        return answer
    return OSError(f"of the {part.end - part.begin:,} bytes from {part.begin:,} on came {len(answer):,}")


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the URL's path in it. Its library's log has no tracebacks from here on."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_without_traceback)  # a filter that is there is not added again
    return fsspec.core.url_to_fs(url)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True


def extras_for(text: str) -> list[str]:
    """Return the extras of setup.cfg that the URLs in a text need, sorted, each once."""
    return sorted({_EXTRAS[scheme] for scheme in re.findall(r"(\w+)://", text) if scheme in _EXTRAS})


def missing_library(url: str, error: ImportError) -> ValueError:
    """Return what to raise where a URL's library cannot be imported."""
    extra = _EXTRAS.get(url.split("://")[0])
    need = install_command(extra) if extra else str(error)
    return ValueError(f"{url} needs a library that is not installed: {need}")


@contextlib.contextmanager
def _plain_errors(url: str) -> Iterator[None]:
    """Turn errors of fsspec's libraries, which have types of their own, into an OSError or ValueError of one line."""
    try:
        yield
    except ImportError as error:
        raise missing_library(url, error) from error
    except Exception as error:
        if isinstance(error, OSError) and type(error).__module__ == "builtins":
            raise  # of this machine, such as a full disk; or that a file is not there
        raise OSError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
