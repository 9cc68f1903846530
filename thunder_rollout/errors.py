"""Every error this project raises on purpose.

Contract: each carries what was wrong and how to mend it, survives pickling (Ray sends
errors between processes) and belongs to one of two families. A `UserError` is something the
user mends (exit code 2, no traceback). An `InfrastructureFailure` is the machinery's: it is
retried, then reported under its `kind`, and never becomes a reward of 0.
"""

from __future__ import annotations


class ThunderError(Exception):
    """Base of all errors raised on purpose; `str(error)` is meant for people."""


class UserError(ThunderError):
    """Something the user can mend; the message names the field and the remedy."""


class ConfigError(UserError):
    """A configuration value is missing, misspelt or impossible."""


class TaskError(UserError):
    """A task row or task file can't be used."""


class RequestError(UserError):
    """One request can't be served by this engine; the engine is unharmed."""


class WeightsRefused(UserError):
    """New weights are not this model's, or not there; the engine goes on with the old ones."""


class BadEvent(ThunderError):
    """The scheduler refuses an event; its state is unchanged."""


class InvalidTransition(ThunderError):
    """A program was asked to change in a way its status forbids; carries its history."""


class Rejected(ThunderError):
    """The scheduler can never admit this request (it fits no backend)."""


class UndiffableChanges(ThunderError):
    """What the agent left behind can't be taken as a patch: its own failure, a reward of 0."""


class InfrastructureFailure(ThunderError):
    """The machinery failed, not the agent. `kind` is the key under `failures` in summary.json."""

    kind = "infrastructure"


class EngineDied(InfrastructureFailure):
    """`by_turn`: the turn that hears it may be the cause, for it ran while the engine failed at its
    work; not where the engine was killed from outside, or nobody knows. `num_together`: so many turns ran
    then, this one among them; 0: it did not run; None: nobody knows."""

    kind = "engine_died"

    def __init__(self, message: str, *, by_turn: bool = False, num_together: int | None = None) -> None:
        super().__init__(message)
        self.by_turn = by_turn
        self.num_together = num_together


class RequestPoisoned(InfrastructureFailure):
    """A turn that brought engines down, the last one while it ran alone; it is not tried again."""

    kind = "request_poisoned"


class EngineFailed(InfrastructureFailure):
    """A living engine could not finish one turn."""

    kind = "engine_failed"


class Stale(InfrastructureFailure):
    """A program holds tokens of weights older than `scheduler.max_staleness` allows: it starts again."""

    kind = "stale"


class LeaseExpired(InfrastructureFailure):
    """The scheduler heard nothing of a program for `scheduler.lease_s` and gave its place and sandbox away."""

    kind = "lease_expired"


class SandboxFailed(InfrastructureFailure):
    """A sandbox could not start, or died under its program."""

    kind = "sandbox_failed"


class GradingFailed(InfrastructureFailure):
    """The grader could not reach a verdict (it died or ran out of time)."""

    kind = "grading_failed"
