"""Sandboxes as Docker containers, through the docker SDK.

What bounds one: memory (swap included), CPUs (at most the engine's) and processes by its cgroups; no network
but loopback; few capabilities and no way to gain any. `disk_bytes` binds the writable layer where
the storage driver has quotas (overlay2 on xfs with pquota, btrfs, zfs). Elsewhere it binds the size
of one file, and when a container is found to have written more than that in all, its processes are killed,
those that earlier commands left behind included: it can be over the limit by what it writes between two looks
(see `disk_watch`). Nothing that it prints is kept.

While it rests it is paused, or committed to an image and removed, and then started again from that image; what
the image's volumes hold would not survive that, so a container with volumes is paused instead, and so is one
whose files find no room in the node's budget of images. That room is taken until the sandbox is stopped.

What ends one: `stop`; its time to live; and the end of this process, however it comes, since the
engine closes PID 1's stdin with our connection, and the container removes itself. The labels
(`thunder.run`, `thunder.session`, `thunder.program`, `thunder.task`, `thunder.lease` = expiry in
epoch seconds) let the reaper find what is left all the same.

The image needs bash, coreutils and tar, and git for `diff`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from docker.errors import APIError, ImageNotFound, NotFound
from docker.types import LogConfig, Ulimit

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.channel import CHANNEL_SCRIPT, KILLED, Channel, Marked, NotRunnable
from thunder_rollout.sandbox.docker_engine import (
    RUN_LABEL,
    AttachedStream,
    DockerEngine,
    remove_container,
    remove_image,
)
from thunder_rollout.sandbox.gitdiff import SCRATCH
from thunder_rollout.sandbox.image_store import ImageStore
from thunder_rollout.sandbox.protocol import Rest, SandboxSpec
from thunder_rollout.sandbox.shell import INIT_SCRIPT, ShellSandbox
from thunder_rollout.sandbox.variables import common_variables

logger = logging.getLogger(__name__)

_DEATH_PATIENCE_S = 1.0
_ROOM_MAKING_S = 1.0  # a command that finds the disk full may run so long
_FREEZE_ATTEMPTS = 4
_LEAST_DISK_BYTES = 2**20
_KEPT_CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"]


class DockerSandbox(ShellSandbox):
    def __init__(
        self,
        spec: SandboxSpec,
        engine: DockerEngine,
        *,
        images: ImageStore | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        """`images` bounds what is put away; None: nothing does."""
        super().__init__(spec, start_timeout_s=start_timeout_s)
        self._engine = engine
        self._images = images
        self._container = ""
        self._creating: asyncio.Future[str] | None = None
        self._stdin: AttachedStream | None = None
        self._under_way: tuple[Marked, float] | None = None  # the command, and when it began
        self._ended_at_bytes = 0  # what it had written when its processes were ended for that
        self._kept_images: list[str] = []  # its files each time it was put away, one image on the other
        self._kept_bytes = 0  # of what it had written by then
        self._room_bytes = 0  # what that takes of the node's budget

    async def _boot(self) -> None:
        self._creating = asyncio.ensure_future(self._engine.call(self._create))
        try:
            self._container = await asyncio.shield(self._creating)
            api = self._engine.client.api
            holder = await self._engine.call(
                lambda: api.attach_socket(self._container, params={"stdin": 1, "stream": 1})
            )
            self._stdin = AttachedStream(holder)
            await self._engine.call(lambda: api.start(self._container))
            if not self._engine.has_quota:
                self._engine.disk.add(self._container, self._see_written, is_busy=lambda: self._under_way is not None)
        except ImageNotFound as error:
            raise SandboxFailed(
                f"sandbox: the Docker engine has no image {self.spec.image!r}; pull or build it first, or correct the "
                "task's image name"
            ) from error
        except APIError as error:
            raise SandboxFailed(f"sandbox: the Docker engine could not start it: {error.explanation}") from error

    def _create(self) -> str:
        if self._engine.has_quota:
            try:
                return self._create_container({"size": str(self._disk_bytes())})
            except APIError as error:
                if "storage" not in str(error.explanation).lower():
                    raise
                self._engine.has_quota = False
                logger.info("the Docker storage driver has no quotas: disk_bytes limits single files only")
        return self._create_container(None)

    def _create_container(self, storage_opt: dict[str, str] | None) -> str:
        spec, limits = self.spec, self.spec.limits.on_node(self._engine.num_cpus)
        container = self._engine.client.containers.create(
            self._kept_images[-1] if self._kept_images else spec.image,
            entrypoint=["bash", "-c", INIT_SCRIPT, "thunder-sandbox"],
            command=[str(max(1, math.ceil(self._ends_s - time.monotonic())))],
            user="0:0",
            working_dir="/",
            environment=common_variables(limits),
            labels=self._labels(),
            hostname="sandbox",
            stdin_open=True,
            auto_remove=True,
            network_mode="none",
            mem_limit=limits.memory_bytes,
            memswap_limit=limits.memory_bytes,
            nano_cpus=int(limits.cpus * 1e9),
            pids_limit=limits.pids,
            cap_drop=["ALL"],
            cap_add=_KEPT_CAPABILITIES,
            security_opt=["no-new-privileges"],
            log_config=LogConfig(type=LogConfig.types.NONE),
            tmpfs={SCRATCH: "size=256m,mode=0700"},
            ulimits=[Ulimit(name="fsize", soft=limits.disk_bytes, hard=limits.disk_bytes)],
            storage_opt=storage_opt,
            **self._engine.weight,
        )
        return str(container.id)

    def _labels(self) -> dict[str, str]:
        labels = {f"thunder.{key}": value for key, value in self.spec.labels.items()}
        lease = int(time.time() + self._ends_s - time.monotonic())
        return {RUN_LABEL: "none"} | labels | {"thunder.lease": str(lease)}

    async def _open(self) -> Channel:
        opening = asyncio.ensure_future(self._engine.call(self._start_bash))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unused)
            raise
        except APIError as error:
            await self._require_alive()
            raise NotRunnable(f"the container could not run it: {error.explanation}") from error

    def _start_bash(self) -> _Exec:
        api = self._engine.client.api
        argv = ["bash", "--norc", "-c", CHANNEL_SCRIPT]
        created = api.exec_create(self._container, argv, stdin=True, workdir="/", user="0:0")
        return _Exec(created["Id"], AttachedStream(api.exec_start(created["Id"], socket=True)))

    @asynccontextmanager
    async def _watched(self, marked: Marked) -> AsyncIterator[None]:
        self._under_way = marked, time.monotonic()
        try:
            yield
        finally:
            self._under_way = None

    async def _see_written(self, written_bytes: int) -> None:
        """What fills the disk ends; a command is told why."""
        if written_bytes <= self._disk_bytes():
            self._ended_at_bytes = 0
        elif self._under_way is not None:
            marked, began_s = self._under_way
            if time.monotonic() - began_s >= _ROOM_MAKING_S:
                marked.note(f"killed: the sandbox's disk is full ({self.spec.limits.disk_bytes} bytes)\n".encode())
                await self._clear()
        elif written_bytes > self._ended_at_bytes and not self._lock.locked():
            async with self._lock:
                await self._settle()
                if self._rest is Rest.KEEP:
                    await self._end_processes()
                    self._ended_at_bytes = written_bytes

    async def _written_bytes(self) -> int:
        return (await self._engine.written_bytes([self._container])).get(self._container, 0)

    def _disk_bytes(self) -> int:
        return max(_LEAST_DISK_BYTES, self.spec.limits.disk_bytes - self._kept_bytes)

    async def _freeze(self) -> bool:
        for _ in range(_FREEZE_ATTEMPTS):  # with cgroup v1, busy processes can outrun the engine
            try:
                await self._engine.call(lambda: self._engine.client.api.pause(self._container))
            except APIError as error:
                await self._require_alive()
                logger.info("a container can't be paused now: %s", error.explanation)
            else:
                return True
        return False

    async def _thaw(self) -> None:
        await self._ask(lambda: self._engine.client.api.unpause(self._container))

    async def _put_away(self) -> bool:
        api = self._engine.client.api
        state = await self._ask(lambda: api.inspect_container(self._container))
        if any(mount["Type"] == "volume" for mount in state["Mounts"]):
            return False
        if (room_bytes := await self._take_room(await self._written_bytes())) is None:
            logger.info("a sandbox is not put away: sandbox.images.budget_bytes leaves no room for its files")
            return False
        await self._end_processes()
        written_bytes = await self._written_bytes()
        try:
            committed = await self._engine.call(lambda: api.commit(self._container, pause=False))
        except APIError as error:  # too many layers, or no room for another
            self._give_back(room_bytes)
            await self._require_alive()
            logger.warning("a sandbox can't be put away: %s", error.explanation)
            return False
        self._kept_images.append(committed["Id"])  # it has the container's labels
        self._kept_bytes += written_bytes
        self._close_channel()
        await self._remove()
        return True

    async def _take_room(self, num_bytes: int) -> int | None:
        """None: there is none."""
        if self._images is None:
            return 0
        room_bytes = await self._images.keep(num_bytes)
        self._room_bytes += room_bytes or 0
        return room_bytes

    def _give_back(self, room_bytes: int) -> None:
        self._room_bytes -= room_bytes
        if self._images is not None and room_bytes:
            self._images.give_back(room_bytes)

    async def _start_again(self) -> None:
        async with self._in_time():
            await self._remove()  # what an earlier try left
            await self._boot()

    async def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return await self._engine.call(call)
        except APIError as error:
            await self._require_alive()
            raise SandboxFailed(f"sandbox: the Docker engine refuses: {error.explanation}") from error

    async def _end(self) -> None:
        await self._engine.call(lambda: remove_container(self._engine, self._container))
        raise SandboxFailed("sandbox: a command would not die; the container was removed")

    async def _clear(self) -> None:
        if self._stdin is not None:
            self._stdin.send_now(b"kill\n")

    async def _code_of(self, channel: Channel) -> int:
        """It was killed by a command, or because the whole container is going, which the engine admits only
        after a moment."""
        assert isinstance(channel, _Exec)
        code: int | None = None
        deadline_s = time.monotonic() + _DEATH_PATIENCE_S
        while time.monotonic() < deadline_s:
            self._require_running()
            await self._require_alive()
            try:
                state: dict[str, Any] = await self._engine.call(
                    lambda: self._engine.client.api.exec_inspect(channel.exec_id)
                )
            except APIError as error:
                raise SandboxFailed(f"sandbox: it died under a command: {error.explanation}") from error
            code = state["ExitCode"]
            await asyncio.sleep(0.1)
        return KILLED if code is None else code

    async def _require_alive(self) -> None:
        try:
            state = await self._engine.call(lambda: self._engine.client.api.inspect_container(self._container))
        except NotFound as error:
            raise SandboxFailed("sandbox: its container is gone (time to live over, or removed)") from error
        except APIError as error:
            raise SandboxFailed(f"sandbox: its container can't be inspected: {error.explanation}") from error
        if not state["State"]["Running"]:
            raise SandboxFailed("sandbox: its container died (time to live over, out of memory, or killed)")

    async def _destroy(self) -> None:
        await self._remove()
        while self._kept_images:
            await self._engine.call(lambda: remove_image(self._engine, self._kept_images[-1]))
            self._kept_images.pop()
        self._give_back(self._room_bytes)

    async def _remove(self) -> None:
        """The container, whatever state it is in. Idempotent."""
        if self._creating is None:
            return
        try:
            container = await asyncio.shield(self._creating)  # a cancelled start may still be creating it
        except (APIError, SandboxFailed):
            return
        self._engine.disk.drop(container)
        await self._engine.call(lambda: remove_container(self._engine, container))
        if self._stdin is not None:
            self._stdin.close()
        while True:
            try:
                await self._engine.call(lambda: self._engine.client.api.inspect_container(container))
            except NotFound:
                self._creating = None
                return
            await asyncio.sleep(0.05)


class _Exec:
    """The `Channel` of a container."""

    def __init__(self, exec_id: str, stream: AttachedStream) -> None:
        self.exec_id = exec_id
        self._stream = stream

    async def send(self, content: bytes) -> None:
        await self._stream.send(content)

    async def read(self) -> bytes:
        frame = await self._stream.frame()
        return frame[1] if frame is not None else b""

    def close(self) -> None:
        self._stream.close()


def _close_unused(opening: asyncio.Future[_Exec]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
