"""An untested verl is refused in words that name the remedy."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError

import pytest

from thunder_rollout import verl_adapter
from thunder_rollout.verl_adapter import versions


def test_the_tested_verl_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.9.1")
    versions.require_tested_verl()


def test_another_verl_is_refused_with_both_versions_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.8.0")
    with pytest.raises(versions.UnsupportedVerl, match=r"verl 0\.8\.0 is installed.*pip install verl==0\.9\.1"):
        versions.require_tested_verl()


def test_no_verl_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(versions.UnsupportedVerl, match="verl is not installed"):
        versions.require_tested_verl()


@pytest.mark.parametrize("name", ["ProgramRouter", "Manager"])
def test_what_verl_makes_by_name_is_refused_before_it_is_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another verl may not have what they import."""
    monkeypatch.setattr(versions, "version", lambda name: "0.8.0")
    for module in ("router.actor", "manager"):
        monkeypatch.setitem(sys.modules, f"thunder_rollout.verl_adapter.{module}", None)
    with pytest.raises(versions.UnsupportedVerl):
        getattr(verl_adapter, name)
