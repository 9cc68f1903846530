"""What every test shares: markers and order by folder, and what happens where a part is missing.

A folder of tests named after a part (docker, ray, vllm, verl) needs it, and so does a test that bears
its marker. Without the part such tests are skipped with the reason; in CI (CI=true), which provides
every part but a GPU, they fail.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).parent
IN_CI = os.environ.get("CI") == "true"
ORDER = ("unit", "docker", "ray", "vllm", "verl")  # the cheap ones first; other folders follow

hypothesis.settings.register_profile("default", deadline=None)  # a shared machine stalls at times
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if IN_CI else "default")


def _missing_package(name: str) -> str:
    return "" if importlib.util.find_spec(name) else f"the package {name} is not installed: run `make setup`"


def _missing_docker() -> str:
    if why := _missing_package("docker"):
        return why
    import docker

    try:
        client = docker.from_env(timeout=5)
        client.ping()
        client.close()
    except docker.errors.DockerException as error:
        return f"no Docker engine answers ({error}): start one, or point DOCKER_HOST at it"
    return ""


def _missing_gpu() -> str:
    if why := _missing_package("torch"):
        return why
    import torch

    return "" if torch.cuda.is_available() else "no CUDA GPU"


PARTS: dict[str, Callable[[], str]] = {
    "docker": _missing_docker,
    "ray": lambda: _missing_package("ray"),
    "vllm": lambda: _missing_package("vllm"),
    "verl": lambda: _missing_package("verl"),
    "gpu": _missing_gpu,
}


@functools.cache
def why_missing(part: str) -> str:
    """Empty if `part` is there, else what is wrong and how to mend it."""
    return PARTS[part]()


def _folder(path: Path) -> str:
    return path.relative_to(TESTS).parts[0] if path.is_relative_to(TESTS) else ""


class _Unavailable(pytest.Module):
    """A test file that can't be imported here, since it imports the part it needs."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(why_missing(_folder(self.path)), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    part = _folder(module_path)
    if part in PARTS and not IN_CI and why_missing(part):
        return _Unavailable.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (folder := _folder(item.path)) in PARTS:
            item.add_marker(folder)
    rank = {folder: place for place, folder in enumerate(ORDER)}
    items.sort(key=lambda item: rank.get(_folder(item.path), len(rank)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for part in PARTS:
        if item.get_closest_marker(part) and (why := why_missing(part)):
            if IN_CI and part != "gpu":
                pytest.fail(why, pytrace=False)
            pytest.skip(why)
