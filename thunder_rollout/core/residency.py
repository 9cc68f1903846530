"""What one backend's cache holds of the tree's runs: as believed from what ran there, and, where its
engine reports its blocks, as that says.

Belief: a run's leading blocks are held from their last use until the pool is full; then the least
recently used go, a sequence's tail before its head, as engines do it. A turn's blocks count as held
from its grant, and what must go for them as gone: whatever is admitted later is computed later. An
engine that releases hears with the next turn who left it; what none of its programs has any more then
goes first, what was left last before the rest.

A report is compared with it, run by run, before it replaces it; the difference is the *drift*. Not
counted is what turns in flight are yet to write, no more than their grants made them, and as many of the
blocks believed gone for it. Of what no program has any more only the amount counts, not which of it is
left: nobody asks for it, and an engine that releases gives it up in an order that depends on the moment.
Without reports the belief stands alone.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import chain


class Run:
    """A stretch of blocks that is followed by one continuation only; see `core.prefix`."""

    __slots__ = ("bound", "children", "hashes", "held", "num_programs", "parent")

    def __init__(self, hashes: array[int], parent: Run | None) -> None:
        self.hashes = hashes
        self.parent = parent
        self.children: dict[int, Run] = {}  # by first hash
        self.num_programs = 0
        self.bound: dict[str, int] = {}  # backend -> programs
        self.held: dict[str, int] = {}  # backend -> leading blocks


class Pool:
    """One backend's blocks. Invariants: `recent` are the runs with a mark above 0 in `held`, in the order in
    which they go, and `num_held` is the sum of their marks; a mark of 0 is one of `_dropped`; `resident` are
    the hashes reported, None if not known."""

    __slots__ = (
        "_dropped",
        "_num_others",
        "left",
        "max_blocks",
        "name",
        "num_held",
        "num_unique",
        "recent",
        "releases",
        "resident",
        "running",
        "writing",
    )

    def __init__(self, name: str, max_blocks: int) -> None:
        self.name = name
        self.max_blocks = max_blocks
        self.releases = False
        self.left: list[Run] = []  # where programs ended that left it since a turn began here
        self.num_unique = 0
        self.num_held = 0
        self.recent: OrderedDict[Run, None] = OrderedDict()
        self.running: Counter[str] = Counter()  # programs with turns in flight here
        self.writing: Counter[str] = Counter()  # blocks that turns of these programs were granted to write
        self.resident: set[int] | None = None
        self._num_others = 0  # blocks in use that no run names, at the last report: outputs, what isn't full
        self._dropped: dict[Run, None] = {}  # runs of which blocks were believed gone since the last report

    def use(self, run: Run, num_blocks: int, *, left: bool = False) -> None:
        """The leading `num_blocks` of the run were just used, by a program that has `left` or by one that stays."""
        is_new = run not in self.recent
        self._mark(run, max(num_blocks, run.held.get(self.name, 0)))
        if is_new or not left:
            self.recent.move_to_end(run, last=not left)

    def release(self, runs: Iterable[Run]) -> None:
        """A program that passed through these runs, deepest first, left: those that no other has go first."""
        exclusive = [run for run in runs if run in self.recent and self.name not in run.bound]
        for run in reversed(exclusive):
            self.recent.move_to_end(run, last=False)

    @property
    def num_over(self) -> int:
        """Blocks held that the pool has no room for."""
        return self.num_held + self._num_others - self.max_blocks

    def evict(self, in_use: Collection[Run]) -> list[Run]:
        """Fit the pool, with those `in_use` last; returns the runs that are not kept for it any more (where
        the engine reports, `compare` does)."""
        victims: list[tuple[Run, int]] = []
        num_over = self.num_over
        for run in chain((r for r in self.recent if r not in in_use), (r for r in self.recent if r in in_use)):
            if num_over <= 0:
                break
            victims.append((run, max(0, run.held[self.name] - num_over)))
            num_over -= run.held[self.name]
        for run, num_kept in victims:
            self._mark(run, num_kept)
        if self.resident is None:
            return [run for run, num_kept in victims if not num_kept]
        for run, _ in victims:
            self._drop(run)
        return []

    def forget(self) -> list[Run]:
        """Nothing is held now; returns the runs that were kept for it. What is reported next is still told
        from what was reported."""
        runs = [*self.recent, *self._dropped]
        for run in runs:
            run.held.pop(self.name, None)
        self.recent.clear()
        self._dropped.clear()
        self.left.clear()
        self.num_held = self._num_others = 0
        return runs

    def divide(self, upper: Run, lower: Run) -> None:
        """`upper` is a new run, cut from the head of `lower`, whose mark is still that of both."""
        held = lower.held[self.name]
        num_upper = min(held, len(upper.hashes))
        self._mark(upper, num_upper)
        self._mark(lower, held - num_upper)
        if lower in self._dropped:
            self._drop(upper)
            self._drop(lower)

    def report(self, stored: Collection[int] | None, removed: Collection[int], *, whole: bool) -> list[Run]:
        """The engine's news: all it holds (`whole`), or what changed since the last; None: nothing is known.
        News without what it follows on is dropped. Returns the runs that are not kept any more."""
        if stored is not None and whole:
            self.resident = set(stored)
        elif stored is not None and self.resident is not None:
            self.resident.difference_update(removed)
            self.resident.update(stored)
        elif stored is None:
            self.resident, self._num_others = None, 0
            gone = [run for run in self._dropped if not run.held[self.name]]
            for run in gone:
                del run.held[self.name]
            self._dropped.clear()
            return gone
        return []

    def compare(self, spared: Collection[Run]) -> tuple[int, list[Run]]:
        """Replace belief by what was reported, but for the runs `spared` of turns in flight or just over, in
        order of use. Returns the blocks that belief was wrong about and the runs that are not kept any more.
        Costs a bisection for each run held, or dropped since the last report."""
        assert self.resident is not None
        num_wrong = num_missed = num_orphans = num_unwritten = num_named = 0
        dropped, self._dropped = self._dropped, {}
        gone: list[Run] = []
        for run in (*self.recent, *(run for run in reversed(dropped) if run not in self.recent)):
            believed, really = run.held.get(self.name, 0), _num_resident(run.hashes, self.resident)
            num_named += really
            if run in spared:
                num_unwritten += max(0, believed - really)
                if run in dropped:
                    self._dropped[run] = None
                continue
            if run.num_programs:
                num_wrong += max(0, believed - really)
                num_missed += max(0, really - believed)
            else:
                num_orphans += believed - really
            self._mark(run, really)
            if really and not believed:
                self.recent.move_to_end(run, last=False)
            elif not really:
                gone.append(run)
        for run in spared:
            if run in self.recent and self.name in run.bound:
                self.recent.move_to_end(run)
        self._num_others = len(self.resident) - num_named + len(self.running)
        num_wrong += max(0, num_orphans) + max(0, num_unwritten - sum(self.writing.values()))
        num_missed += max(0, -num_orphans)
        return num_wrong + max(0, num_missed - num_unwritten), gone

    def _drop(self, run: Run) -> None:
        """Blocks of it are believed gone; a mark, of 0 at least, keeps it until a report has said so."""
        run.held.setdefault(self.name, 0)
        self._dropped[run] = None

    def _mark(self, run: Run, num_blocks: int) -> None:
        self.num_held += num_blocks - run.held.get(self.name, 0)
        if num_blocks:
            run.held[self.name] = num_blocks
            self.recent[run] = None
        elif run.held.pop(self.name, 0):
            del self.recent[run]


def _num_resident(hashes: Sequence[int], resident: Collection[int]) -> int:
    """Leading blocks, by bisection: engines give a sequence's tail up before its head."""
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high + 1) // 2
        if hashes[middle - 1] in resident:
            low = middle
        else:
            high = middle - 1
    return low
