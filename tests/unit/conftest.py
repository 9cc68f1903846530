"""Unit tests run without a Ray cluster: whatever needs one belongs in tests/ray."""

from __future__ import annotations

from typing import NoReturn

import pytest


@pytest.fixture(autouse=True)
def no_ray_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import ray
    except ImportError:
        return

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        pytest.fail("a unit test called ray.init: test the plain class, or move the test to tests/ray")

    monkeypatch.setattr(ray, "init", refuse)
