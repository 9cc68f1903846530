"""A prefix cache on runs of blocks: `engine.block_pool` for sequences that only grow.

A run is what one owner computed behind its parent: a prefix that several programs share (a system
prompt, a group's task) or the rest of one program's context. A sequence is a chain of shared runs
and its own run. All its blocks are released at one moment, its tail first, so a run loses its
blocks in order of release, from its end: one number for each run says what is left of it, and the
cost of everything here grows with runs, not with blocks.

Invariants: a block is held by turns, kept by a run that nobody holds, or empty; a shared run that
is held is complete, a program's own run is empty while a turn of it runs (the turn has its blocks).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Run:
    key: str
    num_blocks: int = 0  # resident, from its start
    num_holds: int = 0


@dataclass(frozen=True, slots=True)
class SharedRun:
    """A leading part of a prompt that other prompts have too, in full blocks."""

    key: str
    num_blocks: int


@dataclass(slots=True)
class Claim:
    """The blocks of one running turn: runs held with others, and blocks of its own.

    `building` are shared runs it computes for all (with their full lengths), `num_doubles` blocks of
    its own that repeat a shared run and go to waste.
    """

    key: str
    shared: list[tuple[Run, int]] = field(default_factory=list)
    num_shared: int = 0
    building: list[tuple[Run, int]] = field(default_factory=list)
    num_doubles: int = 0
    num_own: int = 0

    @property
    def num_blocks(self) -> int:
        return self.num_shared + self.num_own


class RunCache:
    def __init__(self, num_blocks: int, *, enable_caching: bool = True) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_held = 0
        self.num_kept = 0
        self._enable_caching = enable_caching
        self._runs: dict[str, Run] = {}
        self._kept: OrderedDict[str, Run] = OrderedDict()  # least recently released first

    @property
    def num_free(self) -> int:
        return self.num_blocks - self.num_held

    def match(self, shared: tuple[SharedRun, ...], key: str, limit: int) -> tuple[int, int]:
        """Resident leading blocks, at most `limit`, and how many of them nobody holds."""
        hits = unheld = 0
        for part in shared:
            run = self._runs.get(part.key)
            found = 0 if run is None else min(run.num_blocks, part.num_blocks, limit - hits)
            hits += found
            if run is not None and not run.num_holds:
                unheld += found
            if found < part.num_blocks:
                return hits, unheld
        own = self._runs.get(key)
        found = 0 if own is None else min(own.num_blocks, limit - hits)
        return hits + found, unheld + found

    def claim(self, shared: tuple[SharedRun, ...], key: str, limit: int) -> tuple[Claim, int]:
        """Hold what `match` finds; returns the claim and the number of hits."""
        claim = Claim(key)
        hits = 0
        whole = True
        for part in shared:
            run = self._runs.setdefault(part.key, Run(part.key))
            found = min(run.num_blocks, part.num_blocks, limit - hits) if whole else 0
            hits += found
            if found == part.num_blocks or run.num_holds:
                self._hold(run)
                claim.shared.append((run, found))
                claim.num_shared += found
                claim.num_doubles += part.num_blocks - found
            else:
                self._take_over(run, found)
                claim.building.append((run, part.num_blocks))
                claim.num_own += found
            whole = whole and found == part.num_blocks
        own = self._runs.setdefault(key, Run(key))
        found = min(own.num_blocks, limit - hits) if whole else 0
        self._take_over(own, found)
        claim.num_own += found
        return claim, hits + found

    def take(self, claim: Claim, num_blocks: int) -> bool:
        """Give the claim fresh blocks, from those kept longest if need be; False if too many are held."""
        if num_blocks > self.num_free:
            return False
        self.hold_more(num_blocks)
        claim.num_own += num_blocks
        return True

    def hold_more(self, num_blocks: int) -> None:
        """Hold fresh blocks, at most `num_free`, for claims that count them later."""
        self._make_empty(num_blocks)
        self.num_held += num_blocks

    def publish(self, claim: Claim) -> None:
        """The shared runs that it was building are complete: others may hold them too."""
        for run, num_blocks in claim.building:
            run.num_blocks = num_blocks
            run.num_holds = 1
            claim.shared.append((run, num_blocks))
            claim.num_shared += num_blocks
            claim.num_own -= num_blocks
        claim.building.clear()

    def release(self, claim: Claim, num_full: int) -> None:
        """Give up the claim, the first `num_full` blocks of whose sequence are full."""
        self.num_held -= claim.num_own
        left = max(0, num_full - claim.num_shared - claim.num_doubles)
        built: list[Run] = []
        for run, num_blocks in claim.building:
            run.num_blocks = min(num_blocks, left)
            left -= run.num_blocks
            built.append(run)
        own = self._runs.setdefault(claim.key, Run(claim.key))
        self._unkeep(own)  # another turn of the same program may have ended before
        own.num_blocks = left
        self._keep(own)
        for run in reversed(built):
            self._keep(run)
        for run, _ in reversed(claim.shared):
            run.num_holds -= 1
            if run.num_holds == 0:
                self.num_held -= run.num_blocks
                self._keep(run)

    def demote(self, key: str) -> None:
        """A run that nobody holds is taken first."""
        if key in self._kept:
            self._kept.move_to_end(key, last=False)

    def drop(self, key: str) -> None:
        """Forget a run that nobody holds; its blocks are empty."""
        run = self._kept.pop(key, None)
        if run is not None:
            self.num_kept -= run.num_blocks
            del self._runs[key]

    def clear(self) -> None:
        """Forget every run that nobody holds."""
        for key in list(self._kept):
            self.drop(key)

    def _hold(self, run: Run) -> None:
        if run.num_holds == 0 and self._unkeep(run):
            self.num_held += run.num_blocks
        run.num_holds += 1

    def _take_over(self, run: Run, num_blocks: int) -> None:
        """Its first `num_blocks` are the claim's now, what lies behind them is lost."""
        self._unkeep(run)
        run.num_blocks = 0
        self.num_held += num_blocks

    def _keep(self, run: Run) -> None:
        if run.num_blocks and self._enable_caching:
            self._kept[run.key] = run
            self.num_kept += run.num_blocks
        else:
            run.num_blocks = 0
            self._runs.pop(run.key, None)

    def _unkeep(self, run: Run) -> bool:
        if self._kept.pop(run.key, None) is None:
            return False
        self.num_kept -= run.num_blocks
        return True

    def _make_empty(self, num_blocks: int) -> None:
        missing = num_blocks - (self.num_blocks - self.num_held - self.num_kept)
        while missing > 0:
            key, run = next(iter(self._kept.items()))
            lost = min(missing, run.num_blocks)
            run.num_blocks -= lost
            self.num_kept -= lost
            missing -= lost
            if not run.num_blocks:
                del self._kept[key]
                del self._runs[key]
