"""How complete each group (the samples of one prompt) is.

A group is remembered after its last program left, for the next sample of it may come later; the
oldest of more than `MAX_GROUPS` are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

MAX_GROUPS = 16_384


@dataclass(slots=True)
class _Group:
    live: dict[str, None] = field(default_factory=dict)
    num_ended: int = 0


class Groups:
    def __init__(self) -> None:
        self._groups: OrderedDict[str, _Group] = OrderedDict()
        self.reordered: list[str] = []  # live members of groups that changed since this was last cleared

    def join(self, group: str, program: str) -> None:
        if group not in self._groups:
            self._groups[group] = _Group()
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        self._groups[group].live[program] = None
        self.reordered += self._groups[group].live

    def leave(self, group: str, program: str) -> None:
        known = self._groups.get(group)
        if known is not None:
            known.live.pop(program, None)
            known.num_ended += 1
            self.reordered += known.live

    def complete_share(self, group: str | None) -> float:
        """Ended members of all seen so far; 0 for a program without a group."""
        known = self._groups.get(group) if group is not None else None
        if known is None or not known.num_ended:
            return 0.0
        return known.num_ended / (known.num_ended + len(known.live))
