"""What makes an event bad: checks of its fields, and look-ups of the names in it; they raise `BadEvent`.
And what makes a good request hopeless (`rejection_of`)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from thunder_rollout.core.backend import Backend
from thunder_rollout.core.decisions import Reject
from thunder_rollout.core.events import (
    BackendDown,
    BackendStats,
    BackendUp,
    ProgramAnnounced,
    ProgramEnded,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnProgress,
    TurnRequested,
    TurnStarted,
    WeightsUpdated,
    WeightsUpdating,
)
from thunder_rollout.core.program import Program
from thunder_rollout.core.state import State
from thunder_rollout.errors import BadEvent


def check_announced(state: State, event: ProgramAnnounced) -> None:
    if event.program in state.programs or event.program in state.announced:
        raise BadEvent(
            f"ProgramAnnounced.program={event.program!r}: known already; announce each once, before its first request"
        )


def check_request(event: TurnRequested) -> None:
    _require_least(event, "prompt_tokens", 1)
    if not 0.0 <= event.age_s < math.inf:
        raise BadEvent(f"TurnRequested.age_s={event.age_s!r}: must be >= 0")


def check_progress(event: TurnProgress) -> None:
    _require_least(event, "output_tokens", 0)


def check_end(event: TurnEnded) -> None:
    for name in ("output_tokens", "cached_tokens"):
        value = getattr(event, name)
        if value is not None and value < 0:
            raise BadEvent(f"TurnEnded.{name}={value!r}: must be >= 0 or None")


def check_backend_up(event: BackendUp, generations: Mapping[str, int]) -> None:
    known = generations.get(event.backend)
    if known is not None and event.generation <= known:
        raise BadEvent(
            f"BackendUp.generation={event.generation!r}: backend={event.backend} was up in generation {known}; "
            "a restarted backend must count one up"
        )
    _require_least(event, "capacity_tokens", 1)
    _require_least(event, "max_running", 1)
    _require_least(event, "offload_tokens", 0)
    if event.block_size is not None:
        _require_least(event, "block_size", 1)


def check_weights(event: WeightsUpdating | WeightsUpdated, generations: Mapping[str, int]) -> None:
    for name in event.backends:
        if name not in generations:
            raise BadEvent(f"{type(event).__name__}.backends: backend={name} never was up")


def known_program(state: State, event: ToolStarted | ToolEnded | ProgramEnded) -> Program:
    program = state.programs.get(event.program)
    if program is None:
        raise BadEvent(
            f"{type(event).__name__}.program={event.program!r}: unknown; it ended or never had a request admitted "
            "or waiting (Withdrawn is the event that may be late)"
        )
    return program


def holder(state: State, event: TurnStarted | TurnProgress | TurnEnded) -> Program | None:
    """The program whose turn this is; None for a grant that was taken back."""
    if state.void_grants.get(event.grant) == event.program:
        return None
    program = state.programs.get(event.program)
    if program is None or event.grant not in program.turns:
        raise BadEvent(
            f"{type(event).__name__}.grant={event.grant!r}: not current for program={event.program!r}; "
            "use the grant of the Restore that admitted the turn, and end it once"
        )
    return program


def known_backend(state: State, event: BackendDown | BackendStats) -> Backend | None:
    """The backend if this is its present generation; None for news of an older one."""
    known = state.generations.get(event.backend)
    if known is None or event.generation > known:
        raise BadEvent(
            f"{type(event).__name__}: backend={event.backend!r} generation={event.generation} never was up; "
            "announce it with BackendUp first"
        )
    return state.backends.get(event.backend) if event.generation == known else None


def rejection_of(state: State, request: TurnRequested) -> Reject | None:
    """The answer to a request that no backend can ever hold; None while it may fit, or no backend is up."""
    if not state.backends or request.prompt_tokens + 1 <= state.max_capacity_tokens:
        return None
    why = (
        f"prompt_tokens={request.prompt_tokens} and one token more fit no backend: the largest has "
        f"capacity_tokens={state.max_capacity_tokens}; shorten the context or give the engine more KV memory"
    )
    return Reject(program=request.program, request=request.request, why=why)


def _require_least(event: object, name: str, least: int) -> None:
    value = getattr(event, name)
    if value < least:
        raise BadEvent(f"{type(event).__name__}.{name}={value!r}: must be >= {least}")
