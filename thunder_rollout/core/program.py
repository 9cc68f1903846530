"""The program: one agent's whole trajectory, the unit of scheduling.

P = <ID, c, T, L, tau, s>: `program_id`, `context_tokens`, `sandbox` and `tool`, `backend`,
`phase`, `status`. Every change goes through a method; one that the status forbids raises
`InvalidTransition` with the program's recent history.

Invariants: ACTIVE has a backend, every other status has none; a turn in flight or a mark implies
ACTIVE; REASONING while a request is pending or a turn in flight; ACTING from the end of its last
turn, unless that turn was cut (ABORT, ERROR), which starts no tool.

Context tokens: the longest of its open turns and requests, for those of one program are as a
rule forks that share their prefix; with none open, what its last turn left behind.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from thunder_rollout.core.events import FinishReason, TurnRequested
from thunder_rollout.errors import InvalidTransition

HISTORY_LENGTH = 16


class Phase(StrEnum):
    REASONING = "reasoning"
    ACTING = "acting"


class Status(StrEnum):
    ACTIVE = "active"
    PAUSED = "paused"  # in the queue; a new program starts here
    TERMINATED = "terminated"


class SandboxNeed(StrEnum):
    NONE = "none"
    WANTED = "wanted"
    PREPARED = "prepared"  # PrepareSandbox was issued, and its program waits for its grant
    TAKEN = "taken"  # a turn was granted since
    FAILED = "failed"  # wanted again by the next request that acts in one


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A request that waits, since `since_s`; `seq` orders all requests by arrival."""

    event: TurnRequested
    since_s: float
    seq: int


@dataclass(slots=True, kw_only=True)
class Turn:
    """An admitted request; `backend` is where it runs, wherever its program is bound by now."""

    request: str
    backend: str
    prompt_tokens: int
    output_tokens: int = 0
    started: bool = False

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


