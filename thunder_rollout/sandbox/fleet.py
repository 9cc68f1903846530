"""All nodes' sandbox hosts as one: who is placed where, which host is gone, and its coming back.

`SandboxFleet` is the one that everybody asks; it hears from each host every `REPORT_S`. A host that
is gone, or says nothing for `SILENCE_S`, is lost with all it had: its programs fail with
`SandboxFailed` and start again from their task, elsewhere. It is started again under the next
generation, which sweeps what the last one left; after `MAX_RESTARTS` starts in a row that failed it
is given up, as it is where its node is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from thunder_rollout.errors import SandboxFailed, ThunderError
from thunder_rollout.sandbox.image_engine import canonical_name
from thunder_rollout.sandbox.placement import HostStats, Placement

logger = logging.getLogger(__name__)

REPORT_S = 1.0
SILENCE_S = 30.0
START_TIMEOUT_S = 120.0
MAX_RESTARTS = 5


class HostPort(Protocol):
    """What the fleet says to a host; the hints need no answer and never fail."""

    async def start(self, images: list[str]) -> str:
        """Also again, after it was gone. Raises `ThunderError`."""

    def kill(self) -> None:
        """End its process, whatever state it is in; `start` then begins in a new one."""

    async def stats(self) -> HostStats:
        """Raises `SandboxFailed` if the host is gone."""

    def expect(self, images: list[str]) -> None: ...

    def sample_started(self, image: str) -> None: ...

    def sample_finished(self, image: str) -> None: ...


class SandboxFleet:
    """All methods run on one event loop; `start` comes after the hosts'."""

    def __init__(self, hosts: Sequence[HostPort], *, report_s: float = REPORT_S, silence_s: float = SILENCE_S) -> None:
        self._hosts = list(hosts)
        self._placement = Placement(len(hosts))
        self._report_s = report_s
        self._silence_s = silence_s
        self._images: list[str] = []
        self._generations = [0] * len(hosts)
        self._listening: list[asyncio.Task[None]] = []

    async def start(self, images: Sequence[str] = ()) -> None:
        """Every host has reported once when it returns. With `images` the hosts were started, and are again."""
        self._images = list(images)
        await asyncio.gather(*(self._ask(host) for host in self._placement.hosts))
        self._listening = [asyncio.create_task(self._listen(host)) for host in range(len(self._hosts))]

    async def stop(self) -> None:
        """Idempotent; the hosts are their owner's to stop."""
        for task in self._listening:
            task.cancel()
        await asyncio.gather(*self._listening, return_exceptions=True)

    def place(self, program: str, image: str, disk_bytes: int) -> int:
        """See `Placement.place`. A broken listener is told to whoever asks next."""
        for task in self._listening:
            if task.done() and not task.cancelled():
                task.result()
        return self._placement.place(program, canonical_name(image), disk_bytes=disk_bytes)

    def forget(self, program: str) -> int | None:
        return self._placement.forget(program)

    def locate(self, program: str) -> int | None:
        """The living host that the program was placed on."""
        return self._placement.locate(program)

    async def suspect(self, host: int) -> None:
        """Somebody could not reach the host: see whether it is gone."""
        if host in self._placement.hosts:
            await self._ask(host)

    def num_running(self) -> int:
        return self._placement.num_running

    def expect(self, images: list[str]) -> None:
        self._placement.expect(map(canonical_name, images))
        self._share()

    def sample_started(self, image: str) -> None:
        name = canonical_name(image)
        self._placement.started(name)
        if self._placement.hosts:
            self._hosts[self._placement.home(name)].sample_started(name)

    def sample_finished(self, image: str) -> None:
        name = canonical_name(image)
        if self._placement.hosts:
            self._hosts[self._placement.home(name)].sample_finished(name)

    def _share(self) -> None:
        for host, images in self._placement.shares().items():
            self._hosts[host].expect(images)

    async def _listen(self, host: int) -> None:
        """Until it is given up."""
        is_up = True
        while is_up:
            await asyncio.sleep(self._report_s)
            if host in self._placement.hosts:
                await self._ask(host)
            else:
                is_up = await self._restart(host)

    async def _restart(self, host: int) -> bool:
        """Whether the host is up again."""
        pause_s = self._report_s
        for _ in range(MAX_RESTARTS):
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    await self._hosts[host].start(self._images)
                    stats = await self._hosts[host].stats()
            except (ThunderError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    self._hosts[host].kill()
                logger.warning("sandbox host %d did not start again: %r; next try in %.0f s", host, error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s *= 2
                continue
            self._generations[host] += 1
            logger.warning("sandbox host %d generation=%d is up again", host, self._generations[host])
            self._placement.join(host, stats)
            self._share()
            return True
        logger.error("sandbox host %d is given up after %d starts", host, MAX_RESTARTS)
        return False

    async def _ask(self, host: int) -> None:
        try:
            async with asyncio.timeout(self._silence_s):
                self._placement.report(host, await self._hosts[host].stats())
        except (SandboxFailed, TimeoutError) as error:
            why = str(error) or f"it said nothing for {self._silence_s:.0f} s"
            if host in self._placement.hosts:
                if isinstance(error, TimeoutError):
                    self._hosts[host].kill()
                logger.warning("sandbox host %d is lost; its programs start again elsewhere: %s", host, why)
                self._placement.lose(host)
                self._share()
