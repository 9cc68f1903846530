"""What the sandboxes of waiting programs take up, kept, frozen or put away, and what it takes to have them back.

    sudo .venv/bin/python recipes/paused_sandboxes/measure.py --backend docker|local [--num 8]

Each sandbox has written 10 MB, and left a process behind that holds 64 MB and computes. Memory and CPU time are those
of its processes, and with Docker of the shim that the engine runs for each container. Exits with 1 if a sandbox comes
back with other files than it had.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.docker import DockerSandbox
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.images import TOY_IMAGE
from thunder_rollout.sandbox.protocol import Rest, SandboxLimits, SandboxSpec

SPEC = SandboxSpec(
    image=TOY_IMAGE,
    setup="mkdir -p /testbed && cd /testbed && head -c 10000000 /dev/urandom > data && sha256sum data > sum",
    limits=SandboxLimits(memory_bytes=512 * 2**20),
)
LEFT_BEHIND = "python3 -c 'held = b\"x\" * 2**26\nwhile True: pass' > /dev/null 2>&1 &"
WATCH_S = 3.0


async def measure(backend: str, num: int) -> bool:
    host = SandboxHost(SandboxConfig(backend=backend, when_paused="keep"), run=f"paused-{os.getpid()}")
    await host.start([TOY_IMAGE])
    programs = [f"p{i}" for i in range(num)]
    try:
        await asyncio.gather(*(host.acquire(program, SPEC) for program in programs))
        ok = True
        print(f"| {backend} | MB each | CPUs of all | ms to rest, median (max) | ms to come back, median (max) |")
        print("|---|---|---|---|---|")
        for how in Rest:
            await asyncio.gather(*(host.exec(program, LEFT_BEHIND, timeout_s=60) for program in programs))
            await asyncio.sleep(2)
            names = _cgroup_names(host, programs)
            rests, depths = zip(*[await _timed(host, program, how) for program in programs], strict=True)
            megabytes, cpus = await _held(names, num)
            wakes = [(await _timed(host, program, Rest.KEEP))[0] for program in programs]
            times = " | " if how is Rest.KEEP else f"{_row(rests)} | {_row(wakes)}"
            name = f"{how.name.lower()}: {depths.count(how)} of {num}"
            print(f"| {name} | {megabytes:.0f} | {cpus:.2f} | {times} |", flush=True)
            for program in programs:
                ok &= (await host.exec(program, "sha256sum -c --quiet sum", timeout_s=60)).exit_code == 0
                await host.clear(program)
        return ok
    finally:
        await host.stop()


async def _timed(host: SandboxHost, program: str, how: Rest) -> tuple[float, Rest]:
    began_s = time.monotonic()
    depth = await host._slots[program].sandbox.rest(how)
    return time.monotonic() - began_s, depth


def _row(took: Sequence[float]) -> str:
    return f"{statistics.median(took) * 1000:.0f} ({max(took) * 1000:.0f})"


def _cgroup_names(host: SandboxHost, programs: list[str]) -> list[str]:
    """What stands in the cgroups, or in the command line of the shim, of each sandbox."""
    boxes = [host._slots[program].sandbox for program in programs]
    return [box._container if isinstance(box, DockerSandbox) else box._name for box in boxes]


async def _held(names: list[str], num: int) -> tuple[float, float]:
    """Megabytes of a sandbox, and the CPUs that all of them keep busy."""
    bytes_before, cpu_before_s = _sum(names)
    began_s = time.monotonic()
    await asyncio.sleep(WATCH_S)
    _, cpu_after_s = _sum(names)
    return bytes_before / num / 1e6, (cpu_after_s - cpu_before_s) / (time.monotonic() - began_s)


def _sum(names: list[str]) -> tuple[int, float]:
    held_bytes, cpu_s = 0, 0.0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            where = Path(f"/proc/{process.pid}/cgroup").read_text() + " ".join(process.cmdline())
            if any(name in where for name in names):
                held_bytes += process.memory_full_info().pss
                times = process.cpu_times()
                cpu_s += times.user + times.system
    return held_bytes, cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("docker", "local"), required=True)
    parser.add_argument("--num", type=int, default=8)
    options = parser.parse_args()
    raise SystemExit(0 if asyncio.run(measure(options.backend, options.num)) else 1)


if __name__ == "__main__":
    main()
