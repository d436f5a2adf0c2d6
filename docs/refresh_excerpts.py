"""Renew the code excerpts of the documentation: `python docs/refresh_excerpts.py`.

A marker names a file and a function, class or method; the fenced block after it is that code as it is now, without
docstrings:

    <!-- from btlm_jax/train/step.py: make_train_step.train_step -->

Two texts after the name take a part, from the line that holds the first to the one that holds the second:

    <!-- from btlm_jax/train/loop.py: _train_from, "for index, batch" to "pending = (step" -->
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_EXCERPT = re.compile(
    r'(?P<marker><!-- from (?P<path>\S+): (?P<name>[\w.]+)(?:, "(?P<first>[^"]+)" to "(?P<last>[^"]+)")? -->\n+)'
    r"```python\n(?P<code>.*?)```",
    flags=re.DOTALL,
)


def refreshed(page: str) -> str:
    """Return a page's text with all its excerpts as the code is now.

    Raises:
      ValueError: a marker names something that is not there.
    """
    return _EXCERPT.sub(lambda match: f"{match['marker']}```python\n{excerpt(match)}```", page)


def num_excerpts(page: str) -> int:
    """Return how many excerpts a page has."""
    return len(_EXCERPT.findall(page))


def excerpt(match: re.Match) -> str:
    """Return the code that a marker names, dedented."""
    path, name = match["path"], match["name"]
    source = (ROOT / path).read_text(encoding="utf-8")
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        node = _child(node, part, where=f"{path}: {name}")
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = {number: line for number, line in enumerate(source.splitlines(), start=1) if start <= number}
    lines = {number: line for number, line in lines.items() if number <= (node.end_lineno or start)}
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            docstring = inner.body[0]
            for number in range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1):
                lines.pop(number)
    kept = list(lines.values())
    if match["first"]:
        begin = _line_with(kept, match["first"], after=0, where=f"{path}: {name}")
        kept = kept[begin : _line_with(kept, match["last"], after=begin, where=f"{path}: {name}") + 1]
    return textwrap.dedent("\n".join(kept)) + "\n"


def _child(node: ast.AST, name: str, *, where: str):
    for inner in ast.walk(node):
        if inner is not node and isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and inner.name == name:
            return inner
    raise ValueError(f"{where}: there is no {name!r}; change the marker")


def _line_with(lines: list[str], text: str, *, after: int, where: str) -> int:
    for number, line in enumerate(lines):
        if number >= after and text in line:
            return number
    raise ValueError(f"{where}: no line has {text!r}; change the marker")


if __name__ == "__main__":
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (new := refreshed(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(f"renewed {path.relative_to(ROOT)}", file=sys.stderr)
