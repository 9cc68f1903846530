"""The contract on a real Docker engine, and what only containers promise."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import Mock, patch

import docker
import pytest
from docker.errors import APIError

from tests.support.resting_contract import *  # noqa: F403
from tests.support.sandbox_contract import *  # noqa: F403
from tests.support.sandbox_contract import LIMITS, SPEC, MakeSandbox, count_processes, started
from thunder_rollout.errors import ConfigError, SandboxFailed
from thunder_rollout.sandbox.config import ImagesConfig, SandboxConfig, select_backend
from thunder_rollout.sandbox.docker import DockerSandbox
from thunder_rollout.sandbox.docker_engine import DockerEngine, sweep_docker
from thunder_rollout.sandbox.fake_images import FakeImageEngine
from thunder_rollout.sandbox.image_store import ImageStore
from thunder_rollout.sandbox.protocol import Rest

RUN = f"test-docker-{os.getpid()}"


@pytest.fixture
def engine(client: docker.DockerClient) -> Iterator[DockerEngine]:
    engine = DockerEngine()
    yield engine
    left = [*containers(client, RUN), *containers(client, "cancelled"), *kept_images(client, RUN)]
    engine.close()
    assert left == []


@pytest.fixture
def make(engine: DockerEngine) -> MakeSandbox:
    return lambda spec: DockerSandbox(replace(spec, labels={"run": RUN} | spec.labels), engine)


def containers(client: docker.DockerClient, run: str) -> list[str]:
    return [found["Id"] for found in client.api.containers(all=True, filters={"label": f"thunder.run={run}"})]


def kept_images(client: docker.DockerClient, run: str) -> list[str]:
    return [found["Id"] for found in client.api.images(all=True, filters={"label": f"thunder.run={run}"})]


async def test_labels_and_limits_are_the_engines(make: MakeSandbox, client: docker.DockerClient) -> None:
    async with started(make, labels={"task": "t1", "program": "p#0"}):
        [container_id] = containers(client, RUN)
        state = client.api.inspect_container(container_id)
        labels, host = state["Config"]["Labels"], state["HostConfig"]
        assert labels["thunder.task"] == "t1"
        assert 0 < int(labels["thunder.lease"]) - time.time() <= LIMITS.ttl_s
        assert host["NetworkMode"] == "none"
        assert host["Memory"] == host["MemorySwap"] == LIMITS.memory_bytes
        assert (host["PidsLimit"], host["NanoCpus"]) == (LIMITS.pids, int(LIMITS.cpus * 1e9))
        assert host["AutoRemove"]
        assert host["LogConfig"]["Type"] == "none", "what PID 1's stdout brings would fill the engine's disk"


async def test_an_image_that_is_not_there_names_the_remedy(make: MakeSandbox) -> None:
    sandbox = make(replace(SPEC, image="thunder-no-such-image:1"))
    with pytest.raises(SandboxFailed, match="no image 'thunder-no-such-image:1'; pull or build"):
        await sandbox.start()


async def test_a_container_removed_from_outside_is_a_typed_error(
    make: MakeSandbox, client: docker.DockerClient
) -> None:
    async with started(make) as box:
        running = asyncio.create_task(box.exec("sleep 1000", timeout_s=100))
        await asyncio.sleep(0.5)
        [container_id] = containers(client, RUN)
        client.api.remove_container(container_id, force=True)
        async with asyncio.timeout(10):
            with pytest.raises(SandboxFailed):
                await running
            with pytest.raises(SandboxFailed):
                await box.exec("true", timeout_s=5)
        assert not await box.is_alive()


async def test_many_start_and_run_at_once(make: MakeSandbox) -> None:
    async def one(number: int) -> str:
        async with started(make, setup="mkdir -p /testbed") as box:
            return (await box.exec(f"sleep 0.5; echo {number}", timeout_s=30)).output

    assert await asyncio.gather(*(one(number) for number in range(8))) == [f"{number}\n" for number in range(8)]


async def test_one_whose_files_find_no_room_in_the_budget_is_frozen_instead(engine: DockerEngine) -> None:
    store = ImageStore(FakeImageEngine([]), ImagesConfig(budget_bytes=1_000_000))
    await store.start()
    make: MakeSandbox = lambda spec: DockerSandbox(replace(spec, labels={"run": RUN}), engine, images=store)
    async with started(make) as box:
        await box.exec("head -c 200000 /dev/urandom > one", timeout_s=10)
        assert await box.rest(Rest.STOP) is Rest.STOP
        held_bytes = store.stats().held_bytes
        assert 200_000 < held_bytes < 500_000
        await box.exec("head -c 2000000 /dev/urandom > two; sleep 1000 > /dev/null 2>&1 &", timeout_s=10)
        with patch.object(store, "keep", wraps=store.keep) as keep:
            for _ in range(3):
                assert await box.rest(Rest.STOP) is Rest.FREEZE
        keep.assert_awaited_once()  # it does not wake to be refused again
        assert await count_processes(box, "sleep") == 1
        await box.exec("rm two", timeout_s=10)
        assert await box.rest(Rest.STOP) is Rest.STOP
        assert store.stats().held_bytes > held_bytes
        assert (await box.exec("wc -c < one", timeout_s=10)).output == "200000\n"
    assert store.stats().held_bytes == 0
    await store.stop()


async def test_the_disk_is_watched_on_though_the_engine_refuses_a_look(
    make: MakeSandbox, engine: DockerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [APIError("busy"), SandboxFailed("the engine does not answer")]
    listed = engine.client.api.containers

    def refusing(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("size") and refusals:
            raise refusals.pop()
        return listed(*args, **kwargs)

    monkeypatch.setattr(engine.client.api, "containers", refusing)
    async with started(make) as box:
        fill = "for i in {1..400}; do head -c 2000000 /dev/zero > f$i; sleep 0.05; done"
        result = await box.exec(fill, timeout_s=60)
        assert "disk is full" in result.output and not result.timed_out
    assert refusals == []


async def test_one_that_starts_again_too_slowly_is_a_typed_error_and_the_next_try_leaves_one_container(
    make: MakeSandbox, client: docker.DockerClient
) -> None:
    async with started(make) as box:
        await box.rest(Rest.STOP)
        for limit_s in (0.001, 0.1):
            with patch.object(box, "_start_timeout_s", limit_s), pytest.raises(SandboxFailed, match="not ready after"):
                await box.exec("true", timeout_s=10)
        assert (await box.exec("cat a.py", timeout_s=10)).output == "x = 1\n"
        assert len(containers(client, RUN)) == 1


async def test_an_engine_that_keeps_a_container_or_an_image_is_asked_again_and_the_room_is_taken_until_then(
    engine: DockerEngine, client: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(FakeImageEngine([]), ImagesConfig(budget_bytes=100_000_000))
    await store.start()
    box = DockerSandbox(replace(SPEC, labels={"run": RUN}), engine, images=store)
    await box.start()
    for _ in range(2):
        assert await box.rest(Rest.STOP) is Rest.STOP
        await box.exec("true", timeout_s=10)
    for removal in ("remove_container", "remove_image"):
        with monkeypatch.context() as refusing:
            refusing.setattr(engine.client.api, removal, Mock(side_effect=APIError("busy")))
            with pytest.raises(SandboxFailed, match="busy"):
                await box.stop()
        assert kept_images(client, RUN)
        assert store.stats().held_bytes > 0
    assert containers(client, RUN) == []
    await box.stop()
    assert store.stats().held_bytes == 0
    await store.stop()


def test_the_engine_is_chosen_and_named() -> None:
    choice = select_backend(SandboxConfig(backend="auto"))
    assert choice.backend == "docker"
    assert "answers at" in choice.reason


def test_an_engine_that_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="docker_host"):
        DockerEngine("unix:///no/such.sock")


OWNER = """
import asyncio, sys
from thunder_rollout.sandbox.docker import DockerSandbox
from thunder_rollout.sandbox.docker_engine import DockerEngine
from thunder_rollout.sandbox.protocol import SandboxSpec

