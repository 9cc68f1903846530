"""How turns slow down beside others: seconds for an output token, by the number of turns in flight.

An engine that is not full serves one more turn at no cost to the others; one that is takes from
them all that it gets. Which of the two is read off how the seconds for a token grow with the turns
in flight: `crowding` = d ln(seconds) / d ln(turns) where the engine is now, 0 to 1.

Means are kept for each level of load by themselves. In a steady state the load hardly moves, and a
fit of the newest turns alone would tell of their noise; the levels passed through on the way there
are remembered until they are seen again, so both sides of where the engine is are known.
"""

from __future__ import annotations

from math import exp, log

_LEVEL = log(1.19)  # levels of load, in turns: 1, 1.19, 1.41, ..., four to each doubling
_MEAN_TURNS = 64  # a level's mean forgets at this pace
_NEAR = log(2.0)  # levels count by how near they are, a normal curve of this deviation
_PRIOR = 16.0  # weight of the prior, crowding 1: of so many turns at e times the load


class LoadCurve:
    """See the module."""

    def __init__(self) -> None:
        self._levels: dict[int, tuple[float, float, float]] = {}  # turns (of those not forgotten), tokens, seconds
        self._centre = 0.0  # of late: ln(turns in flight)
        self._num_turns = 0

    def add(self, *, beside: float, tokens: float, duration_s: float) -> None:
        """A turn of `tokens` took so long with `beside` turns in flight, itself included, in the mean."""
        load = log(max(1.0, beside))
        self._num_turns += 1
        self._centre += (load - self._centre) / min(self._num_turns, _MEAN_TURNS)
        turns, all_tokens, all_s = self._levels.get(round(load / _LEVEL), (0.0, 0.0, 0.0))
        kept = 1.0 - 1.0 / _MEAN_TURNS if turns >= _MEAN_TURNS - 1 else 1.0
        self._levels[round(load / _LEVEL)] = (
            kept * turns + 1.0,
            kept * all_tokens + tokens,
            kept * all_s + duration_s,
        )

    def crowding(self) -> float:
        """In [0, 1]; 1 before anything was seen."""
        points = [
            (turns * exp(-(((level * _LEVEL - self._centre) / _NEAR) ** 2) / 2), level * _LEVEL, log(seconds / tokens))
            for level, (turns, tokens, seconds) in self._levels.items()
        ]
        weight = sum(w for w, _, _ in points)
        if not weight:
            return 1.0
        mean_x = sum(w * x for w, x, _ in points) / weight
        mean_y = sum(w * y for w, _, y in points) / weight
        spread = sum(w * (x - mean_x) ** 2 for w, x, _ in points)
        together = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in points)
        return min(1.0, max(0.0, (together + _PRIOR) / (spread + _PRIOR)))
