"""How far contexts grow: what programs of each kind of task did so far.

Running means of the tokens a turn produces, and the contexts with which programs ended. A program
of context c is expected to end at the mean of those that ended beyond c; with none, it is expected
to grow by `prior_growth` of what it has. `peak_tokens` is what a set of programs will need at once.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable

_MAX_FINALS = 256  # contexts remembered for each kind of task
_MEAN_TURNS = 50  # a running mean forgets at this pace


class _Kind:
    def __init__(self) -> None:
        self.output_tokens = 0.0
        self.num_turns = 0
        self.finals: list[int] = []  # sorted
        self._by_age: deque[int] = deque()
        self._suffix: list[int] = []

    def add_output(self, output_tokens: int) -> None:
        self.num_turns += 1
        self.output_tokens += (output_tokens - self.output_tokens) / min(self.num_turns, _MEAN_TURNS)

    def add_final(self, context_tokens: int) -> None:
        insort(self.finals, context_tokens)
        self._by_age.append(context_tokens)
        if len(self._by_age) > _MAX_FINALS:
            self.finals.remove(self._by_age.popleft())
        self._suffix = []

    def final_tokens(self, context_tokens: int) -> float | None:
        """Mean of the finals beyond it; None where there are none."""
        start = bisect_right(self.finals, context_tokens)
        if start == len(self.finals):
            return None
        if not self._suffix:
            total = 0
            for final in reversed(self.finals):
                total += final
                self._suffix.append(total)
        count = len(self.finals) - start
        return self._suffix[count - 1] / count


class Growth:
    def __init__(self, *, prior_growth: float) -> None:
        self._prior_growth = prior_growth
        self._kinds: dict[str | None, _Kind] = {}
        self._all = _Kind()

    def add_turn(self, kind: str | None, output_tokens: int) -> None:
        self._all.add_output(output_tokens)
        self._kinds.setdefault(kind, _Kind()).add_output(output_tokens)

    def add_end(self, kind: str | None, context_tokens: int) -> None:
        self._kinds.setdefault(kind, _Kind()).add_final(context_tokens)

    def output_tokens(self, kind: str | None) -> float:
        known = self._kinds.get(kind)
        return (known if known is not None and known.num_turns else self._all).output_tokens

    def remaining_tokens(self, kind: str | None, context_tokens: int) -> float:
        """Expected growth until the program ends."""
        known = self._kinds.get(kind)
        final = known.final_tokens(context_tokens) if known is not None else None
        if final is not None:
            return final - context_tokens
        if known is not None and known.finals:
            return self.output_tokens(kind)  # longer than any before it: it may end any time
        return self._prior_growth * context_tokens


class Projection:
    """What programs need together as all of them grow at one pace and leave when they are done.

    `programs` are (context, remaining growth) in tokens. After each has grown by x, those with
    remaining >= x are there with context + x.
    """

    def __init__(self, programs: Iterable[tuple[float, float]]) -> None:
        self._remaining: list[float] = []  # descending
        self._needs: list[float] = []  # when the program at this place is about to leave
        context = 0.0
        for count, (tokens, remaining) in enumerate(sorted(programs, key=lambda item: -item[1]), 1):
            context += tokens
            self._remaining.append(remaining)
            self._needs.append(context + count * remaining)
        self.now_tokens = context

    def peak_tokens(self, tokens: float = 0.0, remaining: float = 0.0) -> float:
        """The most that is needed at once if a program of `tokens` that grows by `remaining` joins."""
        peak = self.now_tokens + tokens
        staying = contexts = 0.0
        for at, need in zip(self._remaining, self._needs, strict=True):
            if at >= remaining:
                staying += 1
                contexts = need - staying * at
            peak = max(peak, need + tokens + at if at <= remaining else need)
        return max(peak, contexts + staying * remaining + tokens + remaining)
