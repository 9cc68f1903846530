"""Whose blocks are whose: what every program's last turn left in the cache, by block hash, and who gave
that up.

Pure bookkeeping of an engine that releases programs. A program is known from the end of a turn until
what it left is taken; one that comes back before is not released any more. `MAX_PROGRAMS` are
remembered, those whose last turn ended longest ago are forgotten first. A hash names the whole prefix
up to its block. Costs grow with what a sequence gained or lost since the program's turn before.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

MAX_PROGRAMS = 4096
MAX_EMPTY = 64  # with more empty blocks to take first, an engine has time for what was released

Hash = TypeVar("Hash", bound=Hashable)


class Sequences(Generic[Hash]):
    def __init__(self) -> None:
        self._of: OrderedDict[str, Sequence[Hash]] = OrderedDict()  # oldest first
        self._num_users: Counter[Hash] = Counter()
        self._released: dict[str, None] = {}  # known programs, oldest first

    @property
    def has_released(self) -> bool:
        return bool(self._released)

    def begin(self, program: str) -> None:
        """A turn of it was asked for."""
        self._released.pop(program, None)

    def put(self, program: str, hashes: Sequence[Hash]) -> None:
        """The program's sequence is now `hashes`, which must not change any more."""
        old = self._of.pop(program, ())
        grew = bool(old) and len(hashes) >= len(old) and hashes[len(old) - 1] == old[-1]
        num_kept = len(old) if grew else 0
        self._num_users.update(hashes[num_kept:])
        self._drop(old[num_kept:])
        self._of[program] = hashes
        if len(self._of) > MAX_PROGRAMS:
            name, forgotten = self._of.popitem(last=False)
            self._released.pop(name, None)
            self._drop(forgotten)

    def release(self, program: str) -> None:
        """It gave its KV up."""
        if program in self._of:
            self._released[program] = None

    def take_released(self) -> list[Hash]:
        """Forget those that were released; returns what no other known program has, in the order in which
        it should be lost: the last one first, each sequence's tail before its head."""
        names, self._released = list(self._released), {}
        return [block_hash for name in reversed(names) for block_hash in self._drop(self._of.pop(name))]

    def _drop(self, hashes: Sequence[Hash]) -> list[Hash]:
        exclusive = []
        for block_hash in reversed(hashes):
            self._num_users[block_hash] -= 1
            if not self._num_users[block_hash]:
                del self._num_users[block_hash]
                exclusive.append(block_hash)
        return exclusive
