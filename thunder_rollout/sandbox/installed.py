"""Copies of a module among the installed packages that a local sandbox shows: a task made from it has its answer there.

Vendored copies count, and the wheels that Python keeps to install pip from, which hold many. The standard library
doesn't, and what other programs of the host bring along for themselves isn't looked for: a host that has such
programs is no place for tasks made from what they use; Docker is.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

_INSTALLED = ("lib/python*/*-packages", "local/lib/python*/*-packages")
_WHEELS = (
    "lib/python*/ensurepip/_bundled",
    "lib/python*/*-packages/virtualenv/seed/wheels/embed",
    "share/python-wheels",
)
_VENDORED = re.compile(r"vendor|extern|third_?party", re.IGNORECASE)
_MAX_DEPTH = 4  # below the folder of installed packages


@functools.lru_cache(maxsize=256)
def installed_copies(modules: tuple[str, ...], roots: tuple[Path, ...]) -> tuple[Path, ...]:
    """Folders and files under `roots` that hold one of these top-level modules; none lies in another. What is
    installed later in the life of this process is not among them."""
    found = {path for module in modules for folder in _import_folders(roots) for path in _copies(module, folder)}
    wheels = {path for root in roots for pattern in _WHEELS for path in root.glob(pattern) if found}
    copies = {path for path in found | wheels if not path.is_symlink()}
    return tuple(sorted(path for path in copies if not copies & set(path.parents)))


def _copies(module: str, folder: Path) -> Iterator[Path]:
    if (folder / module).is_dir():
        yield folder / module
    for pattern in (f"{module}.*", f"__pycache__/{module}.*"):
        yield from (path for path in folder.glob(pattern) if path.is_file())


@functools.lru_cache(maxsize=4)
def _import_folders(roots: tuple[Path, ...]) -> tuple[Path, ...]:
    installed = [path for root in roots for pattern in _INSTALLED for path in root.glob(pattern) if path.is_dir()]
    return (*installed, *(path for folder in installed for path in _vendored(folder, _MAX_DEPTH)))


def _vendored(folder: Path, depth: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        inside = [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in inside:
        if _VENDORED.search(path.name):
            yield path
        if depth > 1:
            yield from _vendored(path, depth - 1)
