"""Sandboxes in and out in a row, and what must not grow meanwhile.

`THUNDER_NUM_CYCLES=500` makes it as many; a few by default.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.protocol import SandboxSpec

NUM_CYCLES = int(os.environ.get("THUNDER_NUM_CYCLES", "16"))
_AT_ONCE = 4
_SETTLE_S = 5.0
_KEPT_CONNECTIONS = 10  # what the docker SDK's pool holds at most; one leaked a sandbox is more


def held_here() -> dict[str, int]:
    """What this process holds: open files, sockets, mounts it sees, children."""
    opened = [os.readlink(path) for path in map(str, Path("/proc/self/fd").iterdir()) if os.path.lexists(path)]
    num_sockets = sum(target.startswith("socket:") for target in opened)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "open files": len(opened) - num_sockets,
        "sockets": num_sockets,
        "mounts": Path("/proc/self/mountinfo").read_text().count("\n"),
        "processes": len(children),
    }


async def growth(host: SandboxHost, spec: SandboxSpec, count: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What of `count` grew over `NUM_CYCLES` sandboxes, by how much; a first few are not counted, nor
    the connections to an engine that are kept for reuse."""
    await _in_and_out(host, spec, 2 * _AT_ONCE)
    before = await asyncio.to_thread(count)
    await _in_and_out(host, spec, NUM_CYCLES)
    for _ in range(int(_SETTLE_S / 0.1)):
        after = await asyncio.to_thread(count)
        grown = {name: after[name] - before[name] for name in after}
        grown = {name: by for name, by in grown.items() if by > (_KEPT_CONNECTIONS if name == "sockets" else 0)}
        if not grown:
            return {}
        await asyncio.sleep(0.1)
    return grown


async def _in_and_out(host: SandboxHost, spec: SandboxSpec, number: int) -> None:
    async def one(program: str) -> None:
        await host.prepare(program, spec)
        result = await host.exec(program, "echo on; sleep 1000 & echo x > /tmp/file", timeout_s=30)
        assert result.output == "on\n"
        await host.release(program)

    for first in range(0, number, _AT_ONCE):
        await asyncio.gather(*(one(f"cycle{first}-{i}") for i in range(min(_AT_ONCE, number - first))))
