"""How few bytes any cache could have pulled, for judging ours; needs the whole order, so offline."""

from __future__ import annotations

import math
from collections.abc import Sequence

from thunder_rollout.sandbox.image_cache import Image


def least_pulled_bytes(uses: Sequence[Image], budget_bytes: int) -> float:
    """A lower bound on the bytes pulled to use `uses` in this order within the budget.

    It may keep any part of any layer, needs no room to unpack and uses one image at a time. Then
    to keep the bytes that are needed soonest is optimal (keeping a byte from one use to the next
    is an interval, and of intervals over a capacity those that end last are dropped), provided
    that all layers compress alike.
    """
    next_use: dict[tuple[int, str], float] = {}
    upcoming: dict[str, int] = {}
    for position in range(len(uses) - 1, -1, -1):
        for layer in uses[position].layers:
            next_use[position, layer.key] = upcoming.get(layer.key, math.inf)
            upcoming[layer.key] = position
    kept_bytes: dict[str, float] = {}
    due: dict[str, float] = {}
    pulled_bytes = 0.0
    for position, image in enumerate(uses):
        for layer in image.layers:
            missing = 1 - kept_bytes.get(layer.key, 0.0) / layer.disk_bytes if layer.disk_bytes else 0.0
            pulled_bytes += missing * layer.pull_bytes
            kept_bytes[layer.key] = layer.disk_bytes
            due[layer.key] = next_use[position, layer.key]
        _shrink(kept_bytes, due, {layer.key for layer in image.layers}, budget_bytes)
    return pulled_bytes


def _shrink(kept_bytes: dict[str, float], due: dict[str, float], in_use: set[str], budget_bytes: int) -> None:
    excess = sum(kept_bytes.values()) - budget_bytes
    for key in sorted(kept_bytes.keys() - in_use, key=lambda k: (-due[k], k)):
        if excess <= 0:
            return
        cut = min(excess, kept_bytes[key])
        excess -= cut
        kept_bytes[key] -= cut
        if kept_bytes[key] <= 0:
            del kept_bytes[key]
