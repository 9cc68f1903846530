"""A package's source distribution: fetched, unpacked in memory, and told apart into code and tests."""

from __future__ import annotations

import email.parser
import io
import logging
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.factory.config import FactoryConfig

logger = logging.getLogger(__name__)

WORKDIR = "/testbed"
SITE = "/opt/site"
_MAX_FILE_BYTES = 4 * 1024**2
_FETCH_TIMEOUT_S = 300.0
_NOT_SOURCE = {"benchmarks", "doc", "docs", "example", "examples", "scripts", "test", "testing", "tests", "tools"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """`files` maps paths in the distribution to contents; `site` what is installed beside it: the
    tests' requirements and the package's own metadata."""

    name: str
    version: str
    files: dict[str, bytes]
    site: dict[str, bytes]

    @cached_property
    def import_root(self) -> str:
        """The folder that its modules are imported from, "" for the top."""
        return "src" if any(path.startswith("src/") and path.endswith(".py") for path in self.files) else ""

    @property
    def python_path(self) -> str:
        return f"{PurePosixPath(WORKDIR, self.import_root)}:{SITE}"

    @cached_property
    def test_files(self) -> tuple[str, ...]:
        """What pytest collects by default."""
        return tuple(
            path for path, content in sorted(self.files.items()) if _is_test(PurePosixPath(path)) and _is_text(content)
        )

    @cached_property
    def modules(self) -> dict[str, str]:
        """Importable code that is not about tests; path to text."""
        return {
            path: content.decode()
            for path, content in sorted(self.files.items())
            if self._is_module(PurePosixPath(path)) and _is_text(content)
        }

    def _is_module(self, path: PurePosixPath) -> bool:
        if path.suffix != ".py" or path.name in ("setup.py", "conftest.py") or _is_test(path):
            return False
        inside = path.relative_to(self.import_root) if path.is_relative_to(self.import_root) else None
        if inside is None or _NOT_SOURCE & set(inside.parts[:-1]):
            return False
        root = PurePosixPath(self.import_root)
        return all(str(root / folder / "__init__.py") in self.files for folder in inside.parents if folder.name)


def load_package(config: FactoryConfig) -> Package:
    """Fetch or read the distribution. Blocking; raises `ConfigError` that names the field."""
    with tempfile.TemporaryDirectory(prefix="thunder-make-tasks-") as folder:
        path = Path(config.path) if config.path else _fetch(config, Path(folder))
        files = _read(path)
        site = _install(config.requirements, Path(folder) / "site") if config.requirements else {}
    metadata = email.parser.BytesHeaderParser().parsebytes(files.get("PKG-INFO", b""))
    version = metadata["Version"] or config.version or "0"
    if "PKG-INFO" in files:  # so that importlib.metadata finds it as if it were installed
        site[f"{config.package.replace('-', '_')}-{version}.dist-info/METADATA"] = files["PKG-INFO"]
    package = Package(name=config.package, version=version, files=files, site=site)
    if not package.test_files or not package.modules:
        what = "test_*.py" if package.modules else "module"
        raise ConfigError(f"package={config.package}: its distribution holds no {what}; choose another package")
    return package


def _fetch(config: FactoryConfig, folder: Path) -> Path:
    wanted = f"{config.package}=={config.version}"
    logger.info("fetching the source distribution of %s", wanted)
    _pip(["download", "--no-deps", "--no-binary", config.package, "--dest", str(folder), wanted], f"package={wanted}")
    return next(path for path in folder.iterdir() if path.name.endswith((".tar.gz", ".zip")))


def _install(requirements: list[str], folder: Path) -> dict[str, bytes]:
    """Pure Python alone: the image's interpreter need not be this one."""
    pure = ["--only-binary=:all:", "--implementation", "py", "--abi", "none", "--platform", "any"]
    _pip(["install", "--target", str(folder), *pure, *requirements], f"requirements={requirements}")
    return _read_folder(folder)


def _pip(arguments: list[str], field: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise ConfigError(
            f"{field}: pip can't get it ({lines[-1] if lines else 'no message'}); correct it, or use path"
        )


def _read(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        return _read_folder(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"path={path}: can't be read ({error}); give an archive or a folder") from error
    files = _read_zip(content) if path.suffix == ".zip" else _read_tar(content, path)
    return {name.partition("/")[2]: data for name, data in files.items() if name.partition("/")[2]}


def _read_folder(path: Path) -> dict[str, bytes]:
    inside = (found for found in sorted(path.rglob("*")) if found.is_file() and not found.is_symlink())
    return {
        str(found.relative_to(path)): found.read_bytes()
        for found in inside
        if not {".git", "__pycache__"} & set(found.parts) and found.stat().st_size <= _MAX_FILE_BYTES
    }


def _read_tar(content: bytes, path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if member.isfile() and member.size <= _MAX_FILE_BYTES and _is_inside(member.name):
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular file has one
                    files[str(PurePosixPath(member.name))] = stream.read()
    except tarfile.TarError as error:
        raise ConfigError(f"path={path}: not an archive ({error}); give a .tar.gz, a .zip or a folder") from error
    return files


def _read_zip(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {
            member.filename: archive.read(member)
            for member in archive.infolist()
            if not member.is_dir() and member.file_size <= _MAX_FILE_BYTES and _is_inside(member.filename)
        }


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_test(path: PurePosixPath) -> bool:
    return path.suffix == ".py" and (path.name.startswith("test_") or path.name.endswith("_test.py"))


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\r" not in content
