"""A distribution is read and told apart, from wherever it comes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_package import FILES, write_distribution
from thunder_rollout.config import compose_config
from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.factory import package as module
from thunder_rollout.tasks.factory.config import FactoryConfig
from thunder_rollout.tasks.factory.operators import OPERATORS
from thunder_rollout.tasks.factory.package import Package, load_package


def load(path: Path, **settings: Any) -> Package:
    return load_package(FactoryConfig(package="tiny", path=str(path), **settings))


def test_code_and_tests_are_told_apart(tmp_path: Path) -> None:
    package = load(write_distribution(tmp_path))
    assert (package.version, package.import_root) == ("1.5", "src")
    assert package.python_path == "/testbed/src:/opt/site"
    assert package.test_files == ("tests/test_numbers.py", "tests/test_other.py")
    assert list(package.modules) == ["src/tiny/__init__.py", "src/tiny/numbers.py"]
    assert package.site == {"tiny-1.5.dist-info/METADATA": FILES["PKG-INFO"].encode()}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder_and_a_zip_are_read_alike(tmp_path: Path, kind: str) -> None:
    archive = write_distribution(tmp_path)
    shutil.unpack_archive(archive, tmp_path / "x", filter="data")
    other = tmp_path / "x/tiny-1.5"
    if kind == "zip":
        other = Path(shutil.make_archive(str(tmp_path / "tiny"), "zip", tmp_path / "x"))
    assert load(other) == load(archive)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path=.*nothing: can't be read"):
        load(tmp_path / "nothing")
    (tmp_path / "text.tar.gz").write_text("no archive")
    with pytest.raises(ConfigError, match="not an archive"):
        load(tmp_path / "text.tar.gz")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/code.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"holds no test_\*\.py"):
        load(tmp_path / "folder")


def test_what_pip_cant_get_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Looking\nERROR: No matching distribution\n")

    monkeypatch.setattr(module.subprocess, "run", fail)
    with pytest.raises(ConfigError, match=r"package=tiny==9: pip can't get it \(ERROR: No matching"):
        load_package(FactoryConfig(package="tiny", version="9"))


def test_requirements_lie_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "helper==1"
        target = Path(command[command.index("--target") + 1])
        target.mkdir()
        (target / "helper.py").write_text("x = 1\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", install)
    assert load(write_distribution(tmp_path), requirements=["helper==1"]).site["helper.py"] == b"x = 1\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"version": None}, "version=None: must be the package's pinned version"),
        ({"count": 0}, "count=0: must be >= 1"),
        ({"operators": ["magic"]}, "operators=.*must be some of comparison"),
        ({"max_failed_share": 2.0}, "max_failed_share=2.0"),
        ({"out": "x.csv"}, "out='x.csv': must be a .jsonl or .parquet file"),
    ],
)
def test_an_impossible_setting_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FactoryConfig(**{"package": "tiny", "version": "1", **settings})


def test_the_configuration_names_every_operator() -> None:
    assert list(compose_config("make_tasks", []).operators) == list(OPERATORS)
