"""Attempts to cheat and to break things, in containers and on their graders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.attacks import *  # noqa: F403
from tests.support.grading_attacks import *  # noqa: F403
from tests.support.sandbox_contract import MakeSandbox
from thunder_rollout.sandbox.docker import DockerSandbox
from thunder_rollout.sandbox.docker_engine import DockerEngine
from thunder_rollout.sandbox.images import ensure_toy_image

RUN = f"test-attacks-{os.getpid()}"


@pytest.fixture(scope="module")
def engine() -> Iterator[DockerEngine]:
    engine = DockerEngine()
    ensure_toy_image(engine.client)
    yield engine
    engine.close()


@pytest.fixture
def make(engine: DockerEngine) -> Iterator[MakeSandbox]:
    yield lambda spec: DockerSandbox(replace(spec, labels={"run": RUN} | spec.labels), engine)
    found = engine.client.api.containers(all=True, filters={"label": f"thunder.run={RUN}"})
    assert found == []
