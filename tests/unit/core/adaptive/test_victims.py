from __future__ import annotations

import itertools
import random
import statistics

from hypothesis import given, settings
from hypothesis import strategies as st

from thunder_rollout.core.policies.adaptive import victims
from thunder_rollout.core.policies.adaptive.victims import Item, choose, total_waste

ITEMS = st.lists(st.builds(Item, tokens=st.integers(0, 50), waste=st.floats(0, 100)), max_size=9)


def brute_force(items: list[Item], need_tokens: float, price: float) -> float:
    subsets = itertools.chain.from_iterable(itertools.combinations(range(len(items)), n) for n in range(len(items) + 1))
    covering = (s for s in subsets if sum(items[i].tokens for i in s) >= need_tokens)
    return min((total_waste(items, s, need_tokens, price) for s in covering), default=float("inf"))


@settings(max_examples=300, deadline=None)
@given(items=ITEMS, need=st.integers(1, 150), price=st.sampled_from([0.0, 0.5, 3.0]))
def test_small_sets_are_solved_exactly(items: list[Item], need: int, price: float) -> None:
    chosen = choose(items, need, overshoot_price=price)
    assert len(set(chosen)) == len(chosen)
    if sum(item.tokens for item in items) >= need:
        assert sum(items[index].tokens for index in chosen) >= need
        assert total_waste(items, chosen, need, price) <= brute_force(items, need, price) + 1e-6
    else:
        assert set(chosen) == {index for index, item in enumerate(items) if item.tokens}


def test_nothing_is_given_up_without_need() -> None:
    assert choose([Item(5, 1.0)], 0) == []


def test_the_heuristic_is_within_five_percent_on_average(monkeypatch) -> None:
    """Lognormal contexts, waste that grows faster than they do, needs of a tenth to a half of all."""
    monkeypatch.setattr(victims, "EXACT_ITEMS", 0)
    rng = random.Random(0)
    ratios, shortest_first = [], []
    for _ in range(150):
        tokens = [round(rng.lognormvariate(8, 0.8)) for _ in range(13)]
        items = [Item(t, t * (1 + t / 20_000) * rng.uniform(0.5, 2)) for t in tokens]
        need, price = sum(tokens) * rng.uniform(0.1, 0.5), rng.choice([0.0, 1.0])
        best = brute_force(items, need, price)
        ratios.append(total_waste(items, choose(items, need, overshoot_price=price), need, price) / best)
        shortest = list(itertools.takewhile(_until(items, need), sorted(range(13), key=lambda i: items[i].tokens)))
        shortest_first.append(total_waste(items, shortest, need, price) / best)
    assert statistics.fmean(ratios) < 1.05
    assert max(ratios) < 1.5
    assert statistics.fmean(shortest_first) > 1.1, "the instances are not trivial"


def test_many_items_cover_the_need() -> None:
    items = [Item(1.0, 1.0 + index / 1000) for index in range(500)]
    chosen = choose(items, 400)
    assert len(chosen) == 400


def _until(items: list[Item], need: float):
    freed = 0.0

    def missing(index: int) -> bool:
        nonlocal freed
        before, freed = freed, freed + items[index].tokens
        return before < need

    return missing
