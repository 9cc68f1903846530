"""`sticky`, `round_robin` and `cache_aware`: every request gets a backend at once."""

from __future__ import annotations

from thunder_rollout.core.config import CacheAwareConfig, SchedulerConfig
from thunder_rollout.core.decisions import Decision, Restore
from thunder_rollout.core.events import TurnEnded, WeightsUpdated, WeightsUpdating
from thunder_rollout.core.harness import Harness
from thunder_rollout.core.policies.cache_aware import PrefixIndex


def where(decisions: list[Decision]) -> list[str]:
    return [decision.backend for decision in decisions if isinstance(decision, Restore)]


def router(policy: str, **capacity_tokens: int) -> Harness:
    return Harness(SchedulerConfig(policy=policy), **capacity_tokens)


def cache_aware(**changes: float) -> Harness:
    config = SchedulerConfig(policy="cache_aware", cache_aware=CacheAwareConfig(**changes))  # type: ignore[arg-type]
    return Harness(config, a=10_000, b=10_000)


def blocks(*hashes: int) -> tuple[int, ...]:
    return hashes


def test_sticky_takes_the_idlest_backend_and_stays() -> None:
    shell = router("sticky", a=10_000, b=10_000)
    assert where(shell.ask("p", 100)) == ["a"]
    assert where(shell.ask("q", 100)) == ["b"]
    shell.end("p")
    assert where(shell.ask("r", 100)) == ["a"]
    assert where(shell.ask("p", 120)) == ["a"]


def test_sticky_never_waits_for_room() -> None:
    shell = router("sticky", a=100)
    assert [where(shell.ask(f"p{index}", 90)) for index in range(5)] == [["a"]] * 5


def test_sticky_spreads_what_waited_for_a_backend() -> None:
    shell = router("sticky", a=1000, b=1000)
    shell.send(WeightsUpdating(backends=("a", "b")))
    for index in range(4):
        shell.ask(f"p{index}", 100)
    assert where(shell.send(WeightsUpdated(backends=("a", "b")))) == ["a", "b", "a", "b"]


def test_sticky_skips_backends_that_cannot_hold_the_prompt() -> None:
    shell = router("sticky", a=100, b=1000)
    assert where(shell.ask("p", 500)) == ["b"]
    assert where(shell.ask("q", 500)) == ["b"]


def test_a_long_program_waits_for_the_one_backend_that_holds_it() -> None:
    shell = router("sticky", a=100, b=1000)
    shell.send(WeightsUpdating(backends=("b",)))
    assert shell.ask("p", 500) == []
    assert where(shell.ask("q", 50)) == ["a"]
    assert where(shell.send(WeightsUpdated(backends=("b",)))) == ["b"]


def test_round_robin_sends_each_request_to_the_next_backend() -> None:
    shell = router("round_robin", a=1000, b=1000, c=1000)
    assert where(shell.ask("p", 100)) == ["a"]
    assert where(shell.ask("p", 100)) == ["b"]
    assert where(shell.ask("q", 100)) == ["c"]
    assert where(shell.ask("q", 100)) == ["a"]
    assert [backend.num_in_flight for backend in shell.scheduler.snapshot().backends] == [2, 1, 1]
    assert [backend.num_reasoning for backend in shell.scheduler.snapshot().backends] == [1, 1, 0]


def test_round_robin_skips_what_is_closed_or_too_small() -> None:
    shell = router("round_robin", a=1000, b=100, c=1000)
    shell.send(WeightsUpdating(backends=("a",)))
    assert where(shell.ask("p", 500)) == ["c"]
    assert where(shell.ask("p", 500)) == ["c"]
    shell.send(WeightsUpdated(backends=("a",)))
    assert where(shell.ask("p", 500)) == ["a"]


def test_round_robin_goes_on_with_what_waited() -> None:
    shell = router("round_robin")
    for index in range(3):
        shell.ask(f"p{index}", 200 if index == 0 else 50)
    shell.send(WeightsUpdating(backends=()))
    assert where(shell.up("a", 300)) == ["a", "a", "a"]
    shell = router("round_robin", a=100, b=100, c=1000)
    shell.send(WeightsUpdating(backends=("a", "b", "c")))
    for index in range(3):
        shell.ask(f"p{index}", 200 if index == 0 else 50)
    assert where(shell.send(WeightsUpdated(backends=("a", "b")))) == ["a", "b"]
    assert where(shell.send(WeightsUpdated(backends=("c",)))) == ["c"]


def test_a_held_request_goes_elsewhere_when_another_backend_opens() -> None:
    shell = router("round_robin", a=1000)
    shell.ask("p", 100)
    shell.send(WeightsUpdating(backends=("a",)))
    assert shell.ask("p", 100) == []
    assert where(shell.up("b", 1000)) == ["b"]


def test_cache_aware_follows_the_longest_prefix() -> None:
    shell = cache_aware()
    assert where(shell.ask("p", 300, block_hashes=blocks(1, 2, 3))) == ["a"]
    assert where(shell.ask("q", 300, block_hashes=blocks(7, 8, 9))) == ["b"]  # the smaller index
    assert where(shell.ask("q2", 400, block_hashes=blocks(7, 8, 9, 10))) == ["b"]
    assert where(shell.ask("p2", 400, block_hashes=blocks(1, 2, 3, 4))) == ["a"]


def test_cache_aware_needs_more_than_the_threshold() -> None:
    shell = cache_aware(cache_threshold=0.5)
    shell.ask("p", 400, block_hashes=blocks(1, 2, 3, 4))
    assert where(shell.ask("q", 400, block_hashes=blocks(1, 2, 30, 40))) == ["b"]


def test_cache_aware_leaves_the_prefix_when_load_is_unbalanced() -> None:
    shell = cache_aware(balance_abs_threshold=2)
    prompt = blocks(1, 2, 3)
    placed = [where(shell.ask(f"p{index}", 300, block_hashes=prompt)) for index in range(4)]
    assert placed == [["a"], ["a"], ["a"], ["b"]]


def test_cache_aware_without_hashes_takes_the_idlest() -> None:
    shell = cache_aware()
    assert [where(shell.ask(f"p{index}", 100)) for index in range(3)] == [["a"], ["b"], ["a"]]


def test_cache_aware_forgets_a_cache_that_the_backend_lost() -> None:
    shell = cache_aware()
    shell.ask("p", 300, block_hashes=blocks(1, 2, 3))
    shell.send(WeightsUpdating(backends=("a",)))
    shell.send(WeightsUpdated(backends=("a",)))
    shell.ask("q", 100, block_hashes=blocks(5))
    shell.send(TurnEnded(program="q", grant=2))
    shell.down("b")
    shell.up("b", 10_000, generation=2)
    assert where(shell.ask("r", 300, block_hashes=blocks(1, 2, 3))) == ["b"]


def test_cache_aware_serves_what_waited() -> None:
    shell = Harness(SchedulerConfig(policy="cache_aware"))
    assert shell.ask("p", 300, block_hashes=blocks(1, 2, 3)) == []
    assert where(shell.up("a", 1000)) == ["a"]


def test_prefix_index_counts_leading_blocks_and_forgets_the_oldest_deepest_first() -> None:
    index = PrefixIndex(max_tokens=50)
    index.insert((1, 2, 3), 10)
    index.insert((7, 8), 10)
    assert (index.match((1, 2, 3)), index.match((1, 9, 3)), index.match((9,)), index.num_tokens) == (3, 1, 0, 50)
    index.insert((7, 8, 9), 10)
    assert (index.match((1, 2, 3)), index.match((7, 8, 9)), index.num_tokens) == (2, 3, 50)
