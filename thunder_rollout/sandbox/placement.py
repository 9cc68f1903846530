"""On which node a program's sandbox starts: a pure choice, and who is where.

The least expected wait wins, in seconds: a pull where the image is not there (nor on its way),
the starts queued ahead, and `LOAD_S` for each program on a CPU of the node. Nodes that have no
disk for another sandbox come last, and before them those that are full, where a program waits until
another ends. Each image has a home, the node that pulls it ahead and where
equals are decided, so that the nodes' disks together hold many images; a home changes only when
its node is lost or comes back. A program stays where it was placed: with a node that is lost, it is lost.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from thunder_rollout.errors import SandboxFailed

LOAD_S = 10.0  # how much longer the tools of a program take for each other program on the same CPU, about
PULL_S = 20.0  # until a node has pulled an image and knows better


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStats:
    """One host's report of itself."""

    num_starting: int
    num_running: int
    num_started: int  # since the host started
    num_failed: int
    mean_start_s: float
    max_starts: int = 1
    max_sandboxes: int | None = None  # None: no limit
    num_cpus: int = 1
    images: tuple[str, ...] = ()  # on the node, canonical names
    mean_pull_s: float | None = None  # of an image; None: none was pulled yet
    free_disk_bytes: int | None = None  # where sandboxes write; None: not to be told


_UNKNOWN = HostStats(num_starting=0, num_running=0, num_started=0, num_failed=0, mean_start_s=0.0)


class Placement:
    """Hosts are numbered from 0; every name of an image is canonical."""

    def __init__(self, num_hosts: int) -> None:
        self._stats: dict[int, HostStats] = dict.fromkeys(range(num_hosts), _UNKNOWN)  # of the hosts that live
        self._placed: dict[str, tuple[int, str]] = {}  # program: host, image
        self._order: list[str] = []  # uses to come, soonest last

    @property
    def hosts(self) -> list[int]:
        """Those not lost."""
        return list(self._stats)

    @property
    def num_running(self) -> int:
        return sum(stats.num_running for stats in self._stats.values())

    def report(self, host: int, stats: HostStats) -> None:
        if host in self._stats:
            self._stats[host] = stats

    def lose(self, host: int) -> None:
        """The host is gone: nothing is placed on it any more, and its images get other homes. Idempotent."""
        self._stats.pop(host, None)

    def join(self, host: int, stats: HostStats) -> None:
        """A host that was lost is back, with nothing of what it had."""
        self._stats[host] = stats

    def place(self, program: str, image: str, *, disk_bytes: int) -> int:
        """The program's host, chosen now unless it was before. Raises `SandboxFailed` if none is left."""
        if program in self._placed:
            return self._placed[program][0]
        if not self._stats:
            raise SandboxFailed("sandbox: no sandbox host is left; look into the nodes' logs and start the run again")
        placed = Counter(host for host, _ in self._placed.values())
        due = {host for host, coming in self._placed.values() if coming == image}
        home = self.home(image)

        def rank(host: int) -> tuple[bool, bool, float, bool, int]:
            stats = self._stats[host]
            free_bytes = stats.free_disk_bytes
            has_image = image in stats.images or host in due
            return (
                free_bytes is not None and free_bytes < disk_bytes,
                stats.max_sandboxes is not None and placed[host] >= stats.max_sandboxes,
                expected_wait_s(stats, placed[host], has_image=has_image),
                host != home,
                host,
            )

        host = min(self._stats, key=rank)
        self._placed[program] = host, image
        return host

    def locate(self, program: str) -> int | None:
        """The living host that the program was placed on, if any."""
        host, _ = self._placed.get(program, (-1, ""))
        return host if host in self._stats else None

    def forget(self, program: str) -> int | None:
        """The program has no sandbox any more; the living host it was on, if any."""
        host = self.locate(program)
        self._placed.pop(program, None)
        return host

    def home(self, image: str) -> int:
        """The host that pulls the image ahead; at least one must be left."""
        return max(self._stats, key=lambda host: zlib.crc32(f"{host} {image}".encode()))

    def expect(self, order: Iterable[str]) -> None:
        """The images of the samples to come, in their order."""
        self._order = list(order)[::-1]

    def started(self, image: str) -> None:
        """A sample begins. They begin in order but for a few, so the search from the end is short."""
        for position in range(len(self._order) - 1, -1, -1):
            if self._order[position] == image:
                del self._order[position]
                return

    def shares(self) -> dict[int, list[str]]:
        """Each host's part of the order: the uses of the images it is home to."""
        shares: dict[int, list[str]] = {host: [] for host in self._stats}
        for image in reversed(self._order) if shares else ():
            shares[self.home(image)].append(image)
        return shares


def expected_wait_s(stats: HostStats, num_placed: int, *, has_image: bool) -> float:
    pull_s = 0.0 if has_image else stats.mean_pull_s if stats.mean_pull_s is not None else PULL_S
    queue_s = stats.num_starting // stats.max_starts * stats.mean_start_s
    return pull_s + queue_s + LOAD_S * num_placed / stats.num_cpus
