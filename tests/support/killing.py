"""`kill -9` of a driver, of a sandbox host, or of both, with sandboxes up, one put away and others starting.

`THUNDER_NUM_SANDBOXES=50` makes it as many; a few by default.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

VICTIMS = ("driver", "host", "driver and host")
NUM_SANDBOXES = int(os.environ.get("THUNDER_NUM_SANDBOXES", "4"))
GONE_WITHIN_S = 15.0

_HOST = """
import asyncio, sys
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.protocol import SandboxLimits, SandboxSpec

async def main(backend, run, driver_pid, num_sandboxes):
    host = SandboxHost(SandboxConfig(backend=backend, when_paused="stop"), run=run, owner_pid=int(driver_pid))
    await host.start(["thunder-toy:1"] if backend == "docker" else [])
    spec = SandboxSpec(image="thunder-toy:1", setup="mkdir -p /testbed", limits=SandboxLimits(memory_bytes=2**27))
    up = [f"up{i}" for i in range(int(num_sandboxes))]
    await asyncio.gather(*(host.acquire(program, spec) for program in up))
    await host.acquire("away", spec)
    assert await host.rest("away")
    command = "trap '' TERM HUP; (setsid sleep 4242 &); sleep 4242"
    busy = [asyncio.create_task(host.exec(program, command, timeout_s=1000)) for program in up]
    starting = [asyncio.create_task(host.acquire(f"starting{i}", spec)) for i in range(4)]
    await asyncio.sleep(0.2)
    print("up", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main(*sys.argv[1:]))
"""


def seconds_until_gone(backend: str, run: str, victims: str, leftovers: Callable[[], list[str]]) -> float:
    """Kill `victims` while the sandboxes of `run` are up; until `leftovers` is empty and stays so."""
    driver = subprocess.Popen(["sleep", "4242"])
    argv = [sys.executable, "-c", _HOST, backend, run, str(driver.pid), str(NUM_SANDBOXES)]
    host = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
        assert len(leftovers()) >= NUM_SANDBOXES
        if "driver" in victims:
            driver.kill()
            driver.wait()
        if "host" in victims:
            host.kill()
        return seconds_until_none(leftovers)
    finally:
        for process in (driver, host):
            process.kill()
            process.communicate()


def seconds_until_none(leftovers: Callable[[], list[str]]) -> float:
    """From now, until there are none and none come any more."""
    began_s = last_seen_s = time.monotonic()
    while (now_s := time.monotonic()) - last_seen_s < 2.0 and now_s - began_s < 2 * GONE_WITHIN_S:
        if leftovers():
            last_seen_s = time.monotonic()
        time.sleep(0.1)
    return last_seen_s - began_s


def local_leftovers(run: str, cgroup_root: Path = Path("/sys/fs/cgroup")) -> list[str]:
    """Processes that bear the run's marker, and cgroups of its sandboxes, of v1 (one a controller) and v2."""
    tops = [*cgroup_root.glob(f"*/thunder/{run}/"), cgroup_root / "thunder" / run]
    found = [str(path) for top in tops for path in top.glob("*/")]
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"thunder-sandbox:{run}:" in (entry / "cmdline").read_text():
                found.append(entry.name)
    return found
