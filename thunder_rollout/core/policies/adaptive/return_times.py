"""How long until an acting program is back: a survival estimate for each tool.

Time since it began acting is cut into cells, each with a hazard estimated as (returns seen +
prior) / (seconds spent there + prior). Programs that left before they returned (censored) count for
the seconds they spent, so nothing is lost by leaving them out of the returns. The prior is the
paper's f(t) = x^-t, an exponential of hazard ln(x) / unit, worth `prior_weight` programs; a tool
never seen borrows what all tools together taught.
"""

from __future__ import annotations

import math

_FIRST_EDGE_S = 0.05
_NUM_CELLS = 24  # edges double: the last finite one lies at five days
_MEAN_RETURNS = 256  # a running mean forgets at this pace
_SEEN_A_FIT = 16  # the estimate follows one in so many of what was seen behind
_LEAST_PRIOR_S = 1e-6  # of the prior in each cell, so that a hazard is always defined
_FEW = 0.01  # of the prior
_UNSEEN_S = 32.0  # a tool call may take so long before any was seen to return
_EDGES = (0.0, *(_FIRST_EDGE_S * 2.0**index for index in range(_NUM_CELLS - 1)), math.inf)


class Survival:
    """One tool's estimate."""

    def __init__(self, prior_mean_s: float, prior_weight: float, base: Survival | None = None) -> None:
        self._prior_mean_s = prior_mean_s
        self._prior_weight = prior_weight
        self._base = base
        self._returns = [0.0] * _NUM_CELLS
        self._exposure_s = [0.0] * _NUM_CELLS
        self._remaining_s: list[float] | None = None  # expected, at the start of each cell
        self._hazards: list[float] = []
        self._holding: list[tuple[float, float]] = []  # from each cell's start: seconds waited, chance of a return
        self._watches = False
        self.num_returns = 0
        self._num_seen = self._num_fitted = 0

    def add(self, acted_s: float, *, returned: bool, seen_s: float = 0.0) -> None:
        """The program acted for `acted_s` and then came back, or was lost to sight; what it acted until
        `seen_s` is known from `add_acting`."""
        self._expose(seen_s, acted_s)
        self._returns[_cell_of(acted_s)] += returned
        self.num_returns += returned
        self._num_seen += 1
        if self._num_seen > self._num_fitted * (1 + 1 / _SEEN_A_FIT):
            self._remaining_s = None

    def add_acting(self, seen_s: float, acted_s: float) -> None:
        """A program that acts for `acted_s` by now still does; it was last seen so after `seen_s`."""
        self._expose(seen_s, acted_s)
        self._remaining_s = None
        self._watches = True

    def remaining_s(self, elapsed_s: float) -> float:
        """Expected seconds until it returns, given that it has not after `elapsed_s`."""
        table = self._table()
        cell = _cell_of(elapsed_s)
        hazard, end = self._hazards[cell], _EDGES[cell + 1]
        if math.isinf(end):
            return 1.0 / hazard
        survives = math.exp(-hazard * (end - elapsed_s))
        return (1.0 - survives) / hazard + survives * table[cell + 1]

    def holding_s(self, elapsed_s: float) -> float:
        """Seconds of waiting that one return costs, if it is waited for as long as pays and then given up; the
        expected ones where it always pays to wait."""
        self._table()
        cell = _cell_of(elapsed_s)
        if cell == _NUM_CELLS - 1:
            return 1.0 / self._hazards[cell]
        waits_s, returns = _longer_if_better(self._hazards[cell], _EDGES[cell + 1] - elapsed_s, self._holding[cell + 1])
        return waits_s / returns

    def survival(self, elapsed_s: float) -> float:
        """Share of programs still acting after `elapsed_s`; with no data x^-t."""
        return math.exp(-self._hazard_until(elapsed_s))

    def chance_of_return(self, elapsed_s: float) -> float:
        """That a program comes back which has not after `elapsed_s`, in as long as any has taken so far."""
        last = max((cell for cell in range(_NUM_CELLS) if self._returns[cell]), default=None)
        longest_s = _UNSEEN_S if last is None else _EDGES[last + 1]
        if elapsed_s >= longest_s or math.isinf(longest_s):
            return float(elapsed_s < longest_s)
        return 1.0 - math.exp(self._hazard_until(elapsed_s) - self._hazard_until(longest_s))

    def _hazard_until(self, elapsed_s: float) -> float:
        self._table()
        exponent = 0.0
        for cell in range(_NUM_CELLS):
            exponent += self._hazards[cell] * (min(elapsed_s, _EDGES[cell + 1]) - _EDGES[cell])
            if elapsed_s <= _EDGES[cell + 1]:
                break
        return exponent

    def _expose(self, start_s: float, end_s: float) -> None:
        for cell in range(_cell_of(start_s), _cell_of(end_s) + 1):
            start, end = max(start_s, _EDGES[cell]), min(end_s, _EDGES[cell + 1])
            self._exposure_s[cell] += max(0.0, end - start)

    def _table(self) -> list[float]:
        if self._remaining_s is None:
            self._num_fitted = self._num_seen
            self._hazards = self._estimate()
            table = [1.0 / self._hazards[-1]]
            for cell in reversed(range(_NUM_CELLS - 1)):
                hazard = self._hazards[cell]
                survives = math.exp(-hazard * (_EDGES[cell + 1] - _EDGES[cell]))
                table.append((1.0 - survives) / hazard + survives * table[-1])
            self._remaining_s = table[::-1]
            holding = [(1.0 / self._hazards[-1], 1.0)]
            for cell in reversed(range(_NUM_CELLS - 1)):
                holding.append(_longer_if_better(self._hazards[cell], _EDGES[cell + 1] - _EDGES[cell], holding[-1]))
            self._holding = holding[::-1]
        return self._remaining_s

    def _estimate(self) -> list[float]:
        """The prior counts as `prior_weight` programs that follow it: so many seconds and returns a cell.

        Where programs may be gone without a word, the prior says nothing of a time when next to none of those
        would be left: beyond all data the rate goes on as it was, or as for a program that is expected to be away
        for as long again.
        """
        if self._base is None:
            priors = [1.0 / self._prior_mean_s] * _NUM_CELLS
        else:
            self._base._table()
            priors = self._base._hazards
        hazards: list[float] = []
        programs = self._prior_weight
        for cell, prior in enumerate(priors):
            still = programs * math.exp(-min(700.0, prior * (_EDGES[cell + 1] - _EDGES[cell])))
            prior_s = max((programs - still) / prior, _LEAST_PRIOR_S)
            if self._watches and not self._exposure_s[cell] and programs < _FEW * self._prior_weight:
                hazards.append(max(hazards[-1], 1.0 / _EDGES[cell]) if self._base is None else prior)
            else:
                hazards.append((self._returns[cell] + prior * prior_s) / (self._exposure_s[cell] + prior_s))
            programs = still
        return hazards


