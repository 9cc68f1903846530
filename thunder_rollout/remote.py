"""How one awaits a method of a Ray actor, everywhere in this project.

Our own errors come out as themselves, a dead actor as the caller's typed failure, and cancelling
the wait cancels the work in the actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError

from thunder_rollout.errors import InfrastructureFailure, ThunderError


async def remote_call(ref: Awaitable[Any], *, died: type[InfrastructureFailure], what: str) -> Any:
    """Await `ref` (an ObjectRef); raises `died` naming `what` when the actor is gone."""
    try:
        return await ref
    except asyncio.CancelledError:
        ray.cancel(ref)
        raise
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ThunderError | OSError):
            raise cause from None
        raise
    except (RayActorError, TaskCancelledError) as error:
        raise died(f"{what} is gone: {error}") from error
