from __future__ import annotations

from thunder_rollout.core.policies.adaptive.tiers import TieredTree

P, Q = tuple(range(10)), tuple(range(100, 110))


def tree(tier_blocks: int) -> TieredTree:
    made = TieredTree()
    made.add_backend("a", 12)
    made.set_tier("a", tier_blocks)
    made.put("p", P)
    made.put("q", Q)
    return made


def test_a_tier_keeps_what_the_pool_lost() -> None:
    both = tree(20)
    both.hold("p", "a")
    both.hold("q", "a")
    assert [both.held_blocks(name, "a") for name in "pq"] == [2, 10]
    assert [both.offloaded_blocks(name, "a") for name in "pq"] == [10, 10]


def test_a_tier_has_a_bound_of_its_own() -> None:
    both = tree(15)
    both.hold("p", "a", 9)
    both.hold("q", "a")
    assert [both.offloaded_blocks(name, "a") for name in "pq"] == [5, 10]


def test_without_a_tier_nothing_is_kept() -> None:
    alone = tree(0)
    alone.hold("p", "a")
    assert alone.offloaded_blocks("p", "a") == 0
    assert list(alone.holders("p")) == ["a"]


def test_the_backend_of_a_tier_is_named_as_holder() -> None:
    both = tree(20)
    both.add_backend("b", 12)
    both.hold("p", "a")
    both.hold("p", "b")
    assert set(both.holders("p")) == {"a", "b"}
    both.hold("q", "a")
    assert list(both.holders("q")) == ["a", "a"]


def test_a_tier_is_void_with_its_backend_and_may_go() -> None:
    both = tree(20)
    both.hold("p", "a")
    both.forget_held("a")
    assert (both.held_blocks("p", "a"), both.offloaded_blocks("p", "a")) == (0, 0)
    both.hold("p", "a")
    both.set_tier("a", 0)
    assert (both.held_blocks("p", "a"), both.offloaded_blocks("p", "a")) == (10, 0)
    both.set_tier("a", 0)
    both.hold("q", "a")
    assert both.offloaded_blocks("q", "a") == 0
