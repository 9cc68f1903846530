"""Who shares which KV blocks: one path-compressed tree over block hashes for all backends.

A block's hash names the whole prefix up to it (equal hash, equal prefix), so two sequences are
compared by bisection and a longer prompt by one look at the old end. A `Run` is a stretch of
blocks that is followed by one continuation only; on it are marked

- how many programs pass through it, and how many of those are bound to each backend: a backend is
  charged for a run once, however many of its programs share it (`unique_blocks`);
- how many of its leading blocks each backend holds in its cache as far as we know (`hold`,
  `report`); `core.residency` keeps that, within the backend's pool.

Costs grow with the runs that differ, not with blocks. Invariants: a program ends where a run
ends; a run is kept while a program passes through it, a backend holds some of it or a longer run
needs it; `unique_blocks` is the sum over runs that a program bound to the backend passes through.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from thunder_rollout.core.residency import Pool, Run
from thunder_rollout.errors import BadEvent


@dataclass(slots=True)
class _Path:
    """Where a program's sequence ends."""

    run: Run
    num_blocks: int
    backend: str | None = None


class PrefixTree:
    """See the module. Programs and backends are named by strings; a program is bound to one backend."""

    def __init__(self) -> None:
        self._root = Run(array("Q"), None)
        self._paths: dict[str, _Path] = {}
        self._pools: dict[str, Pool] = {}

    def __contains__(self, program: str) -> bool:
        return program in self._paths

    # Backends

    def add_backend(self, backend: str, max_blocks: int, *, releases: bool = False) -> None:
        """A new pool, or a new size for a known one; where it `releases`, what only programs that left it
        had there is the first to go."""
        pool = self._pools.setdefault(backend, Pool(backend, max_blocks))
        pool.max_blocks, pool.releases = max_blocks, releases
        self._evict(pool)

    def remove_backend(self, backend: str) -> None:
        """No program may be bound to it any more."""
        self.forget_held(backend)
        pool = self._pools.pop(backend)
        assert pool.num_unique == 0

    def forget_held(self, backend: str) -> None:
        """Its cache is empty now."""
        for run in self._pools[backend].forget():
            self._prune(run)

    def unique_blocks(self, backend: str) -> int:
        """Blocks of the programs bound to it, shared ones once."""
        return self._pools[backend].num_unique

    # Programs

    def put(self, program: str, hashes: Sequence[int]) -> int:
        """The program's sequence is now `hashes`, whatever it was before; returns how many leading
        blocks it kept. Raises `BadEvent` for hashes that are not unsigned 64-bit ints."""
        path = self._paths.get(program) or _Path(self._root, 0)
        fork, num_kept = self._fork(path, hashes)
        run, depth = self._descend(fork, num_kept, hashes)
        rest = _to_array(hashes[depth:]) if depth < len(hashes) else None
        if (
            rest is not None
            and run is path.run
            and run is not self._root
            and run.num_programs == 1
            and not run.children
        ):
            run.hashes.extend(rest)
            self._charge(path.backend, len(rest))
        else:
            if rest is not None:
                run.children[rest[0]] = Run(rest, run)
                run = run.children[rest[0]]
            self._move(path, run, fork)
        path.num_blocks = len(hashes)
        self._paths[program] = path
        return num_kept

    def remove(self, program: str) -> None:
        """The program is gone, from its backend too; what backends hold of it stays held."""
        self.bind(program, None)
        path = self._paths.pop(program)
        self._move(path, self._root, self._root)

    def bind(self, program: str, backend: str | None) -> None:
        path = self._paths[program]
        if path.backend == backend:
            return
        for run in self._up(path.run, self._root):
            if path.backend is not None:
                self._count(run, path.backend, -1)
            if backend is not None:
                self._count(run, backend, 1)
        if path.backend is not None and (pool := self._pools[path.backend]).releases:
            pool.left.append(path.run)
        path.backend = backend

    def num_blocks(self, program: str) -> int:
        path = self._paths.get(program)
        return path.num_blocks if path is not None else 0

    def exclusive_blocks(self, program: str) -> int:
        """What its backend's `unique_blocks` would lose with it; 0 where it is bound to none."""
        path = self._paths.get(program)
        if path is None or path.backend is None:
            return 0
        num_blocks = 0
        for run in self._up(path.run, self._root):
            if run.bound[path.backend] > 1:
                break
            num_blocks += len(run.hashes)
        return num_blocks

    def added_blocks(self, program: str, backend: str) -> int:
        """What `unique_blocks` of `backend` would gain with it."""
        path = self._paths.get(program)
        num_blocks = 0
        if path is not None:
            for run in self._up(path.run, self._root):
                if backend in run.bound:
                    break
                num_blocks += len(run.hashes)
        return num_blocks

    # What caches hold

    def start_turn(self, program: str, backend: str) -> None:
        """A turn of the program begins there: it uses the whole sequence until `end_turn`."""
        pool = self._pools[backend]
        for run in pool.left:
            pool.release(self._up(run, self._root))
        pool.left.clear()
        pool.running[program] += 1
        pool.writing[program] += self.num_blocks(program) - self.held_blocks(program, backend)
        self.hold(program, backend)

    def end_turn(self, program: str, backend: str) -> None:
        pool = self._pools[backend]
        pool.running[program] -= 1
        if not pool.running[program]:
            del pool.running[program]
            if pool.resident is None:
                del pool.writing[program]

    def hold(self, program: str, backend: str, num_blocks: int | None = None) -> None:
        """`backend` just used the leading `num_blocks` (default: all) of the program's sequence. Of one that
        left a backend which releases, they are there and go first as before."""
        path = self._paths.get(program)
        if path is None:
            return
        pool = self._pools[backend]
        end = path.num_blocks
        limit = end if num_blocks is None else num_blocks
        left = pool.releases and path.backend != backend
        for run in self._up(path.run, self._root):
            start = end - len(run.hashes)
            held = min(end, limit) - start
            if held > 0:
                pool.use(run, held, left=left)
            end = start
        self._evict(pool)

    def report(
        self,
        backend: str,
        stored: Collection[int] | None,
        removed: Collection[int] = (),
        *,
        whole: bool = False,
        late: Iterable[str] = (),
    ) -> int | None:
        """The engine's news of what it holds (see `Pool.report`) corrects what is believed held, but for the
        sequences of programs with turns in flight, or whose turn ended too `late` for the news to know.

        Returns the blocks that belief was wrong about; None where the engine's blocks aren't known. Costs
        the news' hashes and, for each run held there, the logarithm of its length."""
        pool = self._pools[backend]
        for run in pool.report(stored, removed, whole=whole):
            self._prune(run)
        if pool.resident is None:
            return None
        spared = (*late, *pool.running)
        pool.writing = Counter({name: pool.writing[name] for name in spared})
        num_wrong, gone = pool.compare(self._runs(spared))
        for run in gone:
            self._prune(run)
        self._evict(pool)
        return num_wrong

    def held_blocks(self, program: str, backend: str) -> int:
        """How many leading blocks of the program's sequence `backend` holds."""
        path = self._paths.get(program)
        if path is None:
            return 0
        num_blocks = 0
        for run in self._up(path.run, self._root):
            held = run.held.get(backend, 0)
            num_blocks = num_blocks + held if held == len(run.hashes) else held
        return num_blocks

    def holders(self, program: str) -> Iterator[str]:
        """The backends that hold some of the program's sequence and of no shorter stretch that all
        of its deeper holders share: those of its deepest run that is held at all."""
        path = self._paths.get(program)
        if path is not None:
            for run in self._up(path.run, self._root):
                names = [backend for backend, num_blocks in run.held.items() if num_blocks]
                if names:
                    yield from names
                    return

    # Inside

    def _fork(self, path: _Path, hashes: Sequence[int]) -> tuple[Run, int]:
        """The end of what `hashes` shares with the path, as a run that ends there."""
        run, end = path.run, path.num_blocks
        while run.parent is not None:
            start = end - len(run.hashes)
            if end <= len(hashes) and hashes[end - 1] == run.hashes[-1]:
                return run, end
            num_shared = _num_shared(run.hashes, hashes, start)
            if num_shared:
                return self._split(run, num_shared), start + num_shared
            run, end = run.parent, start
        return run, 0

    def _descend(self, run: Run, depth: int, hashes: Sequence[int]) -> tuple[Run, int]:
        """Follow `hashes` from the end of `run`, which is at `depth`, as far as it is known."""
        while depth < len(hashes) and (child := run.children.get(hashes[depth])) is not None:
            num_shared = _num_shared(child.hashes, hashes, depth)
            depth += num_shared
            if num_shared < len(child.hashes):
                return self._split(child, num_shared), depth
            run = child
        return run, depth

    def _split(self, run: Run, num_blocks: int) -> Run:
        """Cut `run` after `num_blocks`; returns the upper part, a new run."""
        assert run.parent is not None
        upper = Run(run.hashes[:num_blocks], run.parent)
        run.parent.children[upper.hashes[0]] = upper
        run.hashes = run.hashes[num_blocks:]
        run.parent = upper
        upper.children[run.hashes[0]] = run
        upper.num_programs = run.num_programs
        upper.bound = dict(run.bound)
        for backend in list(run.held):
            self._pools[backend].divide(upper, run)
        if not (run.num_programs or run.children or run.held):
            del upper.children[run.hashes[0]]  # only what was cut off the other part was held
        return upper

    def _move(self, path: _Path, run: Run, fork: Run) -> None:
        """The path ends at `run` now; both ends are at or below `fork`."""
        for joined in self._up(run, fork):
            joined.num_programs += 1
            if path.backend is not None:
                self._count(joined, path.backend, 1)
        left = path.run
        for gone in self._up(left, fork):
            gone.num_programs -= 1
            if path.backend is not None:
                self._count(gone, path.backend, -1)
        path.run = run
        self._prune(left)

    def _prune(self, run: Run) -> None:
        while run.parent is not None and not (run.num_programs or run.children or run.held):
            if run.parent.children.get(run.hashes[0]) is run:
                del run.parent.children[run.hashes[0]]
            run = run.parent

    def _evict(self, pool: Pool) -> None:
        if pool.num_over > 0:
            in_use = self._runs(pool.running) if pool.resident is not None else {}
            for run in pool.evict(in_use):
                self._prune(run)

    def _runs(self, programs: Iterable[str]) -> dict[Run, None]:
        """The runs of their sequences, in the order in which a use of each, one after the other, leaves them."""
        runs: dict[Run, None] = {}
        for name in programs:
            for run in self._up(self._paths[name].run, self._root) if name in self._paths else ():
                runs.pop(run, None)
                runs[run] = None
        return runs

    def _count(self, run: Run, backend: str, sign: int) -> None:
        old = run.bound.get(backend, 0)
        if old + sign:
            run.bound[backend] = old + sign
        else:
            del run.bound[backend]
        if old == 0:
            self._charge(backend, len(run.hashes))
        elif old + sign == 0:
            self._charge(backend, -len(run.hashes))

    def _charge(self, backend: str | None, num_blocks: int) -> None:
        if backend is not None:
            self._pools[backend].num_unique += num_blocks

    @staticmethod
    def _up(run: Run, stop: Run) -> Iterator[Run]:
        while run is not stop:
            yield run
            assert run.parent is not None
            run = run.parent


def _num_shared(run: array[int], hashes: Sequence[int], start: int) -> int:
    """Leading blocks of `run` that `hashes[start:]` begins with, by bisection: equal hash, equal prefix."""
    low, high = 0, min(len(run), len(hashes) - start)
    while low < high:
        middle = (low + high + 1) // 2
        if run[middle - 1] == hashes[start + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _to_array(hashes: Sequence[int]) -> array[int]:
    try:
        return array("Q", hashes)
    except OverflowError:
        raise BadEvent("TurnRequested.block_hashes: must be ints in [0, 2**64)") from None
