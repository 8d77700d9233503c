"""Source that Python 3.9 runs, from this package's source, which is written for 3.11.

The devices' own Python is often older than ours, and the measuring code has to be the same code there. What changed in the
language since 3.9 and is used here is rewritten in place, by the places the parser gives; every other byte stays:

    isinstance(x, A | B | None)     isinstance(x, (A, B, type(None)))
    zip(a, b, strict=True)          zip_strict(a, b)
    Alias = A | list[B | None]      Alias = Union[A, list[Union[B, None]]]      (at module level; and in cast)

What the standard library gained is filled in at run time by `runner/older.py`. Annotations are never evaluated, for every
module begins with `from __future__ import annotations`. What the rewritten source still holds that 3.9 cannot parse is refused.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass

OLDEST = (3, 9)
_TYPE = r"_?[A-Z](\w*[a-z]\w*)?"  # a name like that of a class or a type variable, not of a constant
FILLED = "bertemd_deploy.older"  # where the rewritten source finds `Union` and `zip_strict`


@dataclass(frozen=True)
class _Edit:
    """Bytes `start` to `stop` become `text`."""

    start: int
    stop: int
    text: str


def older_source(source: str, *, name: str) -> str:
    """Return `source` as Python 3.9 runs it.

    Args:
        source: a module of this package.
        name: what to call it in the message.

    Raises:
        ValueError: it evaluates its annotations, or holds syntax newer than 3.9 that is not rewritten.
    """
    tree = ast.parse(source)
    body = source.encode()
    starts = [0]
    for line in body.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.expr | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    edits: list[_Edit] = []
    wanted: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass") and _is_union(node.args[1]):
                edits.append(_Edit(*span(node.args[1]), _as_tuple(node.args[1])))
            elif node.func.id == "zip":
                for keyword in node.keywords:
                    edits += _zip_edits(node, keyword, body, span(node.func), span(keyword), name=name)
                wanted |= {edit.text for edit in edits} & {"zip_strict"}
            elif node.func.id == "cast" and node.args:
                unions = list(_unions(node.args[0]))
                edits += [_Edit(*span(one), _as_union(one)) for one in unions]
                wanted |= {"Union"} if unions else set()
    for value in _aliases(tree):
        unions = list(_unions(value))
        edits += [_Edit(*span(one), _as_union(one)) for one in unions]
        wanted |= {"Union"} if unions else set()
    future = _future_line(tree)
    if future is None and any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
        raise ValueError(f"{name}: evaluates its annotations; begin it with `from __future__ import annotations`")
    if future is not None and wanted:
        at = starts[future]
        edits.append(_Edit(at, at, f"from {FILLED} import {', '.join(sorted(wanted))}\n"))
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        body = body[: edit.start] + edit.text.encode() + body[edit.stop :]
    found = body.decode()
    try:
        ast.parse(found, feature_version=OLDEST)
    except SyntaxError as error:
        raise ValueError(f"{name}, line {error.lineno}: Python 3.9 cannot read it ({error.msg})") from error
    return found


def _zip_edits(
    call: ast.Call,
    keyword: ast.keyword,
    body: bytes,
    function: tuple[int, int],
    argument: tuple[int, int],
    *,
    name: str,
) -> Iterator[_Edit]:
    """Yield the edits that take `strict` out of a call of zip."""
    if keyword.arg != "strict" or not isinstance(keyword.value, ast.Constant):
        raise ValueError(f"{name}, line {call.lineno}: zip with other keywords than strict=True or strict=False")
    comma = body.rindex(b",", 0, argument[0])
    yield _Edit(comma, argument[1], "")
    if keyword.value.value:
        yield _Edit(*function, "zip_strict")


def _future_line(tree: ast.Module) -> int | None:
    """Return the number of the line that switches annotations off, counted from 1, or None."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return node.end_lineno
    return None


def _aliases(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the values that are given to names like those of types, at module level."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) and re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", target.id) for target in node.targets
        ):
            yield node.value


def _is_union(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)


def _is_type(node: ast.expr) -> bool:
    """Say whether an expression reads like a type rather than a set or a dictionary."""
    if _is_union(node):
        assert isinstance(node, ast.BinOp)
        return _is_type(node.left) and _is_type(node.right)
    if isinstance(node, ast.Subscript):
        return _is_type(node.value)
    if isinstance(node, ast.Attribute):
        return re.search("[a-z]", node.attr) is not None and node.attr[0].isupper()
    if isinstance(node, ast.Name):
        return isinstance(getattr(builtins, node.id, None), type) or re.fullmatch(_TYPE, node.id) is not None
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str))


def _unions(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the outermost unions of types within an expression."""
    if _is_union(node) and _is_type(node):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield from _unions(child)


def _members(node: ast.expr) -> Iterator[ast.expr]:
    if _is_union(node):
        assert isinstance(node, ast.BinOp)
        yield from _members(node.left)
        yield from _members(node.right)
    else:
        yield node


def _as_tuple(node: ast.expr) -> str:
    """Return a union as what `isinstance` took before: a tuple of classes."""
    members = (ast.unparse(member) for member in _members(node))
    return f"({', '.join('type(None)' if member == 'None' else member for member in members)})"


class _Nested(ast.NodeTransformer):
    """Replaces unions of types below an expression."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        if not (_is_union(node) and _is_type(node)):
            return node
        members = [self.visit(member) for member in _members(node)]
        return ast.Subscript(ast.Name("Union"), ast.Tuple(members) if len(members) > 1 else members[0])


def _as_union(node: ast.expr) -> str:
    return ast.unparse(_Nested().visit(node))
