from __future__ import annotations

import pytest

from thunder_rollout.sandbox.local import local_unavailable
from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.toy import generate


@pytest.fixture(scope="session")
def toy_task() -> Task:
    return generate(seed=0, count=1, difficulty="easy")[0]


@pytest.fixture(scope="session")
def local_sandboxes() -> None:
    if why := local_unavailable():
        pytest.skip(f"no local sandboxes here: {why}")
