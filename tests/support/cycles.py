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


def held_here() -> dict[str, int]:
    """What this process holds: open files, mounts it sees, children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "mounts": Path("/proc/self/mountinfo").read_text().count("\n"),
        "processes": len(children),
    }


async def growth(host: SandboxHost, spec: SandboxSpec, count: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What of `count` grew over `NUM_CYCLES` sandboxes, by how much. A first few, more at once than
    later, are not counted: they open the connections to an engine that are then kept for reuse."""
    await _in_and_out(host, spec, 4 * _AT_ONCE, at_once=2 * _AT_ONCE)
    before = await asyncio.to_thread(count)
    await _in_and_out(host, spec, NUM_CYCLES)
    for _ in range(int(_SETTLE_S / 0.1)):
        after = await asyncio.to_thread(count)
        grown = {name: after[name] - before[name] for name in after if after[name] > before[name]}
        if not grown:
            return {}
        await asyncio.sleep(0.1)
    return grown


async def _in_and_out(host: SandboxHost, spec: SandboxSpec, number: int, at_once: int = _AT_ONCE) -> None:
    async def one(program: str) -> None:
        await host.prepare(program, spec)
        result = await host.exec(program, "echo on; sleep 1000 & echo x > /tmp/file", timeout_s=30)
        assert result.output == "on\n"
        await host.release(program)

    for first in range(0, number, at_once):
        await asyncio.gather(*(one(f"cycle{first}-{i}") for i in range(min(at_once, number - first))))
