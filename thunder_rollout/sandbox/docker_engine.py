"""The connection to a Docker engine, shared by all sandboxes of a process.

The docker SDK blocks, so its calls run on a few threads; each is short. What lasts (a command's
output) is read on the event loop, so no thread is held while an agent's command runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import docker
import requests
from docker.errors import APIError, DockerException, NotFound

from thunder_rollout.errors import ConfigError, SandboxFailed
from thunder_rollout.sandbox import cgroups
from thunder_rollout.sandbox.disk_watch import DiskWatch

logger = logging.getLogger(__name__)

RUN_LABEL = "thunder.run"
SESSION_LABEL = "thunder.session"
_NUM_THREADS = 16
_CALL_TIMEOUT_S = 120
_PROBE_TIMEOUT_S = 5
_DEFAULT_ADDRESS = "unix:///var/run/docker.sock"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProbe:
    address: str
    version: str | None  # None: nothing answers
    error: str = ""


def engine_address(docker_host: str | None) -> str:
    return docker_host or os.environ.get("DOCKER_HOST") or _DEFAULT_ADDRESS


def probe_engine(docker_host: str | None) -> EngineProbe:
    """Ask whether an engine answers. Blocking, at most a few seconds; never raises for "no"."""
    address = engine_address(docker_host)
    try:
        client = docker.DockerClient(base_url=address, timeout=_PROBE_TIMEOUT_S)
        try:
            return EngineProbe(address=address, version=str(client.version()["Version"]))
        finally:
            client.close()
    except (DockerException, requests.RequestException, OSError, ValueError) as error:
        return EngineProbe(address=address, version=None, error=str(error).splitlines()[0][:200])


class DockerEngine:
    """One engine; safe to share between the sandboxes of an event loop."""

    def __init__(self, docker_host: str | None = None) -> None:
        self.address = engine_address(docker_host)
        try:
            self.client = docker.DockerClient(base_url=self.address, timeout=_CALL_TIMEOUT_S)
        except (DockerException, requests.RequestException, OSError) as error:
            raise ConfigError(
                f"sandbox.docker_host: no Docker engine answers at {self.address} ({error}); start it or use "
                "sandbox.backend=local"
            ) from error
        self.has_quota = True  # until the storage driver says that it can't limit a container's disk
        self.weight: dict[str, Any] = {}  # what containers are created with for their share of the CPU
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="docker")
        self.disk = DiskWatch(self.written_bytes)

    @cached_property
    def num_cpus(self) -> int:
        """A container that is to have more is refused. Blocking, the first time."""
        return int(self.client.info()["NCPU"])

    def weigh(self, cpu_shares: int) -> None:
        """Give all containers together so many CPU shares where the engine's cgroups are ours to set, and each
        container elsewhere. Blocking."""
        is_ours = self.address.startswith("unix://") and self.client.info().get("CgroupDriver") == "cgroupfs"
        if is_ours and cgroups.weigh(cgroups.DOCKER_PARENT, cpu_shares):
            self.weight = {"cgroup_parent": f"/{cgroups.DOCKER_PARENT}"}
        else:
            self.weight = {"cpu_shares": cpu_shares}

    async def call(self, function: Callable[[], T]) -> T:
        """Run a short SDK call on a thread. An engine that is gone raises `SandboxFailed`;
        the engine's own refusals stay `docker.errors.APIError`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except (requests.RequestException, OSError) as error:
            if isinstance(error, APIError):
                raise
            raise SandboxFailed(f"sandbox: the Docker engine at {self.address} doesn't answer: {error}") from error

    def map(self, function: Callable[[str], None], names: list[str]) -> Iterator[OSError | None]:
        """Call it with each, several at a time: what each call raised. Blocking."""

        def call(name: str) -> OSError | None:
            try:
                function(name)
            except OSError as error:
                return error
            return None

        return self._threads.map(call, names)

    async def written_bytes(self, containers: list[str]) -> dict[str, int]:
        """The size of the writable layer of each that runs, and is not paused."""
        filters = {"id": containers, "status": "running"}
        found = await self.call(lambda: self.client.api.containers(filters=filters, size=True))
        return {one["Id"]: int(one.get("SizeRw", 0)) for one in found}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.client.close()


