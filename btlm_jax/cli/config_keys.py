"""The keys of a config with type, meaning and allowed values, for --help=config and for the documentation.

All of it is read from the source of recipe/config.py: the fields of its dataclasses, the comments beside them, and the
checks of their `__post_init__`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import btlm_jax

SOURCE = Path(btlm_jax.__file__).parent / "recipe" / "config.py"
WHOLE = "TrainConfig"
_WIDTH = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a config."""

    owner: str  # the dataclass that has it
    section: str  # "model", or "" for a key of the whole config
    name: str
    type: str
    meaning: str
    allowed: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One dataclass of recipe/config.py."""

    name: str
    summary: str
    keys: tuple[Key, ...]


@functools.cache
def sections() -> tuple[Section, ...]:
    """Return every section of a config, the keys of the whole config first."""
    text = SOURCE.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = []
    for prefix, class_name in [("", WHOLE), *_subconfigs(classes)]:
        node = classes[class_name]
        allowed = _allowed_values(node, tree)
        keys = tuple(
            Key(
                owner=class_name,
                section=prefix,
                name=name,
                type=ast.unparse(annotation),
                meaning=lines[line - 1].partition("  # ")[2],
                allowed=tuple(allowed.get(name, ())),
            )
            for name, annotation, line in fields(node)
            if ast.unparse(annotation) not in classes
        )
        found.append(Section(name=prefix, summary=ast.get_docstring(node) or "", keys=keys))
    return tuple(found)


def explain_keys() -> str:
    """Return every key for --help: its type, meaning and allowed values."""
    lines = ["keys of a config, changed by --config.KEY=VALUE (a tuple as 2048,8192):"]
    for section in sections():
        lines.append(f"\n  {section.summary.splitlines()[0]}")
        for key in section.keys:
            allowed = f" [{'; '.join(key.allowed)}]" if key.allowed else ""
            head = f"    {key.key:<34} {_TYPES.get(key.type, key.type):<13} "
            text = f"{key.meaning}{allowed}"
            lines.append(textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)))
    return "\n".join(lines)


_TYPES = {
    "int": "whole number",
    "float": "number",
    "float | str": "number or a word",
    "str": "text",
    "bool": "true or false",
    "tuple[int, ...]": "whole numbers",
}


def fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, int]]:
    """Yield (name, annotation, line) of each annotated name of a class."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id, item.annotation, item.lineno


def _subconfigs(classes: dict[str, ast.ClassDef]) -> list[tuple[str, str]]:
    pairs = [(name, ast.unparse(annotation)) for name, annotation, _ in fields(classes[WHOLE])]
    return [(name, class_name) for name, class_name in pairs if class_name in classes]


# Allowed values: the calls of `_require...` in a class's __post_init__.


def _allowed_values(node: ast.ClassDef, tree: ast.Module) -> dict[str, list[str]]:
    """Return the conditions on each field, as written in the code."""
    allowed: dict[str, list[str]] = {}
    constants = {
        target.id: ast.literal_eval(item.value)
        for item in tree.body
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Tuple)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    names = [name for name, _, _ in fields(node)]
    for call, name in _checks(node):
        function = call.func.id if isinstance(call.func, ast.Name) else ""
        if function in ("_require_positive", "_require_size"):
            for keyword in call.keywords:
                allowed.setdefault(str(keyword.arg), []).append("> 0")
        elif function == "_require_choice":
            field, choices = ast.literal_eval(call.args[0]).split(".")[-1], call.args[2]
            listed = constants[choices.id] if isinstance(choices, ast.Name) else ast.literal_eval(choices)
            allowed.setdefault(field, []).append(", ".join(map(str, listed)))
        elif function == "_require":
            condition = ast.unparse(call.args[0])
            if name:
                condition = condition.replace("getattr(self, name)", name)
            condition = condition.replace("self.", "")
            for field in names:
                if re.search(rf"(?<![\w.]){field}\b", condition):
                    allowed.setdefault(field, []).append(_short(condition, field))
    return allowed


def _short(condition: str, field: str) -> str:
    """Shorten `beta1 >= 0` to `>= 0`, and `bool(store)` to words."""
    if condition == f"bool({field})":
        return "not empty"
    return re.sub(rf"^{field} (?=[<>=])", "", condition)


def _checks(node: ast.ClassDef) -> Iterator[tuple[ast.Call, str]]:
    """Yield the calls in __post_init__, with the field that a loop around one stands at."""
    for item in node.body:
        if not (isinstance(item, ast.FunctionDef) and item.name == "__post_init__"):
            continue
        for statement in item.body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                yield statement.value, ""
            if isinstance(statement, ast.For) and isinstance(statement.iter, ast.Tuple):
                for name in ast.literal_eval(statement.iter):
                    for inner in statement.body:
                        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
                            yield inner.value, name
