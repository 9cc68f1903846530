"""What an agent's patch may not say: the paths by which it could change its own judge.

Each is left out when the patch is applied; the rest of the patch counts.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from thunder_rollout.tasks.patches import moved_paths

_JUDGE_NAMES = ("conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini", "setup.cfg",
                "pyproject.toml", "sitecustomize.py", "usercustomize.py")  # fmt: skip
_JUDGE_FOLDERS = ("*.egg-info", "*.dist-info")
# git wildcards; `*` crosses folders
_JUDGE_PATTERNS = (
    *(pattern for name in _JUDGE_NAMES for pattern in (name, f"*/{name}")),
    *(f"{folder}/*" for folder in _JUDGE_FOLDERS),
    "*.pth",
    "*.pyc",
)
# What Python and the runner import before the tests; one of this name in a folder that is searched before the
# installed packages would come first. Where the repository has one already, it is the image's.
_RUNNER_MODULES = frozenset(sys.stdlib_module_names) | {
    "_pytest", "attr", "attrs", "colorama", "exceptiongroup", "importlib_metadata", "iniconfig", "packaging", "pluggy",
    "py", "pygments", "pytest", "sitecustomize", "tomli", "typing_extensions", "usercustomize", "zipp", "thunder_seal",
}  # fmt: skip


def judge_patterns(
    *, judged_paths: Iterable[str], import_folders: Iterable[str], base_paths: Iterable[str]
) -> list[str]:
    """git wildcards. `judged_paths` are the files and folders of the hidden tests and of those that decide;
    `import_folders` (relative, "." for the top) are where Python finds modules, and `base_paths` is what lies
    in them before the patch."""
    base = frozenset(base_paths)
    patterns = [*_JUDGE_PATTERNS, *(pattern for folder in import_folders for pattern in _shadowing(folder, base))]
    for path in judged_paths:
        patterns += [_literal(path), f"{_literal(path)}/*", *_folders(path)]
    return list(dict.fromkeys(patterns))


def exclude_arguments(patterns: Iterable[str]) -> str:
    """For `git apply`, which asks them of an entry's new name alone: see `moved_judges`."""
    return " ".join(f"--exclude={shlex.quote(pattern)}" for pattern in patterns)


def moved_judges(patch: bytes, patterns: Iterable[str]) -> list[str]:
    """What a patch moves that it may not even name."""
    any_of = re.compile("|".join(f"(?:{_expression(pattern)})" for pattern in patterns), re.DOTALL)
    moved = (str(PurePosixPath(path)) for path in moved_paths(patch.decode("utf-8", "surrogateescape")))
    return [path for path in moved if any_of.fullmatch(path)]


def _shadowing(folder: str, base_paths: frozenset[str]) -> Iterator[str]:
    for module in sorted(_RUNNER_MODULES):
        path = str(PurePosixPath(folder, module))
        if f"{path}.py" not in base_paths and path not in base_paths:
            yield f"{_literal(path)}.*"
            yield f"{_literal(path)}/__init__.*"


def _expression(pattern: str) -> str:
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    return "".join({"*": ".*", "?": "."}.get(part) or re.escape(part[-1]) for part in parts)


def _folders(path: str) -> Iterator[str]:
    """A patch has no entry for a folder: one of that name is a file or link in the folder's place."""
    for folder in PurePosixPath(path).parents:
        if str(folder) != ".":
            yield _literal(str(folder))


def _literal(path: str) -> str:
    """A git wildcard that matches `path` alone."""
    return "".join(f"\\{letter}" if letter in "*?[]\\" else letter for letter in path)
