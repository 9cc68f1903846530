"""The turns that were granted and not yet released, and which of them have lost their caller.

A caller that died never releases. verl's engines know requests by names of their own, so a turn is found
in its replica by the length of its prompt; turns of one length stand for one another.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from thunder_rollout.verl_adapter.router.programs import ProgramRecord


@dataclass(slots=True, eq=False)
class HeldTurn:
    record: ProgramRecord
    grant: int
    server_id: str
    prompt_tokens: int
    max_tokens: int | None  # that it may produce; None: not told
    version: int | None  # of its replica's weights when it was granted
    seen_s: float  # when its replica was last known to have it; at first, when it was granted


class HeldTurns:
    """By server and request id; of one id, the first granted is taken to end first."""

    def __init__(self) -> None:
        self._by_server: dict[str, dict[str, deque[HeldTurn]]] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    def count(self, server_id: str) -> int:
        return self._counts[server_id]

    def add(self, turn: HeldTurn) -> None:
        turns = self._by_server.setdefault(turn.server_id, {})
        turns.setdefault(turn.record.request_id, deque()).append(turn)
        self._counts[turn.server_id] += 1

    def pop(self, server_id: str, request_id: str) -> HeldTurn | None:
        """The turn that a release ends; None for one that is not held any more."""
        turns = self._by_server.get(server_id, {}).get(request_id)
        if not turns:
            return None
        turn = turns[0]
        self.remove(turn)
        return turn

    def remove(self, turn: HeldTurn) -> None:
        turns = self._by_server[turn.server_id][turn.record.request_id]
        turns.remove(turn)
        if not turns:
            del self._by_server[turn.server_id][turn.record.request_id]
        self._counts[turn.server_id] -= 1

    def drop_all_but(self, server_ids: Collection[str]) -> list[HeldTurn]:
        """All of servers that are gone."""
        dropped = [turn for gone in set(self._by_server).difference(server_ids) for turn in self.of(gone)]
        for turn in dropped:
            self.remove(turn)
        return dropped

    def of(self, server_id: str) -> list[HeldTurn]:
        return [turn for turns in self._by_server.get(server_id, {}).values() for turn in turns]


def orphans(turns: Iterable[HeldTurn], prompt_lengths: Iterable[int], now: float, after_s: float) -> list[HeldTurn]:
    """Turns that their replica has not had for `after_s`; notes those that it has.

    A request of a length that no turn has (images may change it) counts for the turn granted last.
    """
    there = Counter(prompt_lengths)
    missing = []
    for turn in turns:
        if there[turn.prompt_tokens] > 0:
            there[turn.prompt_tokens] -= 1
            turn.seen_s = now
        else:
            missing.append(turn)
    missing.sort(key=lambda turn: turn.grant)
    num_others = there.total()
    for turn in missing[len(missing) - min(num_others, len(missing)) :]:
        turn.seen_s = now
    return [turn for turn in missing if now - turn.seen_s >= after_s]