async def main():
    spec = SandboxSpec(image="thunder-toy:1", setup="mkdir -p /testbed", labels={"run": sys.argv[1]})
    box = DockerSandbox(spec, DockerEngine())
    await box.start()
    print("up", flush=True)
    await box.exec("trap '' TERM; sleep 4242", timeout_s=1000)

asyncio.run(main())
"""


def test_kill_9_of_the_owner_ends_the_container(client: docker.DockerClient) -> None:
    run = f"{RUN}-owner"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, run], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        assert containers(client, run)
    finally:
        owner.kill()
        owner.communicate()
    deadline_s = time.monotonic() + 15
    while containers(client, run) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert containers(client, run) == []


async def test_a_sweep_removes_the_dead_sessions_of_one_run_only(
    make: MakeSandbox, client: docker.DockerClient
) -> None:
    async with (
        started(make, setup="mkdir -p /testbed", labels={"run": RUN, "session": "old"}),
        started(make, setup="mkdir -p /testbed", labels={"run": RUN, "session": "new"}) as alive,
    ):
        assert await asyncio.to_thread(sweep_docker, None, "another", lambda session: True) == 0
        assert await asyncio.to_thread(sweep_docker, None, RUN, lambda session: session != "new") == 1
        assert (await alive.exec("echo on", timeout_s=10)).output == "on\n"


async def test_a_sweep_takes_frozen_containers_and_the_images_of_those_put_away(
    make: MakeSandbox, client: docker.DockerClient
) -> None:
    labels = {"run": RUN, "session": "old"}
    async with (
        started(make, setup="mkdir -p /testbed", labels=labels) as frozen,
        started(make, setup="mkdir -p /testbed; echo x > /testbed/x", labels=labels) as away,
    ):
        assert await frozen.rest(Rest.FREEZE) is Rest.FREEZE
        for _ in range(2):  # the second image lies on the first
            await away.rest(Rest.STOP)
            await away.read_file("/testbed/x")
        await away.rest(Rest.STOP)
        assert len(containers(client, RUN)) == 1
        assert kept_images(client, RUN)
        assert await asyncio.to_thread(sweep_docker, None, RUN, lambda session: session == "old") > 1
        assert containers(client, RUN) == kept_images(client, RUN) == []
        for box in (frozen, away):
            with pytest.raises(SandboxFailed):
                await box.exec("true", timeout_s=5)
