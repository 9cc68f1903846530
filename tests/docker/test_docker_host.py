"""`SandboxHost` on a real engine: it chooses Docker, builds the image, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import docker
import pytest

from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.images import TOY_IMAGE
from thunder_rollout.sandbox.protocol import SandboxLimits, SandboxSpec

SPEC = SandboxSpec(image=TOY_IMAGE, setup="mkdir -p /testbed")

HOST = """
import asyncio, sys
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.protocol import SandboxSpec

async def main():
    host = SandboxHost(SandboxConfig(), run=sys.argv[1])
    await host.start(["thunder-toy:1"])
    spec = SandboxSpec(image="thunder-toy:1", setup="mkdir -p /testbed")
    await asyncio.gather(*(host.acquire(f"p{i}", spec) for i in range(3)))
    print("up", flush=True)
    await asyncio.gather(*(host.acquire(f"q{i}", spec) for i in range(8)))

asyncio.run(main())
"""


def containers(run: str) -> list[str]:
    client = docker.from_env()
    try:
        return [found["Id"] for found in client.api.containers(all=True, filters={"label": f"thunder.run={run}"})]
    finally:
        client.close()


async def test_a_run_uses_docker_and_leaves_nothing() -> None:
    run = f"test-host-{os.getpid()}"
    host = SandboxHost(SandboxConfig(), run=run)
    try:
        assert (await host.start([TOY_IMAGE])).backend == "docker"
        await host.prepare("p", SPEC)
        assert (await host.exec("p", "echo on", timeout_s=10)).output == "on\n"
        async with host.fresh(SPEC) as box:
            assert len(await asyncio.to_thread(containers, run)) == 2
            assert (await box.exec("pwd", timeout_s=10)).output == "/testbed\n"
        starting = asyncio.create_task(host.prepare("q", SPEC))
        await asyncio.sleep(0.1)
        await host.release("q")
        await asyncio.gather(starting, return_exceptions=True)
    finally:
        await host.stop()
    assert await asyncio.to_thread(containers, run) == []


async def test_a_limit_above_the_engines_cpus_is_told_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    config = SandboxConfig(limits=SandboxLimits(cpus=1000.0))
    host = SandboxHost(config, run=f"test-cpus-{os.getpid()}")
    try:
        await host.start([TOY_IMAGE])
        assert "sandbox.limits.cpus=1000" in caplog.text
    finally:
        await host.stop()


def test_kill_9_in_the_middle_of_starts_leaves_no_container() -> None:
    run = f"test-kill-{os.getpid()}"
    host = subprocess.Popen([sys.executable, "-c", HOST, run], stdout=subprocess.PIPE)
    try:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
    finally:
        host.send_signal(signal.SIGKILL)
        host.communicate()
    deadline_s = time.monotonic() + 20
    quiet_since_s = time.monotonic()
    while time.monotonic() < deadline_s and time.monotonic() - quiet_since_s < 3:
        if containers(run):
            quiet_since_s = time.monotonic()
        time.sleep(0.2)
    assert containers(run) == []
