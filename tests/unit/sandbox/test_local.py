"""The contract on Linux namespaces, and what only they promise."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.killing import local_leftovers
from tests.support.resting_contract import *  # noqa: F403
from tests.support.sandbox_contract import *  # noqa: F403
from tests.support.sandbox_contract import MakeSandbox, started
from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox import namespaces
from thunder_rollout.sandbox.local import LocalSandbox, local_unavailable, sweep_local
from thunder_rollout.sandbox.protocol import Rest

pytestmark = pytest.mark.slow

RUN = f"test-local-{os.getpid()}"
IN_CI = os.environ.get("CI") == "true"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    refusal = local_unavailable()
    if refusal and IN_CI:
        pytest.fail(refusal)
    if refusal:
        pytest.skip(refusal)
    mounts = Path("/proc/self/mountinfo").read_text()
    yield
    deadline_s = time.monotonic() + 5
    while (left := local_leftovers(RUN) + local_leftovers("cancelled")) and time.monotonic() < deadline_s:
        time.sleep(0.01)  # what never became ready is killed, but not waited for
    assert left == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    sweep_local(RUN, lambda session: True)
    sweep_local("cancelled", lambda session: True)


@pytest.fixture
def make() -> MakeSandbox:
    return lambda spec: LocalSandbox(replace(spec, labels={"run": RUN} | spec.labels))


async def test_the_host_is_invisible_and_its_programs_read_only(make: MakeSandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    async with started(make) as box:
        listing = await box.exec(
            "ls -A / /home /root /tmp /etc; cat /etc/passwd /etc/shadow; ls /sys /run", timeout_s=10
        )
        for hidden in (".ssh", "boot", "shadow:", "docker.sock"):
            assert hidden not in listing.output.split()
        # The way to the host's Python is there, wherever it lies, and nothing else beside it.
        for path in (secret, Path(__file__), Path(sys.prefix).parent / "setup.py"):
            assert (await box.exec(f"cat {path}", timeout_s=10)).exit_code == 1
        assert (await box.exec(f"cat /proc/1/root{secret} /proc/1/cwd{secret}", timeout_s=10)).exit_code == 1
        for forbidden in ("touch /usr/x", f"touch {sys.prefix}/x", "mount -o remount,rw /usr", "umount /proc"):
            assert (await box.exec(forbidden, timeout_s=10)).exit_code != 0
        assert (
            await box.exec("echo b > /proc/sysrq-trigger; echo 1 > /proc/sys/vm/drop_caches", timeout_s=10)
        ).exit_code
        assert (await box.exec("unshare --user --map-root-user --mount true", timeout_s=10)).exit_code != 0


async def test_this_package_is_hidden_where_it_is_installed(make: MakeSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Path(yaml.__file__).parent
    seek = f"ls {installed}; python -c 'import yaml; print(yaml.load)'"
    async with started(make) as box:
        assert "loader.py" in (await box.exec(seek, timeout_s=10)).output
    monkeypatch.setattr(namespaces, "_OWN_PACKAGE", installed)
    async with started(make) as box:
        output = (await box.exec(seek, timeout_s=10)).output
        assert "loader.py" not in output and "no attribute 'load'" in output


async def test_of_hidden_modules_no_installed_copy_is_seen_and_the_tasks_own_works(make: MakeSandbox) -> None:
    places = [f"{prefix}/lib/python3*" for prefix in dict.fromkeys((sys.prefix, sys.base_prefix, "/usr"))]
    named = r"\( -path '*/packaging/tags.py' -o -name 'pip-*.whl' \)"
    seek = f"find {' '.join(places)} /usr/share/python-wheels {named} 2>/dev/null"
    own = "mkdir packaging; echo 'mine = 1' > packaging/__init__.py; python -c 'import packaging as p; print(p.mine)'"
    async with started(make) as box:
        assert "/site-packages/packaging/tags.py" in (await box.exec(seek, timeout_s=60)).output
    async with started(make, hidden_modules=("packaging", "pip")) as box:
        assert (await box.exec(seek, timeout_s=60)).output == ""
        assert (await box.exec("python -c 'import packaging.version'", timeout_s=30)).exit_code != 0
        assert (await box.exec(own, timeout_s=30)).output == "1\n"
    async with started(make, hidden_modules=("six", "sub")) as box:
        assert (await box.exec("python -c 'import six; print(six.PY3)'", timeout_s=30)).exit_code != 0


async def test_the_hosts_environment_does_not_leak(make: MakeSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    async with started(make) as box:
        assert "s3cret" not in (await box.exec("env; cat /proc/*/environ", timeout_s=10)).output


async def test_a_dead_pid_1_is_a_typed_error(make: MakeSandbox) -> None:
    async with started(make) as box:
        running = asyncio.create_task(box.exec("sleep 1000", timeout_s=100))
        await asyncio.sleep(0.2)
        assert isinstance(box, LocalSandbox)
        os.kill(box._init_pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            with pytest.raises(SandboxFailed):
                await running
            with pytest.raises(SandboxFailed):
                await box.exec("true", timeout_s=5)
        assert not await box.is_alive()


async def test_waking_is_no_part_of_a_commands_time(make: MakeSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    thaw = LocalSandbox._thaw

    async def slowly(box: LocalSandbox) -> None:
        await asyncio.sleep(3.5)
        await thaw(box)

    monkeypatch.setattr(LocalSandbox, "_thaw", slowly)
    async with started(make) as box:
        await box.rest(Rest.FREEZE)
        result = await box.exec("echo on", timeout_s=3)
        assert (result.output, result.timed_out) == ("on\n", False)
        assert result.took_s < 3


@pytest.fixture
def orphans() -> Iterator[psutil.Process]:
    """What loses its parent becomes a child of this process, which reaps none; gives this process."""
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36  # linux/prctl.h
    assert prctl(set_child_subreaper, 1) == 0
    yield psutil.Process()
    prctl(set_child_subreaper, 0)


async def test_nothing_is_left_for_the_hosts_init_to_reap(make: MakeSandbox, orphans: psutil.Process) -> None:
    async with started(make) as box:
        await box.clear()
        await box.exec("kill -STOP $PPID", timeout_s=0.2)
        await box.clear()
        async with asyncio.timeout(5):
            await box.stop()
    assert [child for child in orphans.children() if child.status() == psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("how", [Rest.FREEZE, Rest.STOP])
async def test_a_sweep_takes_those_that_rest(make: MakeSandbox, how: Rest) -> None:
    async with started(make, labels={"session": "old"}) as box:
        await box.rest(how)
        assert await asyncio.to_thread(sweep_local, RUN, lambda session: session == "old")
        assert local_leftovers(RUN) == []
        with pytest.raises(SandboxFailed):
            await box.exec("true", timeout_s=5)


OWNER = """
import asyncio, sys
from thunder_rollout.sandbox.local import LocalSandbox
from thunder_rollout.sandbox.protocol import SandboxSpec

async def main():
    box = LocalSandbox(SandboxSpec(image="", labels={"run": sys.argv[1]}))
    await box.start()
    print("up", flush=True)
    await box.exec("trap '' TERM; (setsid sleep 4242 &); sleep 4242", timeout_s=1000)

asyncio.run(main())
"""


def test_kill_9_of_the_owner_ends_the_sandbox() -> None:
    run = f"{RUN}-owner"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, run], stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    assert local_leftovers(run)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline_s = time.monotonic() + 10
    while [left for left in local_leftovers(run) if left.isdigit()] and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert [left for left in local_leftovers(run) if left.isdigit()] == []
    sweep_local(run, lambda session: True)
    assert local_leftovers(run) == []
