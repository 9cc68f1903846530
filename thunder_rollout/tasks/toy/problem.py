"""A toy problem: a small package with known bugs, as the generator sees it.

`ToyProblem` knows the right and the wrong version of every file, so reference patch, hidden
tests, base commit and expert all come from it. It never runs a subprocess.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from thunder_rollout.tasks.toy.examples import render, render_call
from thunder_rollout.tasks.toy.templates import Bug

_INDENT = "    "


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One call: what it should return and what the function as it stands shows when printed."""

    arguments: tuple[Any, ...]
    expected: Any
    shown: str
    passes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyFunction:
    """`bug` is the one it has, if any; `other_bugs` could stand in the same line."""

    name: str
    params: tuple[str, ...]
    doc: str
    body: tuple[str, ...]
    examples: tuple[Example, ...]
    bug: Bug | None = None
    other_bugs: tuple[Bug, ...] = ()

    def source(self, bug: Bug | None) -> list[str]:
        lines = list(self.body)
        if bug is not None:
            lines[bug.line] = bug.bad
        head = [f"def {self.name}({', '.join(self.params)}):", f'{_INDENT}"""Return {self.doc}."""']
        return head + [_INDENT + line for line in lines]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyModule:
    name: str
    functions: tuple[ToyFunction, ...]

    def source(self, *, fixed: bool) -> list[str]:
        lines = [f'"""The {self.name}."""']
        for function in self.functions:
            lines += ["", "", *function.source(None if fixed else function.bug)]
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class BugSite:
    """Where a bug is in the repository: line `number` (from 1) of `path` should read `good`."""

    path: str
    module: str
    number: int
    good: str
    function: ToyFunction

    @property
    def example(self) -> Example:
        """The failing call that the problem statement shows."""
        return next(example for example in self.function.examples if not example.passes)

    @property
    def check_command(self) -> str:
        """A shell command that prints what the failing call gives now."""
        call = render_call(self.function.name, self.example.arguments)
        return f"python -c 'from {self.module} import {self.function.name}; print({call})'"


@dataclass(frozen=True, kw_only=True)
class ToyProblem:
    package: str
    modules: tuple[ToyModule, ...]
    names_file: bool  # whether the statement says where the function is

    def path(self, module: ToyModule) -> str:
        return f"{self.package}/{module.name}.py"

    @cached_property
    def bug_sites(self) -> tuple[BugSite, ...]:
        sites = []
        for module in self.modules:
            fixed, buggy = module.source(fixed=True), module.source(fixed=False)
            for function in module.functions:
                if function.bug is None:
                    continue
                start = buggy.index(function.source(function.bug)[0])
                number = next(i for i in range(start, len(buggy)) if fixed[i] != buggy[i])
                sites.append(
                    BugSite(
                        path=self.path(module),
                        module=f"{self.package}.{module.name}",
                        number=number + 1,
                        good=fixed[number],
                        function=function,
                    )
                )
        return tuple(sites)

    @property
    def statement(self) -> str:
        return "\n".join(self._describe(site) for site in self.bug_sites)

    def files(self, *, fixed: bool = False) -> dict[str, str]:
        """The whole repository, visible tests included; relative path to text."""
        files = {
            ".gitignore": "__pycache__/\n.pytest_cache/\n",
            "README.md": f"# {self.package}\n\nSmall functions. Run the tests with `python -m pytest`.\n",
            f"{self.package}/__init__.py": f'"""The {self.package} package."""\n',
        }
        for module in self.modules:
            files[self.path(module)] = _text(module.source(fixed=fixed))
        return files | self.test_files(hidden=False)

    def test_files(self, *, hidden: bool) -> dict[str, str]:
        """Tests of what works already; with `hidden` also of what should."""
        files = {}
        for module in self.modules:
            names = ", ".join(function.name for function in module.functions)
            lines = [f"from {self.package}.{module.name} import {names}"]
            for function in module.functions:
                for name, example in _named_tests(function):
                    if hidden or example.passes:
                        call = render_call(function.name, example.arguments)
                        lines += ["", "", f"def {name}():", f"{_INDENT}assert {call} == {render(example.expected)}"]
            files[_test_path(module)] = _text(lines)
        return files

    def test_ids(self, *, passing: bool) -> tuple[str, ...]:
        """The node ids of PASS_TO_PASS (`passing`) or FAIL_TO_PASS."""
        return tuple(
            f"{_test_path(module)}::{name}"
            for module in self.modules
            for function in module.functions
            for name, example in _named_tests(function)
            if example.passes == passing
        )

    def patch(self) -> str:
        """The reference fix as a git patch."""
        before, after = self.files(), self.files(fixed=True)
        chunks = []
        for path in sorted(before):
            if before[path] != after[path]:
                old, new = before[path].splitlines(keepends=True), after[path].splitlines(keepends=True)
                chunks.append(f"diff --git a/{path} b/{path}\n")
                chunks += difflib.unified_diff(old, new, f"a/{path}", f"b/{path}")
        return "".join(chunks)

    def _describe(self, site: BugSite) -> str:
        function, example = site.function, site.example
        where = f" in {site.path}" if self.names_file else ""
        call = render_call(function.name, example.arguments)
        return (
            f"{function.name}{where} is wrong. It should return {function.doc}.\n"
            f"print({call}) should show {example.expected} but shows {example.shown}."
        )


def _named_tests(function: ToyFunction) -> list[tuple[str, Example]]:
    return [(f"test_{function.name}_{number}", example) for number, example in enumerate(function.examples, 1)]


def _test_path(module: ToyModule) -> str:
    return f"tests/test_{module.name}.py"


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
