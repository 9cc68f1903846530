"""Weights and the freezer, in folders that look like a cgroup hierarchy."""

from __future__ import annotations

from pathlib import Path

import pytest

from thunder_rollout.sandbox import cgroups


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)


def test_the_weight_of_all_sandboxes_together(tmp_path: Path) -> None:
    v1, v2 = tmp_path / "v1", tmp_path / "v2"
    for name in ("cpu", "memory", "freezer"):
        (v1 / name).mkdir(parents=True)
        (v1 / name / "cgroup.procs").touch()
    v2.mkdir()
    (v2 / "cgroup.controllers").touch()
    assert cgroups.weigh("all", 256, v1) and cgroups.weigh("all", 256, v2)
    assert (v1 / "cpu" / "all" / "cpu.shares").read_text() == "256"
    assert not (v1 / "memory" / "all").exists()
    assert (v2 / "all" / "cpu.weight").read_text() == "25"
    assert not cgroups.weigh("all", 256, tmp_path / "missing")


def test_where_there_are_no_cgroups_of_ours_nothing_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.controllers").touch()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert not cgroups.weigh("all", 256, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "cgroup.controllers"]


def test_a_group_that_can_not_be_removed_keeps_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups._remove_patiently, "__defaults__", (0.0,))
    (tmp_path / "cgroup.controllers").touch()
    sessions = [tmp_path / "thunder" / "r" / f"{name}-box" for name in ("a", "b", "c", "living")]
    for folder in sessions:
        folder.mkdir(parents=True)
    (sessions[1] / "cgroup.procs").mkdir()  # can't be read
    assert cgroups.sweep("r", lambda session: session != "living", tmp_path) == 3
    assert [folder.exists() for folder in sessions] == [False, True, False, True]


@pytest.mark.parametrize(
    ("file", "told", "frozen", "thawed"),
    [
        ("freezer.state", "freezer.state", "FROZEN", "THAWED"),
        ("cgroup.freeze", "cgroup.events", "frozen 1", "frozen 0"),
    ],
)
def test_freezing_and_thawing(tmp_path: Path, file: str, told: str, frozen: str, thawed: str) -> None:
    other = tmp_path / "memory"
    other.mkdir()
    (tmp_path / file).touch()
    group = cgroups.Cgroup(folders=(other, tmp_path))
    assert group.freeze()
    (tmp_path / told).write_text(frozen)
    assert group.is_frozen()
    group.thaw()
    (tmp_path / told).write_text(thawed)
    assert not group.is_frozen()
    assert not cgroups.Cgroup(folders=(other,)).freeze()
