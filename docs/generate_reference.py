"""Write the configuration reference from the code: a MkDocs hook, and `python docs/generate_reference.py` prints it.

Keys, types, meanings and allowed values are those of `btlm train --help=config` (btlm_jax/cli/config_keys.py); values
are those of two config files; who reads a field is found by following types through the package's syntax trees.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import runpy
from collections.abc import Iterator
from pathlib import Path

from btlm_jax.cli.config_keys import Section, fields, sections

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "btlm_jax"
EXAMPLES = ("btlm_3b_8k", "local_cpu")
MARKER = "<!-- the configuration reference -->"


def on_page_markdown(markdown: str, **_) -> str:
    """Put the reference where a page has the marker (called by MkDocs)."""
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def reference() -> str:
    """Return the whole reference as Markdown."""
    values, readers = {name: example_values(name) for name in EXAMPLES}, find_readers()
    return "\n\n".join(_section_text(section, values, readers) for section in sections())


def find_readers() -> dict[tuple[str, str], set[str]]:
    """Return which files read each field of each config class: {(class, field): files}."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    types = _known_types(trees.values())
    readers: dict[tuple[str, str], set[str]] = {}
    for path, tree in trees.items():
        for owner, name in _reads(tree, types):
            readers.setdefault((owner, name), set()).add(str(path.relative_to(PACKAGE)))
    return readers


def _section_text(section: Section, values: dict[str, dict], readers: dict[tuple[str, str], set[str]]) -> str:
    paragraphs = [f"## {section.name or 'The whole config'}", section.summary]
    for key in section.keys:
        shown = [_value_text(functools.reduce(lambda c, k: c[k], key.key.split("."), values[x])) for x in EXAMPLES]
        examples = [f"{value} in {name}" for value, name in zip(shown, EXAMPLES, strict=True)]
        lines = [f"{key.meaning[:1].upper()}{key.meaning[1:]}."]
        if key.allowed:
            lines.append("Allowed: " + "; ".join(f"`{condition}`" for condition in key.allowed) + ".")
        lines.append(f"{shown[0]} in both configs." if shown[0] == shown[1] else ", ".join(examples) + ".")
        lines.append("Read by " + ", ".join(f"`{reader}`" for reader in sorted(readers[key.owner, key.name])) + ".")
        paragraphs.append(f"`{key.key}` {key.type}\n\n:   " + "\n\n    ".join(lines))
    return "\n\n".join(paragraphs)


def _value_text(value) -> str:
    if isinstance(value, tuple):
        return f"`({', '.join(f'{item:,}'.replace(',', '_') for item in value)})`"
    return f"`{value!r}`" if not isinstance(value, int) or value < 10_000 else f"`{value:_}`"


def example_values(name: str) -> dict:
    (path,) = (path for folder in (ROOT, PACKAGE) for path in folder.glob(f"configs/{name}.py"))
    return runpy.run_path(str(path))["get_config"]().to_dict()


# Who reads a field: `x.field` where x is known to be of the class, from annotations, constructors and assignments.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Types:
    """What annotations say: the class of each attribute of a class, and the class that a function returns."""

    attributes: dict[tuple[str, str], str]
    returns: dict[str, str]
    classes: frozenset[str]


def _known_types(trees) -> _Types:
    attributes, returns, classes = {}, {}, set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.add(node.name)
                attributes |= {(node.name, name): _class_named(kind) for name, kind, _ in fields(node)}
                for item in node.body:
                    if isinstance(item, ast.FunctionDef):
                        attributes[node.name, item.name] = _class_named(item.returns)
                        attributes |= _attributes_set(node.name, item)
            elif isinstance(node, ast.FunctionDef) and node.returns is not None:
                returns.setdefault(node.name, _class_named(node.returns))
    return _Types(attributes=attributes, returns=returns, classes=frozenset(classes))


def _attributes_set(owner: str, function: ast.FunctionDef) -> dict[tuple[str, str], str]:
    """Return the classes of what a method keeps of its arguments: `self._config = config`."""
    kinds = {argument.arg: _class_named(argument.annotation) for argument in _arguments(function)}
    return {
        (owner, target.attr): kinds[node.value.id]
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in kinds
        for target in node.targets
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }


def _class_named(annotation: ast.expr | None) -> str:
    """Return the class of an annotation `C`, `module.C`, `"C"` or `C | None`; "" for others."""
    if isinstance(annotation, ast.BinOp):
        return _class_named(annotation.left)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    return annotation.id if isinstance(annotation, ast.Name) else getattr(annotation, "attr", "")


def _arguments(function: ast.FunctionDef | ast.Lambda) -> list[ast.arg]:
    arguments = function.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def _reads(tree: ast.Module, types: _Types) -> Iterator[tuple[str, str]]:
    """Yield (class, attribute) of every attribute that is read of something whose class is known."""
    yield from _reads_in(tree.body, {}, "", types)


def _reads_in(body: list, outer: dict[str, str], owner: str, types: _Types) -> Iterator[tuple[str, str]]:
    kinds = dict(outer)
    for node in _in_order(body):
        if isinstance(node, ast.ClassDef):
            yield from _reads_in(node.body, kinds, node.name, types)
        elif isinstance(node, ast.FunctionDef):
            if node.name == "__post_init__":
                continue  # a check is not a use
            inner = {argument.arg: _class_named(argument.annotation) for argument in _arguments(node)}
            inner |= {"self": owner} if owner else {}
            yield from _reads_in(node.body, {**kinds, **inner}, "" if "self" not in inner else owner, types)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name, value in _pairs(target, node.value):
                    kinds[name] = _class_of(value, kinds, types)
        elif isinstance(node, ast.Attribute):
            kind = _class_of(node.value, kinds, types)
            if kind:
                yield kind, node.attr


def _in_order(body: list) -> Iterator[ast.AST]:
    """Yield the nodes of statements in the order of the text, but not those inside functions and classes."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from _in_order(list(ast.iter_child_nodes(node)))


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=False):
            yield from _pairs(one, other)


def _class_of(value: ast.expr, kinds: dict[str, str], types: _Types) -> str:
    if isinstance(value, ast.Name):
        return kinds.get(value.id, "")
    if isinstance(value, ast.Attribute):
        return types.attributes.get((_class_of(value.value, kinds, types), value.attr), "")
    if isinstance(value, ast.Call):
        if isinstance(value.func, ast.Name):
            name = value.func.id
            return name if name in types.classes else types.returns.get(name, "")
        if isinstance(value.func, ast.Attribute):
            owner = _class_of(value.func.value, kinds, types)
            return (
                types.attributes.get((owner, value.func.attr), "") if owner else types.returns.get(value.func.attr, "")
            )
    return ""


if __name__ == "__main__":
    print(reference())
