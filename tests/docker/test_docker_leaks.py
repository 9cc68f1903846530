"""Nothing of a container outlives it, its host or its driver, however they end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import docker
import pytest

from tests.support.cycles import growth, held_here
from tests.support.killing import GONE_WITHIN_S, VICTIMS, seconds_until_gone
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.docker_engine import sweep_docker
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.images import TOY_IMAGE
from thunder_rollout.sandbox.protocol import SandboxSpec
from thunder_rollout.sandbox.session import new_session

RUN = f"test-leaks-{os.getpid()}"


def labelled(client: docker.DockerClient) -> list[str]:
    filters = {"label": f"thunder.run={RUN}"}
    api = client.api
    found = [one["Id"] for one in [*api.containers(all=True, filters=filters), *api.images(filters=filters)]]
    found += [one["Name"] for one in api.volumes(filters=filters)["Volumes"] or []]
    return found + [one["Id"] for one in api.networks(filters=filters)]


def counts(client: docker.DockerClient) -> dict[str, int]:
    api = client.api
    return held_here() | {
        "containers": len(api.containers(all=True)),
        "volumes": len(api.volumes()["Volumes"] or []),
        "networks": len(api.networks()),
        "images": len(api.images(all=True)),
    }


@pytest.fixture
def volume_image(client: docker.DockerClient) -> Iterator[str]:
    """The toy image with an anonymous volume in it."""
    tag = "thunder-test-volume:1"
    made = client.api.create_container(TOY_IMAGE, ["true"])
    client.api.commit(made["Id"], *tag.split(":"), changes="VOLUME /data")
    client.api.remove_container(made["Id"])
    yield tag
    client.api.remove_image(tag, force=True)


@pytest.mark.parametrize("victims", VICTIMS)
def test_kill_9_leaves_nothing(client: docker.DockerClient, victims: str) -> None:
    took_s = seconds_until_gone("docker", RUN, victims, lambda: labelled(client))
    print(f"docker: kill -9 of {victims}: gone after {took_s:.1f} s")
    assert took_s < GONE_WITHIN_S


async def test_sandboxes_in_and_out_leave_nothing(client: docker.DockerClient, volume_image: str) -> None:
    host = SandboxHost(SandboxConfig(backend="docker"), run=RUN)
    try:
        await host.start([volume_image])
        spec = SandboxSpec(image=volume_image, setup="mkdir -p /testbed; echo x > /data/x")
        assert await growth(host, spec, lambda: counts(client)) == {}
    finally:
        await host.stop()
    assert labelled(client) == []


async def test_a_container_with_volumes_is_frozen_instead_of_put_away(volume_image: str) -> None:
    host = SandboxHost(SandboxConfig(backend="docker", when_paused="stop"), run=RUN)
    try:
        await host.start([volume_image])
        await host.acquire("p", SandboxSpec(image=volume_image, setup="mkdir -p /testbed; echo kept > /data/x"))
        assert not await host.rest("p")
        assert (await host.exec("p", "cat /data/x", timeout_s=10)).output == "kept\n"
    finally:
        await host.stop()


def test_a_sweep_takes_volumes_and_networks_too(client: docker.DockerClient) -> None:
    session = new_session()
    labels = {"thunder.run": RUN, "thunder.session": session}
    client.api.create_volume(f"{RUN}-volume", labels=labels)
    try:
        assert sweep_docker(None, RUN, lambda found: found == "another") == 0
        assert sweep_docker(None, None, lambda found: found == session) == 1
        assert labelled(client) == []
    finally:
        sweep_docker(None, RUN, lambda found: True)