class ReturnTimes:
    """`Survival` by tool name; None is the tool nobody named."""

    def __init__(self, *, decay_base: float, decay_unit_s: float, prior_weight: float) -> None:
        mean_s = decay_unit_s / math.log(decay_base)
        self._all = Survival(mean_s, prior_weight)
        self._mean_s = mean_s
        self._prior_weight = prior_weight
        self._tools: dict[str | None, Survival] = {}
        self.recent_s = 0.0  # a running mean of the returns, whatever the tool

    def of(self, tool: str | None) -> Survival:
        return self._tools.get(tool, self._all)

    def add(self, tool: str | None, acted_s: float, *, returned: bool, seen_s: float = 0.0) -> None:
        for estimate in (self._all, self._own(tool)):
            estimate.add(acted_s, returned=returned, seen_s=seen_s)
        if returned:
            self.recent_s += (acted_s - self.recent_s) / min(self._all.num_returns, _MEAN_RETURNS)

    def add_acting(self, tool: str | None, seen_s: float, acted_s: float) -> None:
        for estimate in (self._all, self._own(tool)):
            estimate.add_acting(seen_s, acted_s)

    def _own(self, tool: str | None) -> Survival:
        if tool not in self._tools:
            self._tools[tool] = Survival(self._mean_s, self._prior_weight, self._all)
        return self._tools[tool]


def _cell_of(elapsed_s: float) -> int:
    if elapsed_s < _FIRST_EDGE_S:
        return 0
    return min(_NUM_CELLS - 1, 1 + int(math.log2(elapsed_s / _FIRST_EDGE_S)))


def _longer_if_better(hazard: float, length_s: float, beyond: tuple[float, float]) -> tuple[float, float]:
    """Seconds waited and chance of a return for who waits to the end of a stretch, or on as `beyond` says where
    that makes a return cheaper."""
    survives = math.exp(-hazard * length_s)
    waits_s, returns = (1.0 - survives) / hazard, 1.0 - survives
    waits_on_s, returns_on = waits_s + survives * beyond[0], returns + survives * beyond[1]
    return (waits_on_s, returns_on) if waits_on_s * returns <= waits_s * returns_on else (waits_s, returns)
