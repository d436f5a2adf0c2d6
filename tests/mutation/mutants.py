"""Small faults in Python source: each is one changed node of a module's syntax tree.

Left alone are docstrings, annotations, imports, decorators, the constant text of messages and zip's `strict`, which
only asserts. Not made are the swap of what commutes and a negation that equals the change of the comparison inside it.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
from collections.abc import Iterator

_COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_ARITHMETIC = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.BitOr: (ast.BitAnd,),
}


_COMMUTATIVE = ("min", "max", "math.lcm", "jnp.maximum", "jnp.minimum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault; `name` identifies it for as long as the function and the expression are written as they are."""

    name: str
    line: int
    parent: ast.AST
    field: str
    index: int | None  # in a field that is a list
    node: ast.AST | None  # what takes the place of the original; None deletes it from its list

    def apply(self) -> None:
        """Change the syntax tree that the mutant was found in."""
        if self.index is None:
            setattr(self.parent, self.field, self.node)
        elif self.node is None:
            del getattr(self.parent, self.field)[self.index]
        else:
            getattr(self.parent, self.field)[self.index] = self.node


def find_mutants(tree: ast.Module) -> list[Mutant]:
    """Return every mutant of a module, in the order of its lines."""
    occurrences: collections.Counter[str] = collections.Counter()
    mutants = []
    for parent, field, index, node, function in _places(tree, function=""):
        for changed in _changes(node, parent=parent, field=field):
            before = _text(node)
            after = "deleted" if changed is None else _text(changed)
            name = f"{function}: {before} -> {after}"
            occurrences[name] += 1
            if occurrences[name] > 1:
                name += f" ({occurrences[name]})"
            mutants.append(
                Mutant(name=name, line=node.lineno, parent=parent, field=field, index=index, node=changed)  # type: ignore[attr-defined]
            )
    return mutants


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else f"{text[:70]} ... {text[-25:]}"


def _places(node: ast.AST, *, function: str) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, str]]:
    """Yield (parent, field, index, node, qualified name of the function) of every node that may be changed."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}" if function else node.name
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Import, ast.ImportFrom, ast.expr_context)):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):  # a docstring
                continue
            if hasattr(child, "lineno"):
                yield node, field, index, child, function
            yield from _places(child, function=function)


def _changes(node: ast.AST, *, parent: ast.AST, field: str) -> Iterator[ast.AST | None]:
    match node:
        case ast.Compare(ops=[op]):
            for other in _COMPARISONS.get(type(op), ()):
                yield ast.Compare(left=node.left, ops=[other()], comparators=node.comparators)
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                for other in _COMPARISONS.get(type(op), ()):
                    changed = [*ops[:index], other(), *ops[index + 1 :]]
                    yield ast.Compare(left=node.left, ops=changed, comparators=node.comparators)
        case ast.BinOp():
            for other in _ARITHMETIC.get(type(node.op), ()):
                yield ast.BinOp(left=node.left, op=other(), right=node.right)
        case ast.AugAssign():
            for other in _ARITHMETIC.get(type(node.op), ()):
                yield ast.AugAssign(target=node.target, op=other(), value=node.value)
            yield ast.Pass()
        case ast.BoolOp():
            yield ast.BoolOp(op=ast.Or() if isinstance(node.op, ast.And) else ast.And(), values=node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant() if not (isinstance(parent, ast.keyword) and parent.arg == "strict"):
            yield from _other_constants(node, parent=parent)
        case ast.Slice():
            yield from _other_slices(node)
        case ast.If() | ast.IfExp() if not _changes_to_its_negation(node.test):
            yield _with(node, test=ast.UnaryOp(op=ast.Not(), operand=node.test))
        case ast.comprehension(ifs=[first, *others]) if not _changes_to_its_negation(first):
            yield _with(node, ifs=[ast.UnaryOp(op=ast.Not(), operand=first), *others])
        case ast.Raise():
            yield ast.Pass()
        case ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Return(value=ast.AST()) if not _is_none(node.value):
            yield ast.Return(value=ast.Constant(value=None))
        case ast.Call() if not isinstance(parent, ast.Raise):
            yield from _other_calls(node)
        case ast.Dict(keys=[_, *_]) if all(isinstance(key, ast.Constant) for key in node.keys):
            yield ast.Dict(keys=node.keys[:-1], values=node.values[:-1])


def _is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _other_constants(node: ast.Constant, *, parent: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield ast.Constant(value=not node.value)
    elif isinstance(node.value, int):
        yield ast.Constant(value=node.value + 1)
        if node.value > 0:
            yield ast.Constant(value=node.value - 1)
    elif isinstance(node.value, float):
        yield ast.Constant(value=2 * node.value if node.value else 1.0)
    elif isinstance(node.value, str) and node.value.isidentifier() and not isinstance(parent, ast.JoinedStr):
        yield ast.Constant(value=node.value + "_")


def _other_slices(node: ast.Slice) -> Iterator[ast.AST]:
    for bound in ("lower", "upper"):
        value = getattr(node, bound)
        if value is not None:
            yield _with(node, **{bound: None})
            if not isinstance(value, ast.Constant):  # else its constants are changed already
                yield _with(node, **{bound: ast.BinOp(left=value, op=ast.Add(), right=ast.Constant(value=1))})


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    positional = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    if len(positional) == len(node.args) >= 2 and ast.unparse(node.func) not in _COMMUTATIVE:
        yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    if node.args and len(positional) == len(node.args):
        yield node.args[0]
    for index, keyword in enumerate(node.keywords):
        if keyword.arg not in (None, "strict"):
            yield _with(node, keywords=[*node.keywords[:index], *node.keywords[index + 1 :]])


def _changes_to_its_negation(test: ast.expr) -> bool:
    is_not = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    return is_not or (isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARISONS)


def _with(node: ast.AST, **changes) -> ast.AST:
    return type(node)(**{**dict(ast.iter_fields(node)), **changes})
