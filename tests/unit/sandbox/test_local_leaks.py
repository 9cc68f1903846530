"""Nothing of a local sandbox outlives it, its host or its driver, however they end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.cycles import growth, held_here
from tests.support.killing import GONE_WITHIN_S, VICTIMS, local_leftovers, seconds_until_gone
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.local import local_unavailable
from thunder_rollout.sandbox.protocol import SandboxSpec

pytestmark = pytest.mark.slow

RUN = f"test-leaks-{os.getpid()}"


@pytest.fixture(autouse=True)
def needs_local() -> None:
    if refusal := local_unavailable():
        pytest.fail(refusal) if os.environ.get("CI") == "true" else pytest.skip(refusal)


@pytest.mark.parametrize("hierarchy", ["pids", "."])
def test_cgroups_left_behind_are_seen_in_both_versions(tmp_path: Path, hierarchy: str) -> None:
    left = tmp_path / hierarchy / "thunder" / RUN / "session-box"
    left.mkdir(parents=True)
    (left.parent / "cgroup.procs").touch()
    assert local_leftovers(RUN, tmp_path) == [str(left)]


@pytest.mark.parametrize("victims", VICTIMS)
def test_kill_9_leaves_nothing(victims: str) -> None:
    took_s = seconds_until_gone("local", RUN, victims, lambda: local_leftovers(RUN))
    print(f"local: kill -9 of {victims}: gone after {took_s:.1f} s")
    assert took_s < GONE_WITHIN_S


async def test_sandboxes_in_and_out_leave_nothing() -> None:
    host = SandboxHost(SandboxConfig(backend="local"), run=RUN)
    try:
        await host.start()
        spec = SandboxSpec(image="")
        assert await growth(host, spec, lambda: held_here() | {"left": len(local_leftovers(RUN))}) == {}
    finally:
        await host.stop()
    assert local_leftovers(RUN) == []
