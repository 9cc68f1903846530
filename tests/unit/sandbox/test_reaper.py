from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox import reaper
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.local import LocalSandbox, local_unavailable
from thunder_rollout.sandbox.protocol import SandboxSpec
from thunder_rollout.sandbox.session import new_session

pytestmark = pytest.mark.slow

needs_local = pytest.mark.skipif(bool(local_unavailable()), reason=local_unavailable() or "")


def test_waiting_ends_with_the_first_process() -> None:
    short = subprocess.Popen(["sleep", "0.2"])
    began_s = time.monotonic()
    reaper.wait_for_end([os.getpid(), short.pid])
    assert 0.1 < time.monotonic() - began_s < 5
    short.wait()
    reaper.wait_for_end([short.pid, os.getpid()])


def test_waiting_ends_when_heartbeats_stop_and_not_before_the_first() -> None:
    beats, sender = os.pipe()
    waiting = threading.Thread(
        target=reaper.wait_for_end, args=([os.getpid()],), kwargs={"beats": beats, "lost_after_s": 0.5}
    )
    waiting.start()
    time.sleep(0.8)
    for _ in range(5):
        assert waiting.is_alive()
        os.write(sender, b".")
        time.sleep(0.2)
    assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()
    os.close(sender)
    reaper.wait_for_end([os.getpid()], beats=beats, lost_after_s=100)
    os.close(beats)


@needs_local
async def test_it_reaps_the_session_when_its_owner_is_gone_and_no_other() -> None:
    run = f"test-reaper-{os.getpid()}"
    dead, alive = (
        LocalSandbox(SandboxSpec(image="", labels={"run": run, "session": session})) for session in ("dead", "alive")
    )
    await asyncio.gather(dead.start(), alive.start())
    owner = await asyncio.create_subprocess_exec("sleep", "1000")
    process = await asyncio.to_thread(
        lambda: reaper.Reaper(run=run, session="dead", backend="local", docker_host=None, pids=[owner.pid])
    )
    try:
        assert process.is_running()
        owner.kill()
        await owner.wait()
        assert dead._process is not None
        await asyncio.wait_for(dead._process.wait(), 10)
        await asyncio.to_thread(wait_until, lambda: not process.is_running())
        assert (await alive.exec("echo on", timeout_s=10)).output == "on\n"
    finally:
        process.stop()
        await asyncio.gather(dead.stop(), alive.stop())
        reaper.sweep(run, backend="local", docker_host=None)


@pytest.mark.parametrize("failure", [SandboxFailed("1 leftover stays"), OSError("the engine refuses")])
def test_it_tries_again_whatever_went_wrong_with_a_sweep(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Exception | int] = [failure, 2, failure, 0]
    monkeypatch.setattr(reaper, "QUIET_S", 0.02)
    monkeypatch.setattr(reaper, "_POLL_S", 0.001)

    def sweep(*args: object, **kwargs: object) -> int:
        outcome = outcomes.pop(0) if outcomes else 0
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(reaper, "sweep", sweep)
    reaper.reap("run", "session", backend="docker", docker_host=None)
    assert outcomes == []


@needs_local
async def test_a_sweep_that_fails_keeps_no_host_from_its_start_and_leaves_its_end_to_the_reaper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*args: object, **kwargs: object) -> int:
        raise SandboxFailed("1 leftover stays")

    monkeypatch.setattr("thunder_rollout.sandbox.host.sweep", refused)
    monkeypatch.setattr("thunder_rollout.sandbox.host.sweep_leftovers", refused)
    host = SandboxHost(SandboxConfig(backend="local"), run=f"test-refused-{os.getpid()}")
    await host.start()
    standing_by = host._reaper
    assert standing_by is not None
    try:
        await host.stop()
        assert standing_by.is_running()
    finally:
        standing_by.stop()


