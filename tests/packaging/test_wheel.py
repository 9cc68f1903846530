"""The wheel, installed elsewhere, has the command and every config."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "thunder_rollout", "conf", "tests")


def _run(command: list[str | Path], cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no earlier build's leftovers get in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    _run(pip, folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment that holds the wheel and sees the present one's dependencies."""
    venv = tmp_path_factory.mktemp("elsewhere") / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", venv], venv.parent)
    python = venv / "bin/python"
    purelib = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], venv.parent).strip()
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], venv.parent)
    return venv / "bin"


def test_wheel_holds_the_package_its_configs_and_the_license_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    configs = {f"thunder_rollout/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert configs
    assert configs <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"thunder_rollout"}
    assert any(name.endswith("LICENSE") for name in names)


def test_installed_command_prints_its_help(installed: Path, tmp_path: Path) -> None:
    assert "rollout" in _run([installed / "thunder-rollout", "--help"], tmp_path)


def test_installed_package_composes_its_own_configs(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "configs.py"
    shutil.copy(ROOT / "tests/support/configs.py", script)
    lines = _run([installed / "python", script], tmp_path).splitlines()
    assert lines
    assert all(line.startswith(str(installed.parent)) for line in lines)
