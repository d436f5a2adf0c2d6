"""The file of texts: checked before anything is loaded; each text is kept once it is complete; goes on after a kill.

While texts are made they are in NAME.partial: a first line with the command's settings, then a line per text as it is
finished, its number and its JSON. At the end NAME gets them in order, at once, and NAME.partial is deleted.
"""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path

from btlm_jax import notices
from btlm_jax.generate.prompts import OUTPUT_KEYS
from btlm_jax.storage.files import open_to_append, parse_json, write_all, write_atomically

_SETTINGS_KEY = "btlm generate"  # of the partial file's first line


def check_output(path: Path, *, prompts_file: Path | None) -> None:
    """Check, before hours of generation, that the file can be written, and that nothing else is lost by it.

    It may replace a file that is empty or holds texts of `btlm generate`, and nothing else.

    Raises:
      OSError: it cannot be written.
      ValueError: there is something else of this name.
    """
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"output={path} is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output={path} cannot be written: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"output={path} cannot be written: directory {path.parent} is read-only")
    for name in (path, _partial(path)):
        _check_replaceable(name, prompts_file=prompts_file)
    if path.exists() and path.stat().st_size:
        if not _holds_texts(path):
            raise ValueError(
                f"output={path} exists and holds something else than texts of btlm generate; it is not replaced: "
                "delete it, or give another name"
            )
        notices.report("output-replaced", f"{path} holds texts, which are replaced when all new ones are made")


class TextsFile:
    """The lines of the texts made so far, by number; those of an earlier start of the same command included."""

    def __init__(self, path: Path, *, settings: dict[str, object], num_texts: int):
        """Read what an interrupted start of the same command has left.

        Raises:
          ValueError: it is of another command; names each setting that differs.
          OSError: it cannot be read.
        """
        self.path, self.partial, self._num_texts = path, _partial(path), num_texts
        self._settings = json.loads(json.dumps(settings))  # as it is read back
        self._header = json.dumps({_SETTINGS_KEY: settings}).encode() + b"\n"
        self._lines: dict[int, str] = {}
        self._file: io.FileIO | None = None
        self._num_bytes = self._read() if self.partial.exists() else 0

    @property
    def done(self) -> frozenset[int]:
        """The numbers of the texts that are there."""
        return frozenset(self._lines)

    def add(self, number: int, line: str) -> None:
        """Keep a text, as one line of JSON without its newline.

        Raises:
          OSError: it cannot be written; names the file.
        """
        try:
            if self._file is None:
                self._file = open_to_append(self.partial, num_bytes=self._num_bytes)  # without a line that was cut off
                if self._num_bytes == 0:
                    write_all(self._file, self._header)
            write_all(self._file, f"{number}\t{line}\n".encode())
        except OSError as error:
            raise self._unwritable(self.partial, error) from error
        self._lines[number] = line

    def finish(self) -> None:
        """Write all texts in order under the file's name.

        Raises:
          OSError: it cannot be written; names the file.
        """
        assert self.done == frozenset(range(self._num_texts))
        try:
            self.close()
            write_atomically(self.path, "".join(self._lines[number] + "\n" for number in range(self._num_texts)))
        except OSError as error:
            raise self._unwritable(self.path, error) from error
        self.partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the partial file, which stays."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _read(self) -> int:
        """Read the partial file's complete lines; return how many bytes they are."""
        first, *rest = self.partial.read_bytes().split(b"\n")
        if not rest and self._header.startswith(first):
            return 0  # it was killed in the first line
        settings = _settings_of(first)
        if not rest or settings is None:
            raise ValueError(
                f"{self.partial} is not an unfinished output of btlm generate; delete it or give another --output"
            )
        if settings != self._settings:
            names = sorted(settings.keys() | self._settings.keys())
            changed = [
                f"{name}: {settings.get(name)!r} there, {self._settings.get(name)!r} now"
                for name in names
                if settings.get(name) != self._settings.get(name)
            ]
            raise ValueError(
                f"{self.partial} holds the unfinished texts of another command ({'; '.join(changed)}): give its "
                "settings to go on with it, delete it to begin anew, or give another --output"
            )
        num_bytes = len(first) + 1
        for line in rest[:-1]:
            number, _, text = line.partition(b"\t")
            if not number.isdigit() or int(number) >= self._num_texts or not _is_json(text):
                break  # such as zeros after a loss of power
            self._lines[int(number)] = text.decode()
            num_bytes += len(line) + 1
        return num_bytes

    def _unwritable(self, path: Path, error: OSError) -> OSError:
        return OSError(
            f"{path} cannot be written: {error.strerror or error}; {len(self._lines):,} of {self._num_texts:,} texts "
            f"are in {self.partial}: mend it, and the same command goes on"
        )


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _check_replaceable(path: Path, *, prompts_file: Path | None) -> None:
    """Check that there is nothing, or a regular file that this user may write and that is not the file of prompts."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise ValueError(
            f"output={path} is a link to {os.readlink(path)}; it is not replaced: give the file's own name"
        )
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"output={path} is no regular file and is not replaced; without --output texts go to standard output"
        )
    if prompts_file is not None and prompts_file.exists() and path.samefile(prompts_file):
        raise ValueError(f"output={path} is the file of prompts itself; give another name")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"output={path} exists and is read-only; it is not replaced")


def _holds_texts(path: Path) -> bool:
    """Return whether a file's first line is one that `btlm generate` wrote."""
    with open(path, "rb") as file:
        row = _parsed(file.readline())
    return isinstance(row, dict) and set(OUTPUT_KEYS[:-1]) <= row.keys()


def _settings_of(line: bytes) -> dict | None:
    row = _parsed(line)
    settings = row.get(_SETTINGS_KEY) if isinstance(row, dict) else None
    return settings if isinstance(settings, dict) else None


def _is_json(text: bytes) -> bool:
    return isinstance(_parsed(text), dict)


def _parsed(text: bytes) -> object:
    try:
        return parse_json(text, name="a line")
    except ValueError:
        return None
