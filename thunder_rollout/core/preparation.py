"""How far down the queue sandboxes are prepared: ready when their programs' KV is granted, and not long before.

Programs that wait without a sandbox have places in restore order, from 1; a grant to one of them moves the
others up. Time is told in grants: a program is prepared as soon as it has a place within which the grants
to come are seldom all given before a sandbox of its kind is up. That depth is learned from

- the times of the last grants to such programs. One that was admitted as it came, unannounced, is not
  counted: nobody could have prepared for it;
- the last lead times of each kind, from PrepareSandbox to SandboxReady: a pull and the queue at the host
  are in them.

Preparations then follow one another as grants do, so what is prepared and unused stays at that depth.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from math import ceil

Kind = tuple[str | None, bool]  # of task; whether the sandbox was there before and was stopped

EARLY_SHARE = 0.05  # of the times that so many grants took, one that only this share was shorter than
LATE_SHARE = 0.9  # of the lead times, one that this share was not longer than
COLD_DEPTH = 4  # while nothing is learned
MIN_GRANTS = 9
MAX_GRANTS = 128
MAX_LEADS = 32
MAX_KINDS = 64


@dataclass(slots=True)
class _Learned:
    leads_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_LEADS))
    lead_s: float | None = None
    depth: int = COLD_DEPTH
    num_grants: int | None = None  # when `depth` was looked at last; None: look again


class Preparation:
    """See the module. All is O(MAX_GRANTS) at most, once a grant and kind."""

    def __init__(self, max_ahead: int) -> None:
        """`max_ahead` bounds the depth, whatever is learned; 0: nothing is prepared before its grant."""
        self.max_ahead = max_ahead
        self._grants_s: deque[float] = deque(maxlen=MAX_GRANTS)
        self._num_grants = 0
        self._kinds: OrderedDict[Kind, _Learned] = OrderedDict()

    def note_grant(self, now: float) -> None:
        """To a program that waited or was announced, and had no sandbox in use."""
        self._grants_s.append(now)
        self._num_grants += 1

    def note_lead(self, kind: Kind, lead_s: float) -> None:
        learned = self._of(kind)
        learned.leads_s.append(lead_s)
        ordered = sorted(learned.leads_s)
        learned.lead_s = ordered[ceil(LATE_SHARE * len(ordered)) - 1]

    def depth(self, kind: Kind) -> int:
        """Places from the head whose programs, where they are of this kind, should be prepared by now.

        It grows by one a grant, so that growing fills no queue at the hosts, which would be taken for
        longer leads."""
        learned = self._of(kind)
        if learned.num_grants != self._num_grants:
            since = 0 if learned.num_grants is None else self._num_grants - learned.num_grants
            learned.num_grants = self._num_grants
            learned.depth = min(self._wanted_depth(learned.lead_s), learned.depth + since)
        return min(learned.depth, self.max_ahead)

    def expected_s(self, place: int) -> float:
        """How soon at the earliest, about, the program at `place` is granted; 0 while nothing is learned."""
        num_known = len(self._grants_s) // 2
        if len(self._grants_s) < MIN_GRANTS:
            return 0.0
        if place > num_known:
            return self._early_s(num_known) * place / num_known
        return self._early_s(place)

    def _of(self, kind: Kind) -> _Learned:
        learned = self._kinds.get(kind)
        if learned is None:
            learned = self._kinds[kind] = _Learned()
            if len(self._kinds) > MAX_KINDS:
                self._kinds.popitem(last=False)
        return learned

    def _wanted_depth(self, lead_s: float | None) -> int:
        if lead_s is None:
            lead_s = max((kind.lead_s for kind in self._kinds.values() if kind.lead_s is not None), default=None)
        if lead_s is None or len(self._grants_s) < MIN_GRANTS:
            return COLD_DEPTH
        num_known = len(self._grants_s) // 2
        longest_s = self._early_s(num_known)
        if longest_s >= lead_s:
            return 1 + bisect_left(range(1, num_known), lead_s, key=self._early_s)
        is_in_bounds = num_known * lead_s < self.max_ahead * longest_s
        return ceil(num_known * lead_s / longest_s) if is_in_bounds else self.max_ahead

    def _early_s(self, num_grants: int) -> float:
        """What so many grants in a row seldom took less than."""
        grants = list(self._grants_s)
        spans = sorted(after - before for before, after in zip(grants, grants[num_grants:], strict=False))
        return spans[min(int(EARLY_SHARE * len(grants)), len(spans) - 1)]
