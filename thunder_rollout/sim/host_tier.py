"""What an engine keeps of its KV in host memory, on the runs of blocks of `sim.cache`.

As vLLM's native offload does it: whatever a turn held when it ended or was preempted is there, until
the tier is full; then the least recently used sequence goes, its tail before its head. There is no
choice of what to store. Pure: no clock, no I/O, no randomness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from thunder_rollout.sim.cache import SharedRun


class HostTier:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_used = 0
        self._runs: OrderedDict[str, int] = OrderedDict()  # leading blocks of each, least recently used first

    def store(self, shared: Sequence[SharedRun], key: str, num_full: int) -> None:
        """A turn gave up the first `num_full` blocks of its sequence."""
        for name, start, length in reversed(list(_parts(shared, key, num_full))):
            old = self._runs.get(name, 0)
            self._runs[name] = max(old, min(length, num_full - start))
            self._runs.move_to_end(name)
            self.num_used += self._runs[name] - old
        while self.num_used > self.num_blocks:
            name, held = next(iter(self._runs.items()))
            lost = min(held, self.num_used - self.num_blocks)
            self.num_used -= lost
            self._runs[name] = held - lost
            if held == lost:
                del self._runs[name]

    def match(self, shared: Sequence[SharedRun], key: str, start: int, limit: int) -> int:
        """How many blocks of the sequence it holds in one piece behind the first `start`, none beyond `limit`."""
        end = start
        for name, first, length in _parts(shared, key, limit):
            if end < first + length:
                held = min(first + self._runs.get(name, 0), limit)
                end = max(end, held)
                if held < min(first + length, limit):
                    break
        return end - start


def _parts(shared: Sequence[SharedRun], key: str, limit: int) -> Iterator[tuple[str, int, int]]:
    """The runs that the first `limit` blocks of the sequence are made of: name, first block, length."""
    first = 0
    for part in shared:
        if first >= limit:
            return
        yield part.key, first, part.num_blocks
        first += part.num_blocks
    if first < limit:
        yield key, first, limit - first
