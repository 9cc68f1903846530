"""What the tests of this folder share: a client of the Docker engine, which has the toy image."""

from __future__ import annotations

from collections.abc import Iterator

import docker
import pytest

from thunder_rollout.sandbox.images import ensure_toy_image


@pytest.fixture(scope="module")
def client() -> Iterator[docker.DockerClient]:
    client = docker.from_env(timeout=300)
    ensure_toy_image(client)
    yield client
    client.close()
