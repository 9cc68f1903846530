"""Each operator's edits, and what none of them touches."""

from __future__ import annotations

import ast
import difflib

import pytest

from thunder_rollout.tasks.factory import operators
from thunder_rollout.tasks.factory.operators import OPERATORS, find_mutations


def edited(body: str, operator: str) -> list[str]:
    """The bodies of a function that `operator` makes of `body`."""
    source = "def f(a, b, c):\n" + "".join(f"    {line}\n" for line in body.split("\n"))
    found = [mutation.apply(source) for mutation in find_mutations(source, [operator])]
    return ["\n".join(line[4:] for line in text.splitlines()[1:]) for text in found]


@pytest.mark.parametrize(
    ("operator", "body", "wanted"),
    [
        ("comparison", "return a < b", ["return a <= b"]),
        ("comparison", "return a is  not b", ["return a is b"]),
        ("comparison", "return a not in b", ["return a in b"]),
        ("comparison", "return a <= b < c", ["return a < b < c", "return a <= b <= c"]),
        ("comparison", "return (a) == (b)", ["return (a) != (b)"]),
        ("arithmetic", "return a + b * c", ["return a - b * c", "return a + b + c"]),
        ("arithmetic", "a += b", ["a -= b"]),
        ("arithmetic", "return a // b", ["return a / b"]),
        ("arithmetic", "return '%s' % a", []),
        ("boolean", "return a and b and c", ["return a or b and c", "return a and b or c"]),
        ("negation", "return not a", ["return a"]),
        ("negation", "return -a", ["return a"]),
        ("negation", "if a:\n    b = c", ["if not a:\n    b = c"]),
        ("off_by_one", "return a + 1", ["return a"]),
        ("off_by_one", "return range(a, b)", ["return range(a, b - 1)"]),
        ("off_by_one", "return range(a)", ["return range(a - 1)"]),
        ("off_by_one", "return a[b:]", ["return a[b + 1:]"]),
        ("constant", "return a[0]", ["return a[1]"]),
        ("constant", "return True", ["return False"]),
        ("constant", "return 0x10", []),
        ("swapped_arguments", "return a(b, c)", ["return a(c, b)"]),
        ("swapped_arguments", "return a(b, b)", []),
        ("swapped_arguments", "return a(*b, c)", []),
        ("dropped_argument", "return a(b, key=c)", ["return a(b)"]),
        ("dropped_return", "return a(b)", ["a(b)"]),
        ("removed_branch", "if a:\n    return b\nreturn c", ["return c"]),
        ("removed_branch", "if a:\n    return b", []),
        ("removed_branch", "if a:\n    return b\nelse:\n    return c", []),
        ("loop_exit", "for a in b:\n    break", ["for a in b:\n    continue"]),
        ("lookalike", "return min(a)", ["return max(a)"]),
        ("lookalike", "return a.lstrip()", ["return a.rstrip()"]),
    ],
)
def test_an_operators_edits(operator: str, body: str, wanted: list[str]) -> None:
    assert sorted(edited(body, operator)) == sorted(wanted)


def test_every_operator_is_tried_above() -> None:
    marks = test_an_operators_edits.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(OPERATORS)


@pytest.mark.parametrize(
    "source",
    [
        "x = 1 < 2\n",
        "class A:\n    x = 1 + 2\n",
        "def f(a: 'x' = 1, *, b=True) -> 1:\n    '''a < b'''\n",
        "@decorated(1, 2)\ndef f():\n    pass\n",
        "def f(a):\n    raise ValueError(a + 1)\n",
        "def f(a):\n    assert a < 1\n",
        "def f(a):\n    return f'{a + 1}'\n",
        "def f(:\n",
    ],
)
def test_only_what_functions_do_is_touched(source: str) -> None:
    assert find_mutations(source, OPERATORS) == []


def test_methods_and_inner_functions_are_named() -> None:
    source = "class A:\n    def f(self):\n        def g(x):\n            return x < 1\n        return g\n"
    assert {mutation.function for mutation in find_mutations(source, ["comparison"])} == {"A.f.g"}


def test_text_that_is_not_ascii_is_edited_in_place() -> None:
    source = "def f(a):\n    return 'äöü', a < 'é', a > 'ß'\n"
    assert [mutation.apply(source) for mutation in find_mutations(source, ["comparison"])] == [
        source.replace("<", "<="),
        source.replace(">", ">="),
    ]


def test_every_edit_of_real_code_parses_and_is_short() -> None:
    assert operators.__file__ is not None
    with open(operators.__file__) as file:
        source = file.read()
    mutations = find_mutations(source, OPERATORS)
    assert len(mutations) > 100
    for mutation in mutations:
        changed = mutation.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
        lines = list(difflib.ndiff(source.splitlines(), changed.splitlines()))
        assert sum(line.startswith("- ") for line in lines) <= 3
