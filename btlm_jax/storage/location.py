"""Where data lies: a local path, or a URL that fsspec opens, such as gs://bucket/folder or s3://bucket/file.

Knows nothing of what is in the files. Credentials and endpoints are fsspec's and its libraries' affair: environment
variables such as FSSPEC_S3_ANON, or their own configuration files. The only importer of fsspec.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec

Place = Path | str  # str: a URL

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # of setup.cfg
_IDENTITIES = ("etag", "ETag", "generation", "md5Hash", "LastModified", "mtime", "updated", "created")
_CHUNK = 1 << 20
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before what failed is asked for again


def place_of(given: str) -> Place:
    """Return what a command line names: a URL as it is, anything else as a path."""
    return given if "://" in given else Path(given)


def place_under(folder: Path, given: str) -> Place:
    """Return what a setting names: a URL as it is, a path from `folder` if it is relative."""
    return given if "://" in given else folder / given


def inside(folder: Place, name: str) -> Place:
    """Return the place of a file in a folder."""
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def sizes_in(folder: Place) -> dict[str, int]:
    """Return the bytes of each file that lies directly in a folder; of none when there is no such folder.

    Raises:
      OSError: the place cannot be reached.
    """
    if isinstance(folder, Path):
        files = folder.iterdir() if folder.is_dir() else ()
        return {path.name: path.stat().st_size for path in files if path.is_file()}
    try:
        with _reaching(folder):
            system, path = fsspec.core.url_to_fs(folder)
            system.invalidate_cache()
            found = system.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {info["name"].rsplit("/", 1)[-1]: info["size"] for info in found if info["type"] == "file"}


def read_bytes(place: Place) -> bytes:
    """Return the contents of a file.

    Raises:
      OSError: it cannot be read.
    """
    with opened(place) as file:
        return file.read()


def find_files(root: Place) -> list[tuple[str, Place, int]]:
    """Return (name below root, place, bytes) of every file below a folder, or of the one file, by name.

    Raises:
      FileNotFoundError: there is nothing.
      OSError: the place cannot be reached.
    """
    if isinstance(root, Path):
        if root.is_file():
            return [(root.name, root, root.stat().st_size)]
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is neither a file nor a folder")
        paths = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.is_file())
        return [(name, path, path.stat().st_size) for name, path in paths]
    with _reaching(root):
        system, path = fsspec.core.url_to_fs(root)
        found = system.find(path, detail=True)  # of a file: itself
        base = path.rstrip("/")
        files = [(at.removeprefix(base).lstrip("/") or at.rsplit("/", 1)[-1], at, info) for at, info in found.items()]
        places = [(name, system.unstrip_protocol(at), info["size"]) for name, at, info in files]
    if not places:
        raise FileNotFoundError(f"{root} holds no file, or is none")
    return sorted(places)


def stamp_of(place: Place) -> list:
    """Return what tells cheaply that a file is another now: its size, and its time or the store's mark of it."""
    if isinstance(place, Path):
        status = place.stat()
        return [status.st_size, status.st_mtime_ns]
    with _reaching(place):
        system, path = fsspec.core.url_to_fs(place)
        system.invalidate_cache()  # of listings, which may be old
        info = system.info(path)
    return [info["size"], *(str(info[key]) for key in _IDENTITIES if info.get(key) is not None)]


@contextlib.contextmanager
def opened(place: Place) -> Iterator[BinaryIO]:
    """Open a file for reading; close it at the end of the block."""
    if isinstance(place, Path):
        with open(place, "rb") as file:
            yield file
    else:
        with _reaching(place), fsspec.open(place, "rb") as file:
            yield file


def hash_part(place: Place, *, begin: int, num_bytes: int, copy_to: BinaryIO | None) -> str:
    """Return the sha256 of a part of a file, which must be there whole; copy it on the way if asked to.

    Raises:
      OSError: fewer bytes came.
    """
    digest, left = hashlib.sha256(), num_bytes
    with opened(place) as file:
        file.seek(begin)
        while left and (data := file.read(min(left, _CHUNK))):
            digest.update(data)
            left -= len(data)
            if copy_to is not None:
                copy_to.write(data)
    if left:
        raise OSError(f"{place} ended {left:,} bytes before it should")
    return digest.hexdigest()


class Part(NamedTuple):
    """A stretch of a file."""

    file: str  # inside the folder that is read
    begin: int
    end: int


class RangeReader:
    """Reads stretches of the files of a folder behind a URL; safe to use from many threads."""

    def __init__(self, folder: str):
        """Open the folder; nothing is asked for yet.

        Raises:
          ValueError: the URL is of a kind that nothing installed opens.
        """
        self._folder = folder
        with _reaching(folder):
            self._system, _ = fsspec.core.url_to_fs(folder)

    def read(self, parts: Sequence[Part]) -> list[bytes]:
        """Return the bytes of each part; all are asked for at once, and again after a while when that fails.

        Raises:
          FileNotFoundError: a file is not there.
          OSError: a part could not be read to its end after several attempts; names the file.
        """
        found: dict[int, bytes] = {}
        for wait in (*_WAITS, None):
            missing = [index for index in range(len(parts)) if index not in found]
            if not missing:
                break
            answers = dict(zip(missing, self._ask([parts[index] for index in missing]), strict=True))
            found |= {index: answer for index, answer in answers.items() if isinstance(answer, bytes)}
            failed = next((index for index in missing if index not in found), None)
            if failed is not None:
                self._wait_or_raise(answers[failed], parts[failed], wait=wait)
        return [found[index] for index in range(len(parts))]

    def _wait_or_raise(self, error: Exception, part: Part, *, wait: float | None) -> None:
        url = inside(self._folder, part.file)
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{url} is not there any more; restore it") from error
        if wait is None:
            attempts = len(_WAITS) + 1
            raise OSError(f"{url} cannot be read after {attempts} attempts: {type(error).__name__}: {error}") from error
        logging.warning("%s cannot be read now, again in %.0f s: %r", url, wait, error)
        time.sleep(wait)

    def _ask(self, parts: Sequence[Part]) -> list[bytes | Exception]:
        files, begins, ends = zip(*parts, strict=True)
        paths = [self._system._strip_protocol(inside(self._folder, file)) for file in files]
        try:
            answers = self._system.cat_ranges(paths, list(begins), list(ends), on_error="return")
        except Exception as error:  # its libraries raise errors of their own kinds
            return [error] * len(parts)
        return [_whole(answer, part) for answer, part in zip(answers, parts, strict=True)]


def _whole(answer: bytes | Exception, part: Part) -> bytes | Exception:
    if isinstance(answer, Exception) or len(answer) == part.end - part.begin:
        return answer
    return OSError(f"of the {part.end - part.begin:,} bytes from {part.begin:,} on came {len(answer):,}")


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Say in one line what went wrong with a URL: its libraries raise errors of their own kinds."""
    try:
        yield
    except ImportError as error:
        extra = _EXTRAS.get(url.split("://")[0])
        need = f"pip install 'btlm_jax[{extra}]'" if extra else str(error)
        raise ValueError(f"{url} needs a library that is not installed: {need}") from error
    except OSError:  # this machine's disk may be full, too
        raise
    except Exception as error:
        raise OSError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
