"""Files of prompts, one prompt per line or JSON lines."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

JSON_LINES = ".jsonl"
PROMPT_KEY = "prompt"
_MAX_NESTING = 100  # of the other keys' values: Python's own limit depends on what calls it
OUTPUT_KEYS = ("sample", "text", "num_tokens", "ended_by", "stop_string")  # added to a prompt's object in the output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to continue, and the other keys of its JSON object, which are copied to the output."""

    text: str
    extra: dict


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt per line; from a file that ends in .jsonl, one JSON object with the key "prompt" per line.

    Every key is checked: what cannot be written to the output is refused here.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty or no file, or a line is not a prompt; names the line.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file of prompts {path}")
    if not (path.is_file() or stat.S_ISFIFO(path.stat().st_mode)):
        raise ValueError(f"prompts_file={path} is no file: give a file of one prompt a line")
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
        row = json.loads(line, object_pairs_hook=_object, parse_float=_number, parse_constant=_refuse_constant)
    except _RefusedError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f'it is not JSON ({error}); each line is an object like {{"prompt": "text"}}') from error
    if not isinstance(row, dict) or not isinstance(row.get(PROMPT_KEY), str):
        raise ValueError('it has no "prompt" that is a string; each line is an object like {"prompt": "text"}')
    clashes = sorted(row.keys() & set(OUTPUT_KEYS))
    if clashes:
        raise ValueError(f"its key {clashes[0]!r} is one that generate writes; rename it")
    check_text(row[PROMPT_KEY], name="its prompt")
    extra = {key: value for key, value in row.items() if key != PROMPT_KEY}
    if _nesting(extra) > _MAX_NESTING:
        raise ValueError(f"it is nested more than {_MAX_NESTING} deep")
    for key, value in extra.items():
        check_text(json.dumps({key: value}, ensure_ascii=False), name=f"its key {key!a} or a text in it")
    return Prompt(text=row[PROMPT_KEY], extra=extra)


def _nesting(value: object) -> int:
    depth, level = 0, [value]
    while level := [one for parent in level for one in _children(parent)]:
        depth += 1
    return depth


def _children(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


class _RefusedError(ValueError):
    """JSON that Python reads, but that would not come back from the output as it was."""


def _object(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(f"its key {twice!a} is given twice; leave one of them out")
    return row


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {text[:40]} in it is too large; write it as a string")
    return value


def _refuse_constant(text: str) -> float:
    raise _RefusedError(f"{text} in it is not JSON, and could not be written to the output; write null or a string")
