"""How far contexts grow: what programs of each kind of task did so far.

Running means of the tokens a turn produces, and the contexts with which programs ended. A program
of context c is there with context y with the share of those that ended beyond c that ended beyond y
as well. Until some have ended, those that did are the short ones, and it is also expected to reach
what the largest of its kind has reached so far, or `prior_growth` of what it has if that is more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence

_MAX_FINALS = 256  # contexts remembered for each kind of task
_MEAN_TURNS = 50  # a running mean forgets at this pace
_PRIOR_ENDS = 4  # what is expected before any end is worth so many


class _Kind:
    def __init__(self) -> None:
        self.output_tokens = 0.0
        self.num_turns = 0
        self.reached_tokens = 0  # the largest context so far
        self.finals: list[int] = []  # sorted
        self._by_age: deque[int] = deque()

    def add_output(self, output_tokens: int) -> None:
        self.num_turns += 1
        self.output_tokens += (output_tokens - self.output_tokens) / min(self.num_turns, _MEAN_TURNS)

    def add_final(self, context_tokens: int) -> None:
        insort(self.finals, context_tokens)
        self._by_age.append(context_tokens)
        if len(self._by_age) > _MAX_FINALS:
            del self.finals[bisect_left(self.finals, self._by_age.popleft())]

    def remove_final(self, context_tokens: int) -> None:
        """One that was added, if it is still remembered."""
        if context_tokens in self._by_age:
            self._by_age.remove(context_tokens)
            del self.finals[bisect_left(self.finals, context_tokens)]


class Growth:
    def __init__(self, *, prior_growth: float) -> None:
        self._prior_growth = prior_growth
        self._kinds: dict[str | None, _Kind] = {}
        self._all = _Kind()

    def add_turn(self, kind: str | None, output_tokens: int) -> None:
        self._all.add_output(output_tokens)
        self._kinds.setdefault(kind, _Kind()).add_output(output_tokens)

    def reach(self, kind: str | None, context_tokens: int) -> None:
        """A program of the kind has such a context."""
        known = self._kinds.setdefault(kind, _Kind())
        known.reached_tokens = max(known.reached_tokens, context_tokens)

    def add_end(self, kind: str | None, context_tokens: int) -> None:
        self._kinds.setdefault(kind, _Kind()).add_final(context_tokens)

    def take_back_end(self, kind: str | None, context_tokens: int) -> None:
        """That program goes on after all."""
        self._kinds[kind].remove_final(context_tokens)

    def output_tokens(self, kind: str | None) -> float:
        known = self._kinds.get(kind)
        return (known if known is not None and known.num_turns else self._all).output_tokens

    def curve(self, kind: str | None, context_tokens: int, points: Sequence[float]) -> list[float]:
        """Tokens it is expected to hold after a growth of each of `points`: 0 with the chance that it
        has ended by then. `points` ascend."""
        known = self._kinds.get(kind)
        seen = self._seen(kind, known.finals, context_tokens, points) if known is not None and known.finals else None
        if known is not None and len(known.finals) >= _MAX_FINALS and seen is not None:
            return seen
        growth = self._prior_growth * context_tokens
        if known is not None:
            growth = max(growth, known.reached_tokens - context_tokens)
        prior = [context_tokens + point if point <= growth else 0.0 for point in points]
        if known is None or seen is None:
            return prior
        share = _PRIOR_ENDS / (_PRIOR_ENDS + len(known.finals))
        return [after + share * (before - after) for before, after in zip(prior, seen, strict=True)]

    def _seen(self, kind: str | None, finals: list[int], context_tokens: int, points: Sequence[float]) -> list[float]:
        num_beyond = len(finals) - bisect_right(finals, context_tokens)
        if not num_beyond:  # longer than any before it: it may end any time
            growth = self.output_tokens(kind)
            return [context_tokens + point if point <= growth else 0.0 for point in points]
        tokens = []
        for point in points:
            reached = context_tokens + point
            num_left = len(finals) - bisect_right(finals, reached) if point else num_beyond
            tokens.append(reached * num_left / num_beyond)
            if not num_left:
                break
        return tokens + [0.0] * (len(points) - len(tokens))
