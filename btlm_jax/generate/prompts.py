"""Files of prompts: one a line, or JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

JSON_LINES = ".jsonl"
PROMPT = "prompt"
WRITTEN = ("sample", "text", "num_tokens", "ended_by", "stop_string")  # what generate adds to a prompt's object


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to continue, and what stood beside it in its JSON object, which is carried to the output."""

    text: str
    beside: dict


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt a line, or from a file that ends in .jsonl one JSON object with "prompt" a line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, or a line is no prompt; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts {path}")
    prompts = []
    for number, line in _lines(path.read_bytes()):
        try:
            text = line.decode()
            prompts.append(_from_json(text) if path.suffix == JSON_LINES else _from_line(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path} is empty: write one prompt a line")
    return prompts


def check_text(text: str, *, name: str) -> None:
    """Check that a text can be written as UTF-8.

    Raises:
      ValueError: it has half a surrogate pair, or came from bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error.reason} at character {error.start + 1}") from error


def _lines(contents: bytes) -> Iterator[tuple[int, bytes]]:
    lines = contents.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield number, line.removesuffix(b"\r")


def _from_line(line: str) -> Prompt:
    if not line.strip():
        raise ValueError(
            f'it is blank; delete it, or write {{"prompt": ""}} in a {JSON_LINES} file to begin a document from nothing'
        )
    return Prompt(text=line, beside={})


def _from_json(line: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f'it is not JSON ({error}); each line is an object like {{"prompt": "text"}}') from error
    if not isinstance(row, dict) or not isinstance(row.get(PROMPT), str):
        raise ValueError('it has no "prompt" that is a string; each line is an object like {"prompt": "text"}')
    taken = sorted(row.keys() & set(WRITTEN))
    if taken:
        raise ValueError(f"its key {taken[0]!r} is one that generate writes; rename it")
    check_text(row[PROMPT], name="its prompt")
    return Prompt(text=row[PROMPT], beside={key: value for key, value in row.items() if key != PROMPT})
