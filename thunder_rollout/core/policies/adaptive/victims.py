"""Which programs to give up so that enough room comes free at the least expected waste.

The problem is a covering knapsack: choose items whose tokens reach `need_tokens` so that the sum of
their waste, and what is freed beyond the need at `overshoot_price` a token, is least. Exact up to
`EXACT_ITEMS` by search with bounds; beyond it the best of: every prefix in order of waste for each
useful token, completed by each single item that closes the gap, and then thinned out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXACT_ITEMS = 12
MAX_ITEMS = 48  # the heuristic looks at the cheapest of so many


@dataclass(frozen=True, slots=True)
class Item:
    tokens: float  # freed by giving it up
    waste: float  # expected, in any unit that all items share


def total_waste(items: Sequence[Item], chosen: Sequence[int], need_tokens: float, overshoot_price: float) -> float:
    freed = sum(items[index].tokens for index in chosen)
    return sum(items[index].waste for index in chosen) + overshoot_price * max(0.0, freed - need_tokens)


def choose(items: Sequence[Item], need_tokens: float, *, overshoot_price: float = 0.0) -> list[int]:
    """Indices of the items to give up; all useful ones where they can't cover the need."""
    if need_tokens <= 0:
        return []
    useful = [index for index, item in enumerate(items) if item.tokens > 0]
    if sum(items[index].tokens for index in useful) <= need_tokens:
        return useful
    ranked = sorted(useful, key=lambda index: (items[index].waste / min(items[index].tokens, need_tokens), index))
    if len(ranked) <= EXACT_ITEMS:
        chosen = _search([items[index] for index in ranked], need_tokens, overshoot_price)
    else:
        chosen = _heuristic(
            [items[index] for index in _shortlist(items, ranked, need_tokens)], need_tokens, overshoot_price
        )
    return [ranked[position] for position in chosen]


def _shortlist(items: Sequence[Item], ranked: list[int], need_tokens: float) -> list[int]:
    """The first `MAX_ITEMS`, and as many more as cover the need."""
    covered = 0.0
    for position, index in enumerate(ranked):
        if position >= MAX_ITEMS and covered >= need_tokens:
            return ranked[:position]
        covered += items[index].tokens
    return ranked


def _search(items: list[Item], need_tokens: float, price: float) -> list[int]:
    """Branch and bound, items in rank order; the bound is the waste so far plus the fractional rest."""
    best = _heuristic(items, need_tokens, price)
    best_cost = total_waste(items, best, need_tokens, price)
    left_tokens = [0.0]
    for item in reversed(items):
        left_tokens.append(left_tokens[-1] + item.tokens)
    left_tokens.reverse()
    chosen: list[int] = []

    def visit(position: int, missing: float, waste: float) -> None:
        nonlocal best, best_cost
        if missing <= 0:
            cost = waste - price * missing
            if cost < best_cost:
                best, best_cost = chosen.copy(), cost
            return
        if position == len(items) or left_tokens[position] < missing or waste >= best_cost:
            return
        item = items[position]
        chosen.append(position)
        visit(position + 1, missing - item.tokens, waste + item.waste)
        chosen.pop()
        visit(position + 1, missing, waste)

    visit(0, need_tokens, 0.0)
    return best


def _heuristic(items: list[Item], need_tokens: float, price: float) -> list[int]:
    best: list[int] = []
    best_cost = float("inf")
    prefix: list[int] = []
    freed = waste = 0.0
    for position in range(len(items) + 1):
        missing = need_tokens - freed
        closing = [index for index in range(position, len(items)) if items[index].tokens >= missing > 0]
        last = min(closing, key=lambda index: items[index].waste + price * items[index].tokens, default=None)
        if missing <= 0 or last is not None:
            chosen = prefix if last is None else [*prefix, last]
            chosen = _thinned(items, chosen, need_tokens)
            cost = total_waste(items, chosen, need_tokens, price)
            if cost < best_cost:
                best, best_cost = chosen, cost
        if missing <= 0 or waste >= best_cost:
            break
        if position < len(items):
            prefix.append(position)
            freed += items[position].tokens
            waste += items[position].waste
    return best


def _thinned(items: list[Item], chosen: list[int], need_tokens: float) -> list[int]:
    """Without those that the others make needless, the most wasteful left out first."""
    spare = sum(items[index].tokens for index in chosen) - need_tokens
    kept = set(chosen)
    for index in sorted(chosen, key=lambda index: -items[index].waste):
        if items[index].tokens <= spare:
            spare -= items[index].tokens
            kept.remove(index)
    return [index for index in chosen if index in kept]
