"""An untested verl is refused in words that name the remedy."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

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
