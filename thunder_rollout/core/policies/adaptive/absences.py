"""How long programs are away: each is watched from the end of a turn to its next request, or its own end.

Where nobody announces that a program ended (`silent_ends`; verl tells its router of none), those that still
act teach as well, each time that they have been away for twice as long: the longer one is away, the less likely
it is back. And what counts is not for how long a program is expected to be away, for ever perhaps, but what
waiting for it costs while that pays.
"""

from __future__ import annotations

import heapq

from thunder_rollout.core.policies.adaptive.accounts import ProgramAccount
from thunder_rollout.core.policies.adaptive.growth import Growth
from thunder_rollout.core.policies.adaptive.return_times import ReturnTimes

_FIRST_LOOK_S = 1.0  # most are back before
_LIKELY = 0.5  # a program is taken for gone, and its context for a final one, while its return is less likely


class Absences:
    def __init__(self, return_times: ReturnTimes, growth: Growth, *, silent_ends: bool) -> None:
        self._times = return_times
        self._growth = growth
        self._silent_ends = silent_ends
        self._looks: list[tuple[float, str, float]] = []  # when to look at it again, whom, acting since

    def began(self, program_id: str, account: ProgramAccount, since_s: float, now: float) -> None:
        """It acts since then; longer than since now where a request of it was withdrawn."""
        account.seen_acting_s = now - since_s
        if self._silent_ends:
            heapq.heappush(self._looks, (now + _FIRST_LOOK_S, program_id, since_s))

    def ended(self, account: ProgramAccount, now: float, *, returned: bool) -> None:
        """It came back, or was lost to sight."""
        if returned and account.gone_tokens is not None:
            self._growth.take_back_end(account.kind, account.gone_tokens)
            account.gone_tokens = None
        assert account.acting_since_s is not None
        acted_s = now - account.acting_since_s
        self._times.add(account.tool, acted_s, returned=returned, seen_s=account.seen_acting_s)

    def look(self, accounts: dict[str, ProgramAccount], now: float) -> None:
        """Learn from those that still act; to be called as time passes."""
        while self._looks and self._looks[0][0] <= now:
            _, program_id, since_s = heapq.heappop(self._looks)
            account = accounts.get(program_id)
            if account is None or account.acting_since_s != since_s:
                continue
            acted_s = now - since_s
            self._times.add_acting(account.tool, account.seen_acting_s, acted_s)
            account.seen_acting_s = acted_s
            if account.gone_tokens is None and self._times.of(account.tool).chance_of_return(acted_s) < _LIKELY:
                self._over(account)
            heapq.heappush(self._looks, (now + acted_s, program_id, since_s))

    def forgotten(self, account: ProgramAccount) -> None:
        """The program is no more."""
        if account.gone_tokens is None and account.last_backend is not None:
            self._over(account)

    def _over(self, account: ProgramAccount) -> None:
        account.gone_tokens = account.context_tokens
        self._growth.add_end(account.kind, account.context_tokens)

    def remaining_s(self, account: ProgramAccount, now: float) -> float:
        """Expected seconds of waiting for its next request: of the tool call it is in, or of the next one."""
        if account.acting_since_s is None:
            return self._expected_s(account.last_tool, 0.0)
        elapsed_s = now - account.acting_since_s
        if account.expected_s is not None and elapsed_s < account.expected_s:
            return account.expected_s - elapsed_s
        return self._expected_s(account.tool, elapsed_s)

    def _expected_s(self, tool: str | None, elapsed_s: float) -> float:
        estimate = self._times.of(tool)
        return estimate.holding_s(elapsed_s) if self._silent_ends else estimate.remaining_s(elapsed_s)
