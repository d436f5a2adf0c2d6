"""Files of prompts: one prompt per line, or JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

JSON_LINES = ".jsonl"
PROMPT_KEY = "prompt"
OUTPUT_KEYS = ("sample", "text", "num_tokens", "ended_by", "stop_string")  # added to a prompt's object in the output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to continue, and the other keys of its JSON object, which are copied to the output."""

    text: str
    extra: dict


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt per line; from a file that ends in .jsonl, one JSON object with the key "prompt" per line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, or a line is not a prompt; names the line.
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
      ValueError: it contains a surrogate: half of a pair, or a byte that was not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error.reason} at character {error.start + 1}") from error


def _lines(contents: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) without a byte-order mark and carriage returns; a final newline ends the last line."""
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
    return Prompt(text=line, extra={})


def _from_json(line: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f'it is not JSON ({error}); each line is an object like {{"prompt": "text"}}') from error
    if not isinstance(row, dict) or not isinstance(row.get(PROMPT_KEY), str):
        raise ValueError('it has no "prompt" that is a string; each line is an object like {"prompt": "text"}')
    clashes = sorted(row.keys() & set(OUTPUT_KEYS))
    if clashes:
        raise ValueError(f"its key {clashes[0]!r} is one that generate writes; rename it")
    check_text(row[PROMPT_KEY], name="its prompt")
    return Prompt(text=row[PROMPT_KEY], extra={key: value for key, value in row.items() if key != PROMPT_KEY})
