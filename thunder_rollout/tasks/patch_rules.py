"""What an agent's patch may not say: the paths by which it could change its own judge.

Each is left out when the patch is applied; the rest of the patch counts.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

_JUDGE_NAMES = ("conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini", "setup.cfg",
                "pyproject.toml", "sitecustomize.py", "usercustomize.py")  # fmt: skip
_JUDGE_FOLDERS = ("pytest", "_pytest", "pluggy", "*.egg-info", "*.dist-info")
# git wildcards; `*` crosses folders
_JUDGE_PATTERNS = (
    *(pattern for name in _JUDGE_NAMES for pattern in (name, f"*/{name}")),
    *(f"{folder}/*" for folder in _JUDGE_FOLDERS),
    "*.pth",
    "*.pyc",
)
# What the runner imports before the tests; a file of this name in the folder it starts in would come first.
_RUNNER_MODULES = frozenset(sys.stdlib_module_names) | {
    "attr", "attrs", "colorama", "exceptiongroup", "importlib_metadata", "iniconfig", "packaging", "pluggy", "py",
    "pygments", "pytest", "tomli", "typing_extensions", "zipp", "thunder_seal",
}  # fmt: skip


def exclude_arguments(*, judged_paths: Iterable[str], base_names: Iterable[str]) -> str:
    """Arguments for `git apply`. `judged_paths` are the files and folders of the hidden tests and of
    those that decide; `base_names` is what lies at the top of the repository before the patch."""
    patterns = [*_JUDGE_PATTERNS, *_shadowing(frozenset(base_names))]
    for path in judged_paths:
        patterns += [_literal(path), f"{_literal(path)}/*", *_folders(path)]
    return " ".join(f"--exclude={shlex.quote(pattern)}" for pattern in dict.fromkeys(patterns))


def _shadowing(base_names: frozenset[str]) -> Iterator[str]:
    for module in sorted(_RUNNER_MODULES):
        if f"{module}.py" not in base_names and module not in base_names:
            yield f"{module}.*"
            yield f"{module}/__init__.*"


def _folders(path: str) -> Iterator[str]:
    """A patch has no entry for a folder: one of that name is a file or link in the folder's place."""
    for folder in PurePosixPath(path).parents:
        if str(folder) != ".":
            yield _literal(str(folder))


def _literal(path: str) -> str:
    """A git wildcard that matches `path` alone."""
    return "".join(f"\\{letter}" if letter in "*?[]\\" else letter for letter in path)