class AttachedStream:
    """A hijacked connection to a container or one of its commands, as raw frames."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder  # keeps the HTTP response, and so the connection, alive
        raw = getattr(holder, "_sock", holder)
        if type(raw) is not socket.socket:
            raise ConfigError(
                f"sandbox.docker_host: connections of type {type(raw).__name__} aren't supported; use a unix:// or "
                "plain tcp:// address"
            )
        self._socket = raw
        self._socket.setblocking(False)
        self._pending = bytearray()

    async def send(self, content: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, content)

    def send_now(self, line: bytes) -> None:
        """A few bytes that always fit the connection's buffer."""
        try:
            self._socket.send(line)
        except (BlockingIOError, OSError):
            logger.debug("could not write to a container's stdin")

    async def frame(self) -> tuple[int, bytes] | None:
        """The next (stream number, content): 1 is stdout, 2 stderr; None at the end."""
        while (frame := self._take_frame()) is None:
            try:
                chunk = await asyncio.get_running_loop().sock_recv(self._socket, 65_536)
            except ConnectionResetError:
                return None
            if not chunk:
                return None
            self._pending += chunk
        return frame

    def _take_frame(self) -> tuple[int, bytes] | None:
        if len(self._pending) < 8:
            return None
        size = int.from_bytes(self._pending[4:8], "big")
        if len(self._pending) < 8 + size:
            return None
        stream, content = self._pending[0], bytes(self._pending[8 : 8 + size])
        del self._pending[: 8 + size]
        return stream, content

    def close(self) -> None:
        self._socket.close()
        response = getattr(self._holder, "_response", None)
        if response is not None:
            response.close()


def sweep_docker(docker_host: str | None, run: str | None, is_ours: Callable[[str], bool]) -> int:
    """Remove the containers of `run` (None: of any) whose session `is_ours` accepts, with their
    anonymous volumes, then the images of those put away, volumes and networks that bear such labels;
    how many in all. What the engine does not give up is left, and all else goes; then it raises
    `SandboxFailed`. Blocking."""
    engine = DockerEngine(docker_host)
    api = engine.client.api
    filters = {"label": f"{RUN_LABEL}={run}" if run else SESSION_LABEL}
    kinds: list[tuple[Callable[[], list[dict[str, Any]] | None], str, Callable[[str], None]]] = [
        (lambda: api.containers(all=True, filters=filters), "Id", partial(remove_container, engine)),
        (lambda: api.images(filters=filters), "Id", partial(remove_image, engine)),
        (lambda: api.volumes(filters=filters)["Volumes"], "Name", lambda name: _remove(api.remove_volume, name)),
        (lambda: api.networks(filters=filters), "Id", lambda name: _remove(api.remove_network, name)),
    ]
    num_removed = 0
    refusals: list[OSError] = []
    try:
        for listed, key, remove in kinds:
            try:
                found = listed() or []
            except OSError as error:
                refusals.append(error)
                continue
            names = [one[key] for one in found if is_ours((one["Labels"] or {}).get(SESSION_LABEL, ""))]
            refused = [error for error in engine.map(remove, names) if error is not None]
            num_removed += len(names) - len(refused)
            refusals += refused
    finally:
        engine.close()
    if refusals:
        raise SandboxFailed(
            f"sandbox: the Docker engine at {engine.address} keeps {len(refusals)} leftovers (removed: {num_removed}); "
            f"the first refusal: {refusals[0]}"
        ) from refusals[0]
    return num_removed


def remove_container(engine: DockerEngine, container_id: str) -> None:
    """Idempotent; its removal may be under way still when this returns. Blocking."""
    try:
        _remove(engine.client.api.remove_container, container_id, v=True, force=True)
    except APIError as error:
        if error.status_code != 409:  # somebody else has begun with it
            raise


def remove_image(engine: DockerEngine, image_id: str) -> None:
    """With the images it was made of that have no name. Idempotent. Raises `APIError` while a container uses it.
    Blocking."""
    _remove(engine.client.api.remove_image, image_id, force=True)


def _remove(remove: Callable[..., None], name: str, **how: Any) -> None:
    with contextlib.suppress(NotFound):
        remove(name, **how)
