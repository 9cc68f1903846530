"""All nodes' sandbox hosts as one: who is placed where, and which host is gone.

`SandboxFleet` is the one that everybody asks; it hears from each host every `REPORT_S`. A host
that is gone, or says nothing for `SILENCE_S`, is lost for good: its programs fail with
`SandboxFailed` and start again from their task, elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.image_engine import canonical_name
from thunder_rollout.sandbox.placement import HostStats, Placement

logger = logging.getLogger(__name__)

REPORT_S = 1.0
SILENCE_S = 30.0


class HostPort(Protocol):
    """What the fleet says to a host; the hints need no answer and never fail."""

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
        self._listening: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Every host has reported once when it returns."""
        await asyncio.gather(*(self._ask(host) for host in self._placement.hosts))
        self._listening = [asyncio.create_task(self._listen(host)) for host in self._placement.hosts]

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
        while host in self._placement.hosts:
            await asyncio.sleep(self._report_s)
            await self._ask(host)

    async def _ask(self, host: int) -> None:
        try:
            async with asyncio.timeout(self._silence_s):
                self._placement.report(host, await self._hosts[host].stats())
        except (SandboxFailed, TimeoutError) as error:
            why = str(error) or f"it said nothing for {self._silence_s:.0f} s"
            if host in self._placement.hosts:
                logger.warning("sandbox host %d is lost; its programs start again elsewhere: %s", host, why)
                self._placement.lose(host)
                self._share()
