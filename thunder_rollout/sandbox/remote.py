"""Sandboxes behind a host's Ray actor, as the agent loop, the grader and the scheduler see them."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Sequence
from typing import Any

from thunder_rollout.errors import ConfigError, SandboxFailed
from thunder_rollout.remote import remote_call
from thunder_rollout.sandbox.config import BackendChoice
from thunder_rollout.sandbox.host import HostStats
from thunder_rollout.sandbox.protocol import ExecResult, SandboxSpec

HEARTBEAT_S = 2.0


class RemoteSandboxHost:
    """`handle` is what `create_sandbox_host` returned. A dead actor raises `SandboxFailed`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def start(self, images: list[str]) -> str:
        """See `SandboxHost.start`; the backend chosen, docker or local."""
        choice: BackendChoice = await _call(self._handle.start.remote(images))
        return choice.backend

    async def stop(self) -> None:
        await _call(self._handle.stop.remote())

    def expect(self, images: list[str]) -> None:
        """See `SandboxHost.expect`. This and the next two are hints: nobody waits for them."""
        self._handle.expect.remote(images)

    def sample_started(self, image: str) -> None:
        self._handle.sample_started.remote(image)

    def sample_finished(self, image: str) -> None:
        self._handle.sample_finished.remote(image)

    async def prepare(self, program: str, spec: SandboxSpec) -> float:
        took_s: float = await _call(self._handle.prepare.remote(program, spec))
        return took_s

    async def release(self, program: str) -> None:
        await _call(self._handle.release.remote(program))

    async def stats(self) -> HostStats:
        stats: HostStats = await _call(self._handle.stats.remote())
        return stats

    async def num_running(self) -> int:
        return (await self.stats()).num_running

    async def keep_alive(self) -> None:
        """Tell the host that the driver lives, until cancelled or the host is dead."""
        with contextlib.suppress(SandboxFailed):
            while True:
                await _call(self._handle.heartbeat.remote())
                await asyncio.sleep(HEARTBEAT_S)

    def sandbox(self, program: str, spec: SandboxSpec) -> RemoteSandbox:
        return RemoteSandbox(self._handle, program, spec)


class RemoteSandboxHosts:
    """The hosts of all nodes as one. A program's host follows from its name alone, so everybody who
    holds the same handles finds it without asking."""

    def __init__(self, handles: Sequence[Any]) -> None:
        """`handles` are what `create_sandbox_hosts` returned, in its order."""
        self._hosts = [RemoteSandboxHost(handle) for handle in handles]

    async def start(self, images: list[str]) -> str:
        """The backend chosen, docker or local. Raises `ConfigError` if nodes disagree."""
        backends = sorted(set(await asyncio.gather(*(host.start(images) for host in self._hosts))))
        if len(backends) > 1:
            raise ConfigError(
                f"sandbox.backend: some nodes have Docker and some have not ({', '.join(backends)}); "
                "set sandbox.backend=local, or start Docker on every node"
            )
        return backends[0]

    async def stop(self) -> None:
        await asyncio.gather(*(host.stop() for host in self._hosts))

    def expect(self, images: list[str]) -> None:
        for host in self._hosts:
            host.expect(images)

    def sample_started(self, image: str) -> None:
        for host in self._hosts:
            host.sample_started(image)

    def sample_finished(self, image: str) -> None:
        for host in self._hosts:
            host.sample_finished(image)

    async def prepare(self, program: str, spec: SandboxSpec) -> float:
        return await self._host(program).prepare(program, spec)

    async def release(self, program: str) -> None:
        await self._host(program).release(program)

    async def keep_alive(self) -> None:
        await asyncio.gather(*(host.keep_alive() for host in self._hosts))

    async def num_running(self) -> int:
        return sum(await asyncio.gather(*(host.num_running() for host in self._hosts)))

    def sandbox(self, program: str, spec: SandboxSpec) -> RemoteSandbox:
        return self._host(program).sandbox(program, spec)

    def _host(self, program: str) -> RemoteSandboxHost:
        return self._hosts[zlib.crc32(program.encode()) % len(self._hosts)]


class RemoteSandbox:
    """The `Sandbox` of one program on its host; `start` waits for the one prepared, if any."""

    def __init__(self, handle: Any, program: str, spec: SandboxSpec) -> None:
        self._handle = handle
        self._program = program
        self._spec = spec

    async def start(self) -> None:
        await _call(self._handle.acquire.remote(self._program, self._spec))

    async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
        result: ExecResult = await _call(self._handle.exec.remote(self._program, command, timeout_s))
        return result

    async def read_file(self, path: str) -> bytes:
        content: bytes = await _call(self._handle.read_file.remote(self._program, path))
        return content

    async def write_file(self, path: str, content: bytes) -> None:
        await _call(self._handle.write_file.remote(self._program, path, content))

    async def diff(self, base_commit: str) -> bytes:
        patch: bytes = await _call(self._handle.diff.remote(self._program, base_commit))
        return patch

    async def clear(self) -> None:
        await _call(self._handle.clear.remote(self._program))

    async def stop(self) -> None:
        await _call(self._handle.release.remote(self._program))


async def _call(ref: Any) -> Any:
    return await remote_call(ref, died=SandboxFailed, what="the sandbox host actor")
