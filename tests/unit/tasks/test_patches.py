"""Patches made and turned round are what git makes of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from thunder_rollout.tasks.patches import (
    BadPatch,
    make_patch,
    moved_paths,
    patched_paths,
    reverse_patch,
    written_paths,
)


def git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("".join(f"line {i}\n" for i in range(40)))
    (tmp_path / "b.py").write_text("--- a dash\n+++ plus\nno newline at the end")
    (tmp_path / "c.py").write_text("to be moved\n" * 5)
    (tmp_path / "old.py").write_text("gone\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "base")
    return tmp_path


def change(folder: Path) -> None:
    (folder / "a.py").write_text("".join(f"line {i}\n" for i in range(40) if i not in (3, 30)) + "more\n")
    (folder / "b.py").write_text("-- a dash\n+++ plus\nstill none")
    (folder / "old.py").unlink()
    (folder / "new.py").write_text("fresh\n")
    (folder / "c.py").rename(folder / "moved.py")
    (folder / "a.py").chmod(0o755)
    git(folder, "add", "-A")


def test_a_reversed_patch_undoes_it(repository: Path) -> None:
    change(repository)
    patch = git(repository, "diff", "--cached", "-M")
    (repository / ".git/undo.patch").write_text(reverse_patch(patch))
    git(repository, "apply", "--index", ".git/undo.patch")
    assert git(repository, "status", "--porcelain") == ""
    assert reverse_patch(reverse_patch(patch)) == patch


@pytest.mark.parametrize("patch", ["", "hello\n", "diff --git a/x b/x\nGIT binary patch\nliteral 3\n"])
def test_what_cant_be_reversed_is_refused(patch: str) -> None:
    with pytest.raises(BadPatch):
        reverse_patch(patch)


def test_a_made_patch_applies(repository: Path) -> None:
    before = {name: (repository / name).read_text() for name in ("a.py", "b.py")}
    after = {"a.py": before["a.py"].replace("line 7", "line seven"), "b.py": before["b.py"] + "!"}
    (repository / ".git/made.patch").write_text(make_patch(before, after))
    git(repository, "apply", ".git/made.patch")
    assert {name: (repository / name).read_text() for name in after} == after


def test_a_patch_tells_all_that_it_touches(repository: Path) -> None:
    (repository / "b.py").write_text("++ b/x\nno newline at the end")
    (repository / "bin").write_bytes(bytes(range(256)))
    git(repository, "mv", "c.py", "sätze.py")
    (repository / "a.py").chmod(0o755)
    (repository / "old.py").unlink()
    git(repository, "add", "-A")
    patch = git(repository, "diff", "--cached", "--binary", "-M")
    assert set(patched_paths(patch)) == {"a.py", "b.py", "bin", "c.py", "sätze.py", "old.py"}
    assert set(written_paths(patch)) == {"b.py", "sätze.py"}
    assert moved_paths(patch) == ["c.py", "sätze.py"]
