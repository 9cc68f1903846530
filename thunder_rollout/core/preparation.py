"""How far down the queue sandboxes are prepared: ready when their programs' KV is granted, and not long before.

Programs that wait without a sandbox have places in restore order, from 1; a grant to one of them moves the
others up. Time is told in grants: so many as were given within a start's lead time, its own program's the last
of them, is the place from which that sandbox would have been ready in time. The depth is the place that sufficed
for nearly all of a kind's last programs (in the words of inventories: a base stock, a high quantile of the demand
during the lead time). A lead time is that from PrepareSandbox to SandboxReady: a pull and the queue at the host
are in it. A program that was admitted as it came, unannounced, is not counted: nobody could have prepared for it.

The depth shrinks at once, and grows by one with each program that is granted before its sandbox is ready. So
long lead times, as where many start at once at the beginning of a run, fill the hosts with no starts that nobody is
waiting for, which would be taken for yet longer lead times. Preparations then follow one another as grants do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass, field

Kind = tuple[str | None, bool]  # of task; whether the sandbox was there before and was stopped

LATE_SHARE = 0.02  # of programs, whose sandbox may be ready after their grant
COLD_DEPTH = 4  # while nothing is learned
MIN_STARTS = 8
MAX_STARTS = 128
MAX_GRANTS = 512
MAX_KINDS = 64


@dataclass(slots=True)
class _Learned:
    """Of one kind. `places` are those from which its last sandboxes would have been ready in time."""

    places: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_STARTS))
    depth: int = COLD_DEPTH

    @property
    def is_known(self) -> bool:
        return len(self.places) >= MIN_STARTS

    def adapt(self, growth: int) -> None:
        if self.is_known:
            sufficed = sorted(self.places)[-1 - int(LATE_SHARE * len(self.places))]
            self.depth = min(sufficed, self.depth + growth)


class Preparation:
    """See the module. All is O(MAX_STARTS) at most, once a start."""

    def __init__(self, max_ahead: int) -> None:
        """`max_ahead` bounds the depth, whatever is learned; 0: nothing is prepared before its grant."""
        self.max_ahead = max_ahead
        self._grants_s: deque[float] = deque(maxlen=MAX_GRANTS)
        self._num_grants = 0
        self._kinds: OrderedDict[Kind, _Learned] = OrderedDict()

    def note_grant(self, kind: Kind, now: float, *, is_late: bool) -> int:
        """To a program that waited or was announced, and had no sandbox in use; `is_late`: the one to come is not
        ready. Returns the grant's number, for `note_start`."""
        self._grants_s.append(now)
        self._num_grants += 1
        if is_late:
            self._of(kind).adapt(growth=1)
        return self._num_grants

    def note_start(self, kind: Kind, lead_s: float, grant: int) -> None:
        """The sandbox of the program with that grant, which may be before it or after, took `lead_s`."""
        index = grant - 1 - (self._num_grants - len(self._grants_s))
        if index < 0:
            return
        learned = self._of(kind)
        learned.places.append(max(1, index + 1 - bisect_right(self._grants_s, self._grants_s[index] - lead_s)))
        learned.adapt(growth=0)

    def depth(self, kind: Kind) -> int:
        """Places from the head whose programs, where they are of this kind, should be prepared by now."""
        learned = self._kinds.get(kind)
        if learned is not None and learned.is_known:
            return min(learned.depth, self.max_ahead)
        known = (other.depth for other in self._kinds.values() if other.is_known)
        return min(max(known, default=COLD_DEPTH), self.max_ahead)

    def expected_s(self, place: int) -> float:
        """How soon, about, the program at `place` is granted; 0 while nothing is learned."""
        num_spans = len(self._grants_s) - 1
        if num_spans < MIN_STARTS:
            return 0.0
        return (self._grants_s[-1] - self._grants_s[0]) / num_spans * place

    def _of(self, kind: Kind) -> _Learned:
        learned = self._kinds.get(kind)
        if learned is None:
            learned = self._kinds[kind] = _Learned()
            if len(self._kinds) > MAX_KINDS:
                self._kinds.popitem(last=False)
        return learned
