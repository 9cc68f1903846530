"""Sandboxes behind a host's Ray actor, as the agent loop, the grader and the scheduler see them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError

from thunder_rollout.errors import ConfigError, SandboxFailed
from thunder_rollout.remote import remote_call
from thunder_rollout.sandbox.config import BackendChoice
from thunder_rollout.sandbox.placement import HostStats
from thunder_rollout.sandbox.protocol import ExecResult, SandboxSpec

HEARTBEAT_S = 2.0
UNAVAILABLE_POLL_S = 0.5

T = TypeVar("T")


class SandboxHostDied(SandboxFailed):
    """The sandbox host can't be reached; what it had is lost."""


class RemoteSandboxHost:
    """`handle` is what `create_sandbox_host` returned. A dead actor raises `SandboxHostDied`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def start(self, images: list[str]) -> str:
        """See `SandboxHost.start`; the backend chosen, docker or local. Waits while Ray makes the actor anew."""
        while True:
            try:
                choice: BackendChoice = await _call(self._handle.start.remote(images))
                return choice.backend
            except SandboxHostDied as error:
                if not isinstance(error.__cause__, ActorUnavailableError):
                    raise
            await asyncio.sleep(UNAVAILABLE_POLL_S)

    def kill(self) -> None:
        """End the actor's process, whatever state it is in; Ray makes it anew."""
        ray.kill(self._handle, no_restart=False)

    async def stop(self) -> None:
        await _call(self._handle.stop.remote())

    def expect(self, images: list[str]) -> None:
        """See `SandboxHost.expect`. This and the next two are hints: nobody waits for them."""
        self._handle.expect.remote(images)

    def sample_started(self, image: str) -> None:
        self._handle.sample_started.remote(image)

    def sample_finished(self, image: str) -> None:
        self._handle.sample_finished.remote(image)

    async def prepare(self, program: str, spec: SandboxSpec, *, within_s: float = 0.0) -> float:
        took_s: float = await _call(self._handle.prepare.remote(program, spec, within_s))
        return took_s

    async def release(self, program: str) -> None:
        await _call(self._handle.release.remote(program))

    async def rest(self, program: str) -> bool:
        is_put_away: bool = await _call(self._handle.rest.remote(program))
        return is_put_away

    async def wake(self, program: str) -> None:
        await _call(self._handle.wake.remote(program))

    async def stats(self) -> HostStats:
        stats: HostStats = await _call(self._handle.stats.remote())
        return stats

    async def num_running(self) -> int:
        return (await self.stats()).num_running

    async def keep_alive(self) -> None:
        """Tell the host that the driver lives, until cancelled; it may die and come back."""
        while True:
            with contextlib.suppress(SandboxHostDied):
                await _call(self._handle.heartbeat.remote())
            await asyncio.sleep(HEARTBEAT_S)

    def sandbox(self, program: str, spec: SandboxSpec) -> RemoteSandbox:
        return RemoteSandbox(self._handle, program, spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetHandles:
    """The actors of a run's sandbox hosts and of the fleet that places programs on them; travels to
    everybody who needs a sandbox."""

    fleet: Any
    hosts: tuple[Any, ...]


class RemoteSandboxHosts:
    """The hosts of all nodes as one; `SandboxFleet` says which of them has a program's sandbox."""

    def __init__(self, handles: FleetHandles) -> None:
        """`handles` are what `create_sandbox_fleet` returned."""
        self._hosts = [RemoteSandboxHost(handle) for handle in handles.hosts]
        self._fleet = handles.fleet

    async def start(self, images: list[str]) -> str:
        """The backend chosen, docker or local. Raises `ConfigError` if nodes disagree."""
        backends = sorted(set(await asyncio.gather(*(host.start(images) for host in self._hosts))))
        if len(backends) > 1:
            raise ConfigError(
                f"sandbox.backend: some nodes have Docker and some have not ({', '.join(backends)}); "
                "set sandbox.backend=local, or start Docker on every node"
            )
        await _ask(self._fleet.start.remote(images))
        return backends[0]

    async def stop(self) -> None:
        """A host that is gone is stopped."""
        self._fleet.stop.remote()
        for outcome in await asyncio.gather(*(host.stop() for host in self._hosts), return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, SandboxHostDied):
                raise outcome

    def expect(self, images: list[str]) -> None:
        """The images of the samples to come, in their order. This and the next two are hints."""
        self._fleet.expect.remote(images)

    def sample_started(self, image: str) -> None:
        self._fleet.sample_started.remote(image)

    def sample_finished(self, image: str) -> None:
        self._fleet.sample_finished.remote(image)

    async def prepare(self, program: str, spec: SandboxSpec, *, within_s: float = 0.0) -> float:
        """See `SandboxHost.prepare`."""
        index = await self.place(program, spec)
        return await self.on_host(index, self._hosts[index].prepare(program, spec, within_s=within_s))

    async def rest(self, program: str) -> bool:
        """See `SandboxHost.rest`."""
        index: int | None = await _ask(self._fleet.locate.remote(program))
        return index is not None and await self.on_host(index, self._hosts[index].rest(program))

    async def wake(self, program: str) -> None:
        index: int | None = await _ask(self._fleet.locate.remote(program))
        if index is not None:
            await self.on_host(index, self._hosts[index].wake(program))

    async def release(self, program: str) -> None:
        index: int | None = await _ask(self._fleet.forget.remote(program))
        if index is not None:
            with contextlib.suppress(SandboxHostDied):  # and its sandboxes with it
                await self.on_host(index, self._hosts[index].release(program))

    async def keep_alive(self) -> None:
        await asyncio.gather(*(host.keep_alive() for host in self._hosts))

    async def num_running(self) -> int:
        num_running: int = await _ask(self._fleet.num_running.remote())
        return num_running

    def sandbox(self, program: str, spec: SandboxSpec) -> PlacedSandbox:
        return PlacedSandbox(self, program, spec)

    async def place(self, program: str, spec: SandboxSpec) -> int:
        index: int = await _ask(self._fleet.place.remote(program, spec.image, spec.limits.disk_bytes))
        return index

    def host(self, index: int) -> RemoteSandboxHost:
        return self._hosts[index]

    async def on_host(self, index: int, call: Awaitable[T]) -> T:
        """Await a call to a host; that it died is told to the fleet before anybody tries again."""
        try:
            return await call
        except SandboxHostDied:
            await _ask(self._fleet.suspect.remote(index))
            raise


class PlacedSandbox:
    """The `Sandbox` of one program on the host that the fleet chose for it, once it is started."""

    def __init__(self, hosts: RemoteSandboxHosts, program: str, spec: SandboxSpec) -> None:
        self._hosts = hosts
        self._program = program
        self._spec = spec
        self._index = -1
        self._inner: RemoteSandbox | None = None

    async def start(self) -> None:
        self._index = await self._hosts.place(self._program, self._spec)
        self._inner = self._hosts.host(self._index).sandbox(self._program, self._spec)
        await self._on_host(self._inner.start())

    async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
        return await self._on_host(self._started().exec(command, timeout_s=timeout_s))

    async def read_file(self, path: str) -> bytes:
        return await self._on_host(self._started().read_file(path))

    async def write_file(self, path: str, content: bytes) -> None:
        await self._on_host(self._started().write_file(path, content))

    async def diff(self, base_commit: str) -> bytes:
        return await self._on_host(self._started().diff(base_commit))

    async def clear(self) -> None:
        await self._on_host(self._started().clear())

    async def stop(self) -> None:
        await self._hosts.release(self._program)

    def _started(self) -> RemoteSandbox:
        if self._inner is None:
            raise SandboxFailed(f"sandbox: program={self._program} has none yet; start it first")
        return self._inner

    async def _on_host(self, call: Awaitable[T]) -> T:
        return await self._hosts.on_host(self._index, call)


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
    return await remote_call(ref, died=SandboxHostDied, what="the sandbox host actor")


async def _ask(ref: Any) -> Any:
    return await remote_call(ref, died=SandboxFailed, what="the sandbox fleet's actor")
