"""The sandbox host as a Ray actor: what crosses it, and who dies with whom."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from tests.support.sandbox_contract import SPEC
from thunder_rollout.errors import ConfigError, SandboxFailed
from thunder_rollout.sandbox.actor import create_sandbox_host, fleet_of
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.fleet import REPORT_S
from thunder_rollout.sandbox.remote import PlacedSandbox, RemoteSandboxHost, RemoteSandboxHosts

pytestmark = pytest.mark.usefixtures("ray_cluster")
RUN = f"test-ray-{os.getpid()}"


@pytest.fixture
async def host() -> AsyncIterator[RemoteSandboxHost]:
    handle = create_sandbox_host(SandboxConfig(backend="local"), run=RUN, owner_pid=os.getpid())
    host = RemoteSandboxHost(handle)
    assert await host.start([]) == "local"
    yield host
    with contextlib.suppress(SandboxFailed):
        await host.stop()
    ray.kill(handle)
    assert sandbox_processes() == []


def sandbox_processes() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"thunder-sandbox:{RUN}:" in (entry / "cmdline").read_text():
                found.append(entry.name)
    return found


async def test_a_program_works_in_its_prepared_sandbox(host: RemoteSandboxHost) -> None:
    assert await host.prepare("p", SPEC) > 0
    box = host.sandbox("p", SPEC)
    await box.start()
    assert (await box.exec("cat a.py", timeout_s=10)).output == "x = 1\n"
    await box.write_file("/testbed/a.py", b"x = 2\n")
    assert await box.read_file("/testbed/a.py") == b"x = 2\n"
    assert b"+x = 2" in await box.diff("HEAD")
    assert await host.num_running() == 1
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(host.keep_alive(), 0.5)
    hung = await box.exec("sleep 1000", timeout_s=0.5)
    assert hung.timed_out
    await box.stop()
    await box.stop()
    assert await host.num_running() == 0


async def test_errors_come_out_as_themselves(host: RemoteSandboxHost) -> None:
    box = host.sandbox("p", SPEC)
    with pytest.raises(SandboxFailed, match="acquire it first"):
        await box.exec("true", timeout_s=1)
    await box.start()
    with pytest.raises(FileNotFoundError):
        await box.read_file("/missing")
    with pytest.raises(SandboxFailed, match="exit code 7"):
        await host.prepare("q", replace(SPEC, setup="exit 7"))


async def test_many_programs_at_once_and_a_release_from_elsewhere(host: RemoteSandboxHost) -> None:
    boxes = [host.sandbox(f"p{i}", SPEC) for i in range(6)]
    await asyncio.gather(*(box.start() for box in boxes))
    results = await asyncio.gather(*(box.exec("sleep 0.3; echo on", timeout_s=30) for box in boxes))
    assert {result.output for result in results} == {"on\n"}
    await asyncio.gather(*(host.release(f"p{i}") for i in range(6)))
    with pytest.raises(SandboxFailed):
        await boxes[0].exec("true", timeout_s=1)


async def test_cancelling_a_command_ends_it_there(host: RemoteSandboxHost) -> None:
    box = host.sandbox("p", SPEC)
    await box.start()
    running = asyncio.create_task(box.exec("sleep 1000", timeout_s=100))
    await asyncio.sleep(0.5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(15):
        assert (await box.exec("echo on", timeout_s=10)).output == "on\n"


async def test_a_dead_host_is_a_typed_error_and_takes_its_sandboxes_along() -> None:
    handle = create_sandbox_host(SandboxConfig(backend="local"), run=RUN, owner_pid=os.getpid())
    host = RemoteSandboxHost(handle)
    await host.start([])
    box = host.sandbox("p", SPEC)
    await box.start()
    assert sandbox_processes()
    ray.kill(handle)
    with pytest.raises(SandboxFailed, match="host actor is gone"):
        await box.exec("true", timeout_s=5)
    await asyncio.to_thread(wait_until_nothing_is_left)


async def test_programs_of_a_dead_host_fail_and_new_ones_go_to_the_other() -> None:
    handles = [create_sandbox_host(SandboxConfig(backend="local"), run=RUN, owner_pid=os.getpid()) for _ in range(2)]
    fleet = fleet_of(handles)
    hosts = RemoteSandboxHosts(fleet)
    try:
        assert await hosts.start([]) == "local"
        hosts.expect([SPEC.image])
        boxes = [hosts.sandbox(f"p{i}", SPEC) for i in range(4)]
        await hosts.prepare("p0", SPEC)
        await asyncio.gather(*(box.start() for box in boxes))
        assert [await RemoteSandboxHost(handle).num_running() for handle in handles] == [2, 2]
        ray.kill(handles[1])
        outcomes = await asyncio.gather(*(box.exec("echo on", timeout_s=10) for box in boxes), return_exceptions=True)
        assert sum(isinstance(outcome, SandboxFailed) for outcome in outcomes) == 2
        await asyncio.gather(*(box.stop() for box in boxes))
        again = [hosts.sandbox(f"p{i} again", SPEC) for i in range(4)]
        await asyncio.gather(*(box.start() for box in again))
        assert await RemoteSandboxHost(handles[0]).num_running() == 4
        await asyncio.sleep(2 * REPORT_S)
        assert await hosts.num_running() == 4
    finally:
        await hosts.stop()
        for handle in (*handles, fleet.fleet):
            ray.kill(handle)
    await asyncio.to_thread(wait_until_nothing_is_left)


async def test_a_killed_host_comes_back_without_what_it_had() -> None:
    handle = create_sandbox_host(SandboxConfig(backend="local"), run=RUN, owner_pid=os.getpid())
    fleet = fleet_of([handle])
    hosts = RemoteSandboxHosts(fleet)
    try:
        await hosts.start([])
        box = hosts.sandbox("p", SPEC)
        await box.start()
        os.kill(await handle.pid.remote(), signal.SIGKILL)
        with pytest.raises(SandboxFailed):
            await box.exec("echo on", timeout_s=10)
        async with asyncio.timeout(60):
            await _started(hosts.sandbox("q", SPEC))
        with pytest.raises(SandboxFailed):
            await box.exec("echo on", timeout_s=10)
        assert await RemoteSandboxHost(handle).num_running() == 1
        await box.stop()
    finally:
        await hosts.stop()
        for actor in (handle, fleet.fleet):
            ray.kill(actor)
    await asyncio.to_thread(wait_until_nothing_is_left)


async def _started(box: PlacedSandbox) -> None:
    """As a program does that is tried again."""
    while True:
        try:
            await box.start()
            assert (await box.exec("cat a.py", timeout_s=10)).output == "x = 1\n"
            return
        except SandboxFailed:
            await asyncio.sleep(0.2)


def wait_until_nothing_is_left() -> None:
    """The reaper outlives the actor and takes the cgroups away."""
    deadline_s = time.monotonic() + 20
    while left := sandbox_processes() + [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/thunder/{RUN}")]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)


async def test_a_backend_that_is_not_there_is_a_config_error() -> None:
    handle = create_sandbox_host(SandboxConfig(backend="docker", docker_host="unix:///no/such.sock"), run=RUN)
    with pytest.raises(ConfigError, match=r"sandbox.backend=docker"):
        await RemoteSandboxHost(handle).start([])
    ray.kill(handle)
