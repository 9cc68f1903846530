"""What an engine's cache holds, told as differences: which block hashes came and went since it was last asked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheChanges:
    """Net of what happened in between; the hashes are `engine.hashing`'s. With `whole`, `stored` is all
    there is and what was reported before is void."""

    stored: tuple[int, ...]
    removed: tuple[int, ...]
    whole: bool


class CacheReport:
    """Remembers what it reported last. A report costs a pass over the resident hashes (1 ms for 25,000)."""

    def __init__(self) -> None:
        self._reported: set[int] = set()
        self._void = True  # nothing can be told as a difference

    def void(self) -> None:
        """The next report is a whole one."""
        self._void = True

    def changes(self, resident: Collection[int], *, whole: bool) -> CacheChanges:
        before = set() if whole or self._void else self._reported
        whole = whole or self._void
        now = set(resident)
        self._reported, self._void = now, False
        return CacheChanges(stored=tuple(sorted(now - before)), removed=tuple(sorted(before - now)), whole=whole)
