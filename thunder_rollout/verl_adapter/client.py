"""verl's server client as the agent loop's model: one program's turns, wherever the router sends them.

Ids and log-probabilities are handed on as the server gave them. A replica that is gone or fails is a typed
`InfrastructureFailure`; what the router says of its own is raised as it is. A turn that comes back aborted (no
client that resumes partial rollouts returns one) is a failure too: half a turn is no record to train on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from thunder_rollout.agent.loop import TurnResult, in_one_piece
from thunder_rollout.core.events import FinishReason
from thunder_rollout.engine.protocol import Generation, Sampling
from thunder_rollout.errors import EngineDied, EngineFailed, Stale, ThunderError

_ABORTED = ("aborted", "abort")


@dataclass(slots=True)
class Route:
    """Where a turn ran (last), and how long its requests were held before. `on_granted` hears of each grant."""

    on_granted: Callable[[], None]
    server: str = ""
    held_s: float = 0.0


class RoutedClient:
    """verl's `LLMServerClient` (or a subclass), which also tells of each turn's route; and tells a router that
    listens (ours) what verl tells none: when a tool starts, and that a program is over. One a process."""

    def __init__(self, client: Any) -> None:
        self._client = copy.copy(client)
        self._client._acquire_server = self._acquire
        self._acquire_of_class = type(client)._acquire_server
        self._routes: dict[str, Route] = {}
        router = client._load_balancer
        self._router = router if hasattr(router, "program_ended") else None

    def tool_started(self, program: str, tool: str) -> None:
        """Nobody waits for this or the next."""
        if self._router is not None:
            self._router.tool_started.remote(program, tool)

    def program_ended(self, program: str) -> None:
        if self._router is not None:
            self._router.program_ended.remote(program)

    async def generate(
        self,
        program: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        on_granted: Callable[[], None] = lambda: None,
    ) -> tuple[Any, Route]:
        """One turn; of a program there is one at a time."""
        route = self._routes[program] = Route(on_granted)
        try:
            output = await self._client.generate(
                request_id=program, prompt_ids=prompt_ids, sampling_params=sampling_params
            )
            return output, route
        finally:
            del self._routes[program]

    async def _acquire(self, request_id: str, **declared: Any) -> tuple[str, Any]:
        before, route = time.monotonic(), self._routes[request_id]
        route.server, handle = await self._acquire_of_class(self._client, request_id, **declared)
        route.held_s += time.monotonic() - before
        route.on_granted()
        return route.server, handle


@dataclass(slots=True)
class VersionSpan:
    """Of the weights that a program's tokens are of, verl's `global_steps`; None: no turn told."""

    first: int | None = None
    last: int | None = None

    def add(self, extra_fields: dict[str, Any]) -> None:
        first, last = extra_fields.get("min_global_steps"), extra_fields.get("max_global_steps")
        self.first = first if self.first is None else self.first
        self.last = last if last is not None else self.last


@dataclass(slots=True, kw_only=True)
class VerlModel:
    """One program; the agent loop's `ModelClient`.

    `sampling_params` are verl's, of which a turn's limit and stop tokens are set here. `stale_from`: the
    version of the weights from which on verl drops the row whatever becomes of it.
    """

    client: RoutedClient
    program: str
    sampling_params: dict[str, Any]
    stale_from: int | None = None
    on_granted: Callable[[], None] = lambda: None
    versions: VersionSpan = field(default_factory=VersionSpan)
    num_preempted: int = -1  # verl's word for unknown
    has_logprobs: bool = True

    async def turn(self, prompt_ids: list[int], sampling: Sampling) -> TurnResult:
        """Raises `EngineDied`, `EngineFailed`, `Stale`, and what the router raises of ours."""
        started = time.monotonic()
        output, route = await self._generate(prompt_ids, sampling)
        engine_s = max(0.0, time.monotonic() - started - route.held_s)
        self._note(output)
        generation = Generation(
            token_ids=list(output.token_ids),
            logprobs=list(output.log_probs or [0.0] * len(output.token_ids)),
            finish_reason=FinishReason.LENGTH if len(output.token_ids) >= sampling.max_tokens else FinishReason.STOP,
            prompt_tokens=len(prompt_ids),
            cached_tokens=output.extra_fields.get("num_cached_tokens") or 0,
            queue_s=0.0,
            prefill_s=0.0,
            decode_s=engine_s,  # verl's servers don't tell it apart
            weight_version=str(self.versions.last),
        )
        return in_one_piece(generation, backend=route.server, queue_s=route.held_s, engine_s=engine_s)

    async def tool_started(self, tool: str) -> None:
        self.client.tool_started(self.program, tool)

    async def tool_ended(self) -> None:
        """Nobody is told: the next turn is asked for at once, or the program ends."""

    async def _generate(self, prompt_ids: list[int], sampling: Sampling) -> tuple[Any, Route]:
        params = self.sampling_params | {
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
        }
        try:
            output, route = await self.client.generate(self.program, prompt_ids, params, self.on_granted)
        except RayActorError as error:
            raise EngineDied(f"program {self.program}: a rollout replica or the router is gone: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, ThunderError):
                raise error.cause from None
            raise EngineFailed(f"program {self.program}: a turn of {len(prompt_ids)} prompt tokens: {error}") from error
        if output.stop_reason in _ABORTED:
            raise EngineFailed(f"program {self.program}: a turn was aborted, and the client does not resume it")
        return output, route

    def _note(self, output: Any) -> None:
        self.versions.add(output.extra_fields)
        self.has_logprobs = self.has_logprobs and (bool(output.log_probs) or not output.token_ids)
        if output.num_preempted is not None:
            self.num_preempted = max(0, self.num_preempted) + output.num_preempted
        newest = self.versions.last
        if self.stale_from is not None and newest is not None and newest >= self.stale_from:
            raise Stale(
                f"program {self.program}: weights are at version {newest}, and verl drops it from {self.stale_from} on"
            )
