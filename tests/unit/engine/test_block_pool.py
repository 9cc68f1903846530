from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from thunder_rollout.engine.block_pool import BlockPool


def fill(pool: BlockPool, *hashes: int) -> list[int]:
    blocks = pool.take((), len(hashes))
    assert blocks is not None
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.seal(block, block_hash)
    return blocks


def test_the_longest_prefix_is_found_while_held_and_after() -> None:
    pool = BlockPool(8)
    blocks = fill(pool, 1, 2, 3)
    assert pool.match([1, 2, 9, 3]) == blocks[:2]
    pool.release(blocks)
    assert pool.match([1, 2, 3]) == blocks
    assert pool.match([2, 3]) == blocks[1:]  # a hash names its prefix: the pool needn't


def test_shared_blocks_are_freed_by_their_last_holder() -> None:
    pool = BlockPool(4)
    blocks = fill(pool, 1, 2)
    assert pool.take(pool.match([1, 2]), 0) == []
    pool.release(blocks)
    assert pool.stats().num_held == 2
    pool.release(blocks)
    assert pool.stats().num_held == 0


def test_blocks_without_content_go_first_then_the_oldest_tail() -> None:
    pool = BlockPool(5)
    old, young = fill(pool, 1, 2), fill(pool, 3)
    blank = pool.take((), 2)
    assert blank is not None
    pool.release(old)
    pool.release(young)
    pool.release(blank)
    assert sorted(pool.take((), 2) or ()) == sorted(blank)
    assert pool.take((), 1) == [old[1]]
    assert [len(pool.match([1, 2])), len(pool.match([3]))] == [1, 1]
    assert pool.stats().num_evicted == 1


def test_a_hit_saves_a_block_from_eviction() -> None:
    pool = BlockPool(2)
    first, second = fill(pool, 1), fill(pool, 2)
    pool.release(first)
    pool.release(second)
    pool.take(pool.match([1]), 0)
    pool.release(first)
    assert pool.take((), 1) == second


def test_a_free_hit_takes_room_like_a_fresh_block() -> None:
    pool = BlockPool(2)
    blocks = fill(pool, 1)
    pool.release(blocks)
    assert not pool.fits(blocks, 2)
    assert pool.take(blocks, 2) is None
    assert pool.stats().num_held == 0
    assert pool.fits(blocks, 1)


def test_two_blocks_may_bear_one_hash() -> None:
    pool = BlockPool(2)
    one, other = fill(pool, 1), fill(pool, 1)
    pool.release(one)
    pool.take((), 1)
    assert pool.match([1]) == other


def test_forgetting_spares_held_blocks() -> None:
    pool = BlockPool(4)
    held, free = fill(pool, 1), fill(pool, 2)
    pool.release(free)
    pool.forget_free()
    assert (pool.match([1]), pool.match([2])) == (held, [])


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(2, enable_caching=False)
    fill(pool, 1)
    assert pool.match([1]) == []


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of holds: counts and free list agree, and a match is what was sealed."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.held: list[list[int]] = []
        self.content: dict[int, int] = {}

    @rule(target=holds, hashes=st.lists(st.integers(0, 5), unique=True, max_size=4), num_fresh=st.integers(0, 3))
    def take(self, hashes: list[int], num_fresh: int) -> object:
        hits = self.pool.match(hashes)
        assert [self.content[block] for block in hits] == hashes[: len(hits)]
        fresh = self.pool.take(hits, num_fresh)
        if fresh is None:
            return multiple()
        assert not {block for blocks in self.held for block in blocks} & set(fresh)
        for block in fresh:
            self.content.pop(block, None)
        self.held.append([*hits, *fresh])
        return self.held[-1]

    @rule(blocks=holds, block_hash=st.integers(0, 5))
    def seal(self, blocks: list[int], block_hash: int) -> None:
        for block in blocks:
            if block not in self.content:
                self.pool.seal(block, block_hash)
                self.content[block] = block_hash

    @rule(blocks=consumes(holds))
    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        self.held = [other for other in self.held if other is not blocks]

    @invariant()
    def counts_agree(self) -> None:
        stats = self.pool.stats()
        assert stats.num_held == len({block for blocks in self.held for block in blocks})
        assert stats.num_cached == len(self.content)


TestPoolMachine = PoolMachine.TestCase
