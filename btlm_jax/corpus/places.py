"""Where raw text lies: a local path, or a URL that fsspec opens, such as gs://bucket/folder or s3://bucket/file.

Knows nothing of what is in the files. Credentials and endpoints are fsspec's and its libraries' affair: environment
variables such as FSSPEC_S3_ANON, or their own configuration files.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec

Place = Path | str  # str: a URL

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # of setup.cfg
_IDENTITIES = ("etag", "ETag", "generation", "md5Hash", "LastModified", "mtime", "updated", "created")
_CHUNK = 1 << 20


def place_of(given: str) -> Place:
    """Return what a command line names: a URL as it is, anything else as a path."""
    return given if "://" in given else Path(given)


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
