"""Weight versions as the scheduler counts them, and which programs they make stale.

A version is a name; its number is its place in the order in which names were first told. Tokens may
come before their version is announced (an engine is done before its siblings): such a name takes the
next number, which the announcement then finds.
"""

from __future__ import annotations

from thunder_rollout.core.events import INITIAL_VERSION


class WeightVersions:
    def __init__(self, max_staleness: int | None) -> None:
        self._max_staleness = max_staleness
        self._numbers = {INITIAL_VERSION: 0}
        self._newest = 0

    def number(self, version: str) -> int:
        return self._numbers.setdefault(version, len(self._numbers))

    def announce(self, version: str) -> bool:
        """Backends serve this version from now on; returns whether that may have made programs stale."""
        before, self._newest = self._newest, self.number(version)
        return self._max_staleness is not None and self._newest > before

    def is_stale(self, oldest: int | None) -> bool:
        """Whether tokens of the weights number `oldest` (None: no token) are too old to go on from."""
        if self._max_staleness is None or oldest is None:
            return False
        return self._newest - oldest > self._max_staleness
