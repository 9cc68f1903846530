"""A sandbox that starts when it is first used, or when told that it soon will be."""

from __future__ import annotations

import asyncio
import time

from thunder_rollout.sandbox.protocol import ExecResult, Sandbox


class LazySandbox:
    """`wait_s` is how long its user stood waiting for the start; whoever calls `begin` calls `stop`."""

    def __init__(self, inner: Sandbox) -> None:
        self._inner = inner
        self._starting: asyncio.Task[None] | None = None
        self.started = False
        self.wait_s = 0.0

    def begin(self) -> None:
        """Start beside what the caller does next; how that went, `start` tells."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._inner.start(), name="start-sandbox-ahead")

    async def start(self) -> None:
        if not self.started:
            before = time.monotonic()
            self.begin()
            assert self._starting is not None
            await self._starting
            self.wait_s = time.monotonic() - before
            self.started = True

    async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
        await self.start()
        return await self._inner.exec(command, timeout_s=timeout_s)

    async def read_file(self, path: str) -> bytes:
        await self.start()
        return await self._inner.read_file(path)

    async def write_file(self, path: str, content: bytes) -> None:
        await self.start()
        await self._inner.write_file(path, content)

    async def diff(self, base_commit: str) -> bytes:
        await self.start()
        return await self._inner.diff(base_commit)

    async def clear(self) -> None:
        await self.start()
        await self._inner.clear()

    async def stop(self) -> None:
        """Idempotent; does nothing if it never began."""
        if self._starting is None:
            return
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        await self._inner.stop()