def wait_until(done: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


HOST = """
import asyncio, sys
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.protocol import SandboxSpec
from thunder_rollout.sandbox.session import new_session

async def main():
    host = SandboxHost(SandboxConfig(backend="local"), run=sys.argv[1])
    await host.start()
    await host.acquire("p", SandboxSpec(image=""))
    print(host._reaper.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@needs_local
def test_kill_9_of_a_host_leaves_nothing_and_the_reaper_ends() -> None:
    run = f"test-host-{os.getpid()}"
    host = subprocess.Popen([sys.executable, "-c", HOST, run], stdout=subprocess.PIPE)
    assert host.stdout is not None
    reaper_pid = int(host.stdout.readline())
    host.kill()
    host.communicate()
    wait_until(lambda: not _is_alive(reaper_pid))
    assert reaper.sweep(run, backend="local", docker_host=None) == 0
    assert list(Path("/sys/fs/cgroup").glob(f"*/thunder/{run}")) == []


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_local
async def test_a_host_leaves_those_of_its_run_alone_whose_host_may_live_on_another_machine() -> None:
    run = f"test-sweep-{os.getpid()}"
    elsewhere = "_".join(["machine", "boot", *new_session().split("_")[2:]])
    neighbour = LocalSandbox(SandboxSpec(image="", labels={"run": run, "session": elsewhere}))
    await neighbour.start()
    host = SandboxHost(SandboxConfig(backend="local"), run=run)
    try:
        assert (await host.start()).backend == "local"
        await host.acquire("p", SandboxSpec(image=""))
        for on in (await host.exec("p", "echo on", timeout_s=10), await neighbour.exec("echo on", timeout_s=10)):
            assert on.output == "on\n"
    finally:
        await host.stop()
        await neighbour.stop()
        reaper.sweep(run, backend="local", docker_host=None)


@needs_local
async def test_a_host_sweeps_what_any_dead_host_left_and_nothing_of_a_living_one() -> None:
    gone = await asyncio.create_subprocess_exec("sleep", "1000")
    over, alive = new_session(gone.pid), new_session()
    gone.kill()
    await gone.wait()
    dead, living = (
        LocalSandbox(SandboxSpec(image="", labels={"run": f"test-{session}", "session": session}))
        for session in (over, alive)
    )
    await asyncio.gather(dead.start(), living.start())
    host = SandboxHost(SandboxConfig(backend="local"), run=f"test-other-{os.getpid()}")
    try:
        await host.start()
        assert dead._process is not None
        await asyncio.wait_for(dead._process.wait(), 5)
        assert (await living.exec("echo on", timeout_s=10)).output == "on\n"
    finally:
        await host.stop()
        await asyncio.gather(dead.stop(), living.stop())
        reaper.sweep(f"test-{alive}", backend="local", docker_host=None)


@needs_local
async def test_a_reaper_that_is_killed_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SandboxHost(SandboxConfig(backend="local"), run=f"test-replaced-{os.getpid()}")
    try:
        await host.start()
        assert host._reaper is not None
        first = host._reaper.pid
        refusals = [OSError(24, "Too many open files")]
        start_reaper = host._start_reaper

        def refusing() -> reaper.Reaper:
            if refusals:
                raise refusals.pop()
            return start_reaper()

        monkeypatch.setattr(host, "_start_reaper", refusing)
        os.kill(first, signal.SIGKILL)
        await asyncio.to_thread(wait_until, lambda: host._reaper is not None and host._reaper.pid != first)
        assert host._reaper.is_running()
        host.heartbeat()
    finally:
        await host.stop()


@needs_local
async def test_sandboxes_go_when_a_distant_driver_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thunder_rollout.sandbox.host.LOST_AFTER_S", 1.5)
    host = SandboxHost(SandboxConfig(backend="local"), run=f"test-silent-{os.getpid()}")
    try:
        await host.start()
        await host.acquire("p", SandboxSpec(image=""))
        for _ in range(5):
            host.heartbeat()
            await asyncio.sleep(0.5)
        assert (await host.exec("p", "echo on", timeout_s=10)).output == "on\n"
        began_s = time.monotonic()
        with pytest.raises(SandboxFailed, match="it died"):
            await host.exec("p", "sleep 100", timeout_s=100)
        assert time.monotonic() - began_s < 10
    finally:
        await host.stop()
