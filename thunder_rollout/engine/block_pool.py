"""A pool of KV blocks with prefix sharing: reference counts, and least recently used goes first.

Pure bookkeeping, the same as vLLM's, so that hits here are hits there:
- a block is held (count > 0) or free; a free block keeps its content, and its hash, until it is
  taken for something else;
- `seal` gives a full block its hash, from then on `match` finds it, held or free;
- two sequences that compute the same prefix at the same time hold a block each under one hash;
- blocks that never got a hash are reused first, then the least recently released, a sequence's
  tail before its head.

Invariants: every block is held or in the free list, never both; every hash leads to blocks that
bear it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    num_blocks: int
    num_held: int
    num_cached: int  # blocks with a hash, held or free
    num_evicted: int  # hashed blocks taken for something else, since the start


class BlockPool:
    def __init__(self, num_blocks: int, *, enable_caching: bool = True) -> None:
        assert num_blocks > 0
        self._counts = [0] * num_blocks
        self._hash_of: list[int | None] = [None] * num_blocks
        self._by_hash: dict[int, OrderedDict[int, None]] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._enable_caching = enable_caching
        self._num_evicted = 0

    def match(self, hashes: Sequence[int]) -> list[int]:
        """The blocks that hold the longest cached prefix of `hashes`; nothing is held by this."""
        blocks: list[int] = []
        for block_hash in hashes:
            candidates = self._by_hash.get(block_hash)
            if not candidates:
                break
            blocks.append(next(iter(candidates)))
        return blocks

    def fits(self, hits: Sequence[int], num_fresh: int) -> bool:
        """Whether `take` with the same arguments would succeed."""
        return num_fresh + sum(self._counts[block] == 0 for block in hits) <= len(self._free)

    def take(self, hits: Sequence[int], num_fresh: int) -> list[int] | None:
        """Hold `hits` (from `match`, just now) and `num_fresh` blocks of no content; returns the
        fresh ones, or None with nothing changed where the pool is too full."""
        if not self.fits(hits, num_fresh):
            return None
        for block in hits:
            if self._counts[block] == 0:
                del self._free[block]
            self._counts[block] += 1
        fresh = [self._free.popitem(last=False)[0] for _ in range(num_fresh)]
        for block in fresh:
            self._counts[block] = 1
            self._num_evicted += self._forget(block)
        return fresh

    def seal(self, block: int, block_hash: int) -> None:
        """The held `block` is full and its prefix is `block_hash`."""
        assert self._counts[block] > 0
        if not self._enable_caching or self._hash_of[block] is not None:
            return
        self._hash_of[block] = block_hash
        self._by_hash.setdefault(block_hash, OrderedDict())[block] = None

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each of a sequence's `blocks`, given first to last."""
        freed: list[int] = []
        for block in reversed(blocks):
            assert self._counts[block] > 0, f"block {block} is not held"
            self._counts[block] -= 1
            if self._counts[block] == 0:
                freed.append(block)
        for block in freed:
            self._free[block] = None
            if self._hash_of[block] is None:
                self._free.move_to_end(block, last=False)

    def first_empty(self, limit: int) -> list[int]:
        """The free blocks without content that will be taken before any other, at most `limit`."""
        return list(islice(takewhile(lambda block: self._hash_of[block] is None, self._free), limit))

    def demote(self, hashes: Sequence[int], *, behind: Sequence[int] = ()) -> None:
        """Of each of these hashes, a block that nobody holds is taken next, in this order, but for the
        first of the free blocks, `behind`."""
        blocks = [next(iter(self._by_hash[block_hash])) for block_hash in hashes if block_hash in self._by_hash]
        for block in reversed([*behind, *(block for block in blocks if self._counts[block] == 0)]):
            self._free.move_to_end(block, last=False)

    def forget_free(self) -> None:
        """Drop the hash of every block that nobody holds."""
        for block in self._free:
            self._forget(block)

    def cached_hashes(self) -> Collection[int]:
        """Of every block that `match` could find."""
        return self._by_hash.keys()

    def stats(self) -> PoolStats:
        return PoolStats(
            num_blocks=len(self._counts),
            num_held=len(self._counts) - len(self._free),
            num_cached=sum(len(blocks) for blocks in self._by_hash.values()),
            num_evicted=self._num_evicted,
        )

    def _forget(self, block: int) -> bool:
        block_hash = self._hash_of[block]
        if block_hash is None:
            return False
        self._hash_of[block] = None
        blocks = self._by_hash[block_hash]
        del blocks[block]
        if not blocks:
            del self._by_hash[block_hash]
        return True
