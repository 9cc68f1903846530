"""Bugs as small edits of a module's text, found on its syntax tree.

Each operator looks at one node and says how its text could read instead; an edit touches the
node's own characters alone, so the bug is one or two lines of diff. Only code inside functions is
touched; documentation, annotations, decorators, error messages and f-strings are not. An edited
module always parses, and never to the same tree.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

_Function = ast.FunctionDef | ast.AsyncFunctionDef
Rewrites = Iterator[tuple[ast.AST, str]]

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is not": "is", "not in": "in",
                "is": "is not", "in": "not in"}  # fmt: skip
_ARITHMETIC = {"**": "*", "//": "/", "<<": ">>", ">>": "<<", "+": "-", "-": "+", "*": "+", "/": "*", "%": "//",
               "&": "|", "|": "&", "^": "&"}  # fmt: skip
_LOOKALIKES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "iter"}
_METHODS = {"startswith": "endswith", "endswith": "startswith", "lstrip": "rstrip", "rstrip": "lstrip",
            "upper": "lower", "lower": "upper", "find": "rfind", "rfind": "find", "append": "extend",
            "split": "rsplit", "rsplit": "split", "index": "count", "add": "discard", "keys": "values",
            "partition": "rpartition", "ceil": "floor", "floor": "ceil", "update": "setdefault"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """Characters `start` to `end` of the module should read `replacement`; `function` is dotted."""

    operator: str
    function: str
    start: int
    end: int
    replacement: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]


class _Text:
    """A module's text by the positions of its nodes, which count bytes of a line."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._lines = text.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def offset(self, line: int, column_bytes: int) -> int:
        prefix = self._lines[line - 1].encode()[:column_bytes] if column_bytes else b""
        return self._starts[line - 1] + len(prefix.decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        place: ast.expr = node  # type: ignore[assignment]  # every node that operators see has a place
        assert place.end_lineno is not None and place.end_col_offset is not None
        return self.offset(place.lineno, place.col_offset), self.offset(place.end_lineno, place.end_col_offset)

    def of(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def replace_between(self, whole: ast.AST, left: ast.AST, right: ast.AST, table: dict[str, str]) -> str | None:
        """`whole` with the operator between two of its parts replaced; None if it isn't in `table`."""
        gap_start, gap_end = self.span(left)[1], self.span(right)[0]
        words = r"(?<!\w)(?:is\s+not|not\s+in|is|in|and|or)(?!\w)"
        match = re.search(rf"{words}|\*\*|//|<<|>>|[<>=!]=|[<>+\-*/%&|^@]", self.text[gap_start:gap_end])
        new = table.get(re.sub(r"\s+", " ", match[0])) if match else None
        if match is None or new is None:
            return None
        start, end = self.span(whole)
        return self.text[start : gap_start + match.start()] + new + self.text[gap_start + match.end() : end]


def _comparison(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, right in pairwise(operands):
            if new := text.replace_between(node, left, right, _COMPARISONS):
                yield node, new


def _arithmetic(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            return
        if new := text.replace_between(node, node.left, node.right, _ARITHMETIC):
            yield node, new
    elif isinstance(node, ast.AugAssign) and (
        new := text.replace_between(node, node.target, node.value, {"+": "-", "-": "+", "*": "+", "/": "*"})
    ):
        yield node, new


def _boolean(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.BoolOp):
        for left, right in pairwise(node.values):
            if new := text.replace_between(node, left, right, {"and": "or", "or": "and"}):
                yield node, new


def _negation(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        if not isinstance(node.operand, ast.Constant):
            yield node, text.of(node.operand)
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and isinstance(
        node.test, ast.Name | ast.Call | ast.Attribute
    ):
        yield node.test, f"not {text.of(node.test)}"


def _off_by_one(node: ast.AST, text: _Text) -> Rewrites:
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=ast.Constant(value=1)):
            yield node, text.of(left)
        case ast.Call(func=ast.Name(id="range"), args=[only]):
            yield only, f"{text.of(only)} - 1"
        case ast.Call(func=ast.Name(id="range"), args=[_, stop, *_]):
            yield stop, f"{text.of(stop)} - 1"
        case ast.Slice(lower=lower, upper=upper):
            for bound in (lower, upper):
                if bound is not None and not isinstance(bound, ast.Constant):
                    yield bound, f"{text.of(bound)} + 1"


def _constant(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield node, str(not node.value)
        elif isinstance(node.value, int) and re.fullmatch(r"\d+", text.of(node)):
            yield node, str(node.value + 1)


def _swapped_arguments(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.Call) and len(node.args) >= 2:
        first, second = node.args[:2]
        if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
            (start, end), (a, b), (c, d) = text.span(node), text.span(first), text.span(second)
            source = text.text
            yield node, source[start:a] + source[c:d] + source[b:c] + source[a:b] + source[d:end]


def _dropped_argument(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.Call) and node.keywords and len(node.args) + len(node.keywords) > 1:
        last = node.keywords[-1]
        others = [*node.args, *node.keywords[:-1]]
        before = max(text.span(other)[1] for other in others)
        start, end = text.span(node)
        if text.span(last)[1] > before:
            yield node, text.text[start:before] + text.text[text.span(last)[1] : end]


def _dropped_return(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Call | ast.BinOp | ast.Subscript | ast.Name):
        yield node, text.of(node.value)


def _removed_branch(node: ast.AST, text: _Text) -> Rewrites:
    """An `if` without `else` around one line, gone with its lines."""
    if isinstance(node, ast.If) and not node.orelse and len(node.body) == 1:
        body = node.body[0]
        short = body.lineno == body.end_lineno == node.lineno + 1 and text.of(node).startswith("if ")
        if short and isinstance(body, ast.Return | ast.Raise | ast.Continue | ast.Break | ast.Assign | ast.AugAssign):
            yield ast.Pass(lineno=node.lineno, col_offset=0, end_lineno=body.lineno + 1, end_col_offset=0), ""


def _loop_exit(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.Break | ast.Continue):
        yield node, "continue" if isinstance(node, ast.Break) else "break"


def _lookalike(node: ast.AST, text: _Text) -> Rewrites:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in _LOOKALIKES:
            yield node.func, _LOOKALIKES[node.func.id]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            yield node.func, text.of(node.func)[: -len(node.func.attr)] + _METHODS[node.func.attr]


OPERATORS: dict[str, Callable[[ast.AST, _Text], Rewrites]] = {
    "comparison": _comparison,
    "arithmetic": _arithmetic,
    "boolean": _boolean,
    "negation": _negation,
    "off_by_one": _off_by_one,
    "constant": _constant,
    "swapped_arguments": _swapped_arguments,
    "dropped_argument": _dropped_argument,
    "dropped_return": _dropped_return,
    "removed_branch": _removed_branch,
    "loop_exit": _loop_exit,
    "lookalike": _lookalike,
}


def find_mutations(source: str, operators: Iterable[str]) -> list[Mutation]:
    """Every edit of the module that the operators know, in the order of the text; [] if it doesn't parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    text, wanted = _Text(source), list(operators)
    found = [
        mutation for function, name in _functions(tree, "") for mutation in _mutations(function, name, text, wanted)
    ]
    return sorted(found, key=lambda edit: (edit.start, edit.end, edit.operator, edit.replacement))


def _mutations(function: _Function, name: str, text: _Text, operators: list[str]) -> Iterator[Mutation]:
    """What can be done to one function. Only its own lines are parsed again for each, which is what
    keeps large modules quick."""
    assert function.end_lineno is not None
    first, last = text.offset(function.lineno, 0), text.offset(function.end_lineno + 1, 0)
    original = _shape(text.text[first:last])
    for node, inside in _editable(function.body, name):
        for operator in operators:
            for target, new in OPERATORS[operator](node, text):
                start, end = text.span(target)
                if _shape(text.text[first:start] + new + text.text[end:last]) not in (original, None):
                    yield Mutation(operator=operator, function=inside, start=start, end=end, replacement=new)


def _shape(function: str) -> str | None:
    """A function's syntax tree, from its whole lines; None if they don't parse."""
    try:
        return ast.dump(ast.parse(f"if 1:\n{function}" if function[:1].isspace() else function))
    except SyntaxError:
        return None


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[_Function, str]]:
    """Functions and methods with their dotted names, without those inside other functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, f"{prefix}{child.name}"
        else:
            yield from _functions(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)


def _editable(nodes: Iterable[ast.AST], name: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node in a function that may be edited, with the dotted name of the innermost function."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _editable(node.body, f"{name}.{node.name}")
        elif not _is_left_alone(node):
            yield node, name
            yield from _editable(ast.iter_child_nodes(node), name)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # documentation
    return isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.Global)
