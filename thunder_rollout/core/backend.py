"""The scheduler's view of one KV pool: what is bound to it and what runs on it.

Invariants: the sums equal those over `programs` after every `bind`, `unbind` and `refresh`
(whoever changes a bound program refreshes it); `grants` are the turns in flight here, also those
of a program that was since bound elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from thunder_rollout.core.program import Phase, Program


@dataclass(frozen=True, slots=True)
class _Footprint:
    context_tokens: int
    acting: bool
    marked: bool


class Backend:
    """See the module. `max_running` is a hint: the engine queues by itself beyond it."""

    __slots__ = (
        "_footprints",
        "acting_tokens",
        "capacity_tokens",
        "generation",
        "grants",
        "marked_tokens",
        "max_running",
        "name",
        "num_acting",
        "num_marked",
        "programs",
        "reasoning_tokens",
        "updating",
        "used_tokens",
    )

    def __init__(
        self, name: str, *, generation: int, capacity_tokens: int, max_running: int, updating: bool = False
    ) -> None:
        self.name = name
        self.generation = generation
        self.capacity_tokens = capacity_tokens
        self.max_running = max_running
        self.updating = updating  # its weights are being replaced: no turn is admitted
        self.used_tokens: int | None = None  # as the engine last reported
        self.programs: dict[str, Program] = {}
        self.grants: dict[int, str] = {}  # grant -> program
        self.reasoning_tokens = 0
        self.acting_tokens = 0
        self.marked_tokens = 0  # part of reasoning_tokens
        self.num_acting = 0
        self.num_marked = 0
        self._footprints: dict[str, _Footprint] = {}

    @property
    def num_bound(self) -> int:
        return len(self.programs)

    @property
    def num_reasoning(self) -> int:
        return len(self.programs) - self.num_acting

    @property
    def num_in_flight(self) -> int:
        return len(self.grants)

    @property
    def bound_tokens(self) -> int:
        """Sum of c over its programs, nothing discounted."""
        return self.reasoning_tokens + self.acting_tokens

    def fits(self, context_tokens: int) -> bool:
        """Whether the empty pool could hold the context and one token more."""
        return context_tokens + 1 <= self.capacity_tokens

    def bind(self, program: Program) -> None:
        self.programs[program.program_id] = program
        self.refresh(program)

    def unbind(self, program: Program) -> None:
        del self.programs[program.program_id]
        self._count(self._footprints.pop(program.program_id), -1)

    def refresh(self, program: Program) -> None:
        """Account for a change of a bound program."""
        old = self._footprints.get(program.program_id)
        if old is not None:
            self._count(old, -1)
        new = _Footprint(program.context_tokens, program.phase is Phase.ACTING, program.marked)
        self._footprints[program.program_id] = new
        self._count(new, 1)

    def _count(self, footprint: _Footprint, sign: int) -> None:
        tokens = sign * footprint.context_tokens
        if footprint.acting:
            self.acting_tokens += tokens
            self.num_acting += sign
        else:
            self.reasoning_tokens += tokens
        if footprint.marked:
            self.marked_tokens += tokens
            self.num_marked += sign
