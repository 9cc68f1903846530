"""One local Ray cluster for all tests of this folder; actors are each test's own to kill."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

NUM_CPUS = 8  # logical: actors here mostly wait


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, object_store_memory=256 * 1024**2)
    yield
    ray.shutdown()