class Program:
    """See the module. Attributes are read by policies and written by these methods alone."""

    __slots__ = (
        "_history",
        "_settled_tokens",
        "acting_since_s",
        "announced",
        "arrived_s",
        "backend",
        "context_tokens",
        "group",
        "marked",
        "num_turns_admitted",
        "oldest_weights",
        "pending",
        "program_id",
        "sandbox",
        "sandbox_grant",
        "sandbox_issued",
        "sandbox_issued_s",
        "sandbox_lead_s",
        "sandbox_was_stopped",
        "status",
        "task_kind",
        "tool",
        "turns",
    )

    def __init__(self, program_id: str) -> None:
        self.program_id = program_id
        self.announced = False  # before its first request
        self.arrived_s = 0.0  # when that came
        self.group: str | None = None
        self.task_kind: str | None = None
        self.context_tokens = 0
        self.status = Status.PAUSED
        self.backend: str | None = None
        self.marked = False  # to be paused when its last turn in flight ends
        self.acting_since_s: float | None = None
        self.pending: dict[str, Pending] = {}  # by request, oldest first
        self.turns: dict[int, Turn] = {}  # by grant
        self.num_turns_admitted = 0
        self.oldest_weights: int | None = None  # number of the oldest weights that produced a token of its
        self.sandbox = SandboxNeed.NONE
        self.sandbox_issued = False  # PrepareSandbox was issued at least once
        self.sandbox_issued_s: float | None = None  # when last, until it is ready
        self.sandbox_lead_s: float | None = None  # from then until it was
        self.sandbox_grant: int | None = None  # see `Preparation.note_grant`, until both are known
        self.sandbox_was_stopped = False  # the one to prepare is there, and is to be had back
        self.tool: str | None = None
        self._settled_tokens = 0
        self._history: deque[str] = deque(maxlen=HISTORY_LENGTH)

    @property
    def phase(self) -> Phase:
        if self.has_open or self.acting_since_s is None:
            return Phase.REASONING
        return Phase.ACTING

    @property
    def num_in_flight(self) -> int:
        return len(self.turns)

    @property
    def waiting_since_s(self) -> float | None:
        """When its oldest pending request arrived."""
        return next((pending.since_s for pending in self.pending.values()), None)

    @property
    def ran(self) -> bool:
        """A turn of it was admitted at least once."""
        return self.num_turns_admitted > 0

    @property
    def has_open(self) -> bool:
        """A request is pending or a turn in flight."""
        return bool(self.pending or self.turns)

    @property
    def awaits_sandbox(self) -> bool:
        """Its next grant finds it without a sandbox, unless one is prepared before."""
        return bool(self.pending) and self.sandbox in (SandboxNeed.WANTED, SandboxNeed.PREPARED)

    def is_open(self, request: str) -> bool:
        return request in self.pending or self.grant_of(request) is not None

    def grant_of(self, request: str) -> int | None:
        return next((grant for grant, turn in self.turns.items() if turn.request == request), None)

    def request(self, pending: Pending) -> None:
        event = pending.event
        self._require(self.status is not Status.TERMINATED and not self.is_open(event.request), "request")
        self.pending[event.request] = pending
        if event.sandbox and self.sandbox in (SandboxNeed.NONE, SandboxNeed.FAILED):
            self.sandbox = SandboxNeed.WANTED
        self._changed(f"request {event.request}")

    def announce(self, task_kind: str | None) -> None:
        """It will ask, and act in a sandbox."""
        self._require(not self.has_open and not self.ran, "announce")
        self.announced = True
        self.task_kind = task_kind
        self.sandbox = SandboxNeed.WANTED
        self._changed("announce")

    def arrive(self, event: TurnRequested, now: float) -> None:
        """With its first request, which `request` adds."""
        self._require(not self.has_open and not self.ran, "arrive")
        self.arrived_s = now - event.age_s
        self.group = event.group
        self.task_kind = event.task_kind or self.task_kind

    def drop_request(self, request: str) -> None:
        self._require(request in self.pending, "drop_request")
        del self.pending[request]
        self._changed(f"drop {request}")

    def restore(self, backend: str) -> None:
        self._require(self.status is Status.PAUSED, "restore")
        self.status = Status.ACTIVE
        self.backend = backend
        self._changed(f"restore {backend}")

    def move(self, backend: str) -> None:
        """Bind an active program elsewhere (routers place each request anew)."""
        self._require(self.status is Status.ACTIVE, "move")
        self.backend = backend
        self._changed(f"move {backend}")

    def pause(self) -> None:
        self._require(self.status is Status.ACTIVE and not self.turns, "pause")
        self.status = Status.PAUSED
        self.backend = None
        self.marked = False
        self._changed("pause")

    def mark(self) -> None:
        self._require(bool(self.turns) and not self.marked, "mark")
        self.marked = True
        self._changed("mark")

    def terminate(self) -> None:
        self._require(self.status is not Status.TERMINATED, "terminate")
        self.status = Status.TERMINATED
        self.backend = None
        self.marked = False
        self.pending.clear()
        self.turns.clear()
        self._changed("terminate")

    def admit(self, request: str, grant: int) -> None:
        """The pending `request` becomes the turn `grant` on the program's backend."""
        self._require(self.status is Status.ACTIVE and request in self.pending, "admit")
        assert self.backend is not None
        prompt_tokens = self.pending.pop(request).event.prompt_tokens
        self.turns[grant] = Turn(request=request, backend=self.backend, prompt_tokens=prompt_tokens)
        self.num_turns_admitted += 1
        self.acting_since_s = None
        if self.sandbox is SandboxNeed.PREPARED:
            self.sandbox = SandboxNeed.TAKEN
        self._changed(f"admit {request} as {grant}")

    def start_turn(self, grant: int) -> None:
        self._require(grant in self.turns, "start_turn")
        self.turns[grant].started = True

    def progress(self, grant: int, output_tokens: int) -> None:
        """A count below one already seen is a late message and changes nothing."""
        self._require(grant in self.turns, "progress")
        turn = self.turns[grant]
        turn.output_tokens = max(turn.output_tokens, output_tokens)
        turn.started = True
        self._refresh_context()

    def end_turn(self, grant: int, output_tokens: int | None, finish_reason: FinishReason, now: float) -> None:
        self._require(grant in self.turns, "end_turn")
        turn = self._remove_turn(grant, output_tokens)
        if not self.turns and finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.acting_since_s = now
        self._changed(f"end {turn.request} {finish_reason} at {now:g}")

    def note_weights(self, number: int) -> None:
        """Weights of this number produced tokens of its."""
        self.oldest_weights = number if self.oldest_weights is None else min(self.oldest_weights, number)

    def void_turn(self, grant: int) -> None:
        """The turn is lost with its backend, or its caller left; no tool follows from it."""
        self._require(grant in self.turns, "void_turn")
        turn = self._remove_turn(grant, None)
        self._changed(f"void {turn.request}")

    def start_tool(self, tool: str | None) -> None:
        self.tool = tool

    def end_tool(self) -> None:
        self.tool = None

    def sandbox_prepared(self, now: float) -> None:
        self._require(self.sandbox is SandboxNeed.WANTED, "sandbox_prepared")
        self.sandbox = SandboxNeed.TAKEN if self.turns else SandboxNeed.PREPARED
        self.sandbox_issued = True
        self.sandbox_issued_s = now
        self.sandbox_lead_s = self.sandbox_grant = None

    def sandbox_ready(self, now: float) -> None:
        """Told again, it changes nothing."""
        if self.sandbox_issued_s is not None:
            self.sandbox_lead_s = now - self.sandbox_issued_s
            self.sandbox_issued_s = None

    def sandbox_failed(self) -> None:
        if self.sandbox in (SandboxNeed.PREPARED, SandboxNeed.TAKEN):
            self.sandbox = SandboxNeed.FAILED
            self.sandbox_issued_s = None
            self.sandbox_was_stopped = False

    def sandbox_stopped(self) -> None:
        if self.sandbox is SandboxNeed.TAKEN:
            self.sandbox = SandboxNeed.WANTED
            self.sandbox_issued_s = None
            self.sandbox_was_stopped = True

    def history(self) -> tuple[str, ...]:
        return tuple(self._history)

    def _remove_turn(self, grant: int, output_tokens: int | None) -> Turn:
        turn = self.turns.pop(grant)
        if output_tokens is not None:
            turn.output_tokens = output_tokens
        self._settled_tokens = turn.context_tokens
        return turn

    def _changed(self, what: str) -> None:
        self._history.append(what)
        self._refresh_context()

    def _refresh_context(self) -> None:
        lengths = [turn.context_tokens for turn in self.turns.values()]
        lengths += [pending.event.prompt_tokens for pending in self.pending.values()]
        self.context_tokens = max(lengths, default=self._settled_tokens)

    def _require(self, ok: bool, transition: str) -> None:
        if not ok:
            raise InvalidTransition(
                f"program={self.program_id}: {transition} is not allowed in status {self.status}, "
                f"phase {self.phase}, turns in flight {self.num_in_flight}, marked {self.marked}; "
                f"history: {'; '.join(self._history) or 'none'}"
            )
