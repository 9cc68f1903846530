"""What the agent is told: tests that fail and how, never where the bug is or what mends it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

_MAX_SHOWN = 2
_MAX_TEST_LINES = 40
_MAX_HELPER_LINES = 10
_MAX_ERROR_LINES = 8
_MAX_LINE_CHARACTERS = 240
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def problem_statement(package: str, failing: Sequence[str], sources: Mapping[str, str], told: Mapping[str, str]) -> str:
    """`failing` are node ids, `sources` the test files' texts, `told` pytest's account by node id."""
    count = "A check fails" if len(failing) == 1 else f"{len(failing)} checks fail"
    functions = {test.partition("[")[0]: test for test in reversed(failing)}  # one case each, the first
    shown = list(functions.values())[::-1][:_MAX_SHOWN]
    parts = [f"{package} doesn't behave as it should. {count} that ought to pass."]
    parts += [_describe(test, sources, told.get(test, "")) for test in shown]
    parts.append("Find the cause in the package's own code and mend it; the checks are right.")
    return "\n\n".join(parts)


def _describe(test: str, sources: Mapping[str, str], account: str) -> str:
    lines = [line[1:].strip() for line in account.splitlines() if line.startswith("E ")]
    errors = "\n".join(_ADDRESS.sub("0x...", line)[:_MAX_LINE_CHARACTERS] for line in lines[:_MAX_ERROR_LINES])
    case = test.rpartition("::")[2]
    which = f" (case `{case}`)" if "[" in case else ""
    check = f"This check{which}\n\n```python\n{_source(test, sources)}\n```"
    return f"{check}\n\nends with\n\n```\n{errors or 'an error'}\n```"


def _source(test: str, sources: Mapping[str, str]) -> str:
    """The test function's text under the imports and helpers it needs; its name where it can't be found."""
    path, _, name = test.partition("::")
    text = sources.get(path, "")
    names = name.partition("[")[0].split("::")
    tree = ast.parse(text)  # pytest has imported it
    body: list[ast.stmt] = tree.body
    found: ast.stmt | None = None
    for part in names:
        found = next((node for node in body if getattr(node, "name", None) == part), None)
        if found is None:
            return name
        body = getattr(found, "body", [])
    assert found is not None  # a node id has a name
    lines = text.splitlines()[found.lineno - 1 : found.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    shown = [line[indent:] for line in lines[:_MAX_TEST_LINES]]
    if len(lines) > _MAX_TEST_LINES:
        shown.append("    ...")
    context = _context(tree, text, set(re.findall(r"\w+", "\n".join(shown))))
    return "\n".join([*context, *([""] if context else []), *shown])


def _context(tree: ast.Module, text: str, used: set[str]) -> list[str]:
    """The file's imports and short helpers that have one of the `used` names."""
    parts = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name for name in node.names if _bound(name) in used or name.name == "*"]
            if names:
                node.names = names
                parts.append(ast.unparse(node))
        elif isinstance(node, ast.FunctionDef | ast.Assign) and _defined(node) in used:
            helper = ast.get_source_segment(text, node) or ""
            if helper.count("\n") < _MAX_HELPER_LINES and not _defined(node).startswith("test"):
                parts.append(helper)
    return parts


def _bound(name: ast.alias) -> str:
    return (name.asname or name.name).partition(".")[0]


def _defined(node: ast.FunctionDef | ast.Assign) -> str:
    if isinstance(node, ast.FunctionDef):
        return node.name
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""
