"""What the scheduler tells the shells to do; every result comes back as an event."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ExpiryReason(StrEnum):
    LEASE = "lease"  # nothing was heard of it for `lease_s`
    STALE = "stale"  # it holds tokens of weights older than `max_staleness` allows


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """Bind `program` to `backend`.

    With `request` and `grant` it also admits that turn: the caller may generate now. Without
    them the program (still acting) only gets its place; its next turn is admitted on request.
    """

    program: str
    backend: str
    generation: int
    request: str | None = None
    grant: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Unbind `program` from `backend`; its KV there counts as given up."""

    program: str
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSandbox:
    """Start the program's sandbox, or have it back where it was stopped: its grant is expected about at
    `by_s` (the clock of `handle`'s `now`), which is the order of starts that can't all run at once."""

    program: str
    by_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSandbox:
    program: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """The program is terminated and whoever still runs it must stop. `requests` are those of it that waited
    for an answer: this is it."""

    program: str
    reason: ExpiryReason = ExpiryReason.LEASE
    requests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """`request` can never be admitted; `why` says what is wrong and how to mend it."""

    program: str
    request: str
    why: str


Decision = Restore | Pause | PrepareSandbox | ReleaseSandbox | Expire | Reject
