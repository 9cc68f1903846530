"""A program's way to the engines: ask the scheduler, generate where it says, report back.

`SchedulerPort` is the seam: `SchedulerService` behind it in one process (tests, benchmarks), its
Ray actor behind it in a cluster (`runtime.actor.RemoteScheduler`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from thunder_rollout.agent.loop import TurnResult
from thunder_rollout.core.events import (
    BackendDown,
    BackendStats,
    Event,
    FinishReason,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnRequested,
)
from thunder_rollout.engine.hashing import BlockHasher
from thunder_rollout.engine.protocol import Engine, GenerateRequest, Generation, Sampling
from thunder_rollout.errors import BadEvent, EngineDied, EngineFailed, RequestPoisoned
from thunder_rollout.runtime.service import Grant, SchedulerService
from thunder_rollout.sandbox.protocol import SandboxSpec


class SchedulerPort(Protocol):
    async def open(self, program: str, *, owner: str = "", sandbox: SandboxSpec | None = None) -> None: ...

    async def admit(self, event: TurnRequested) -> Grant: ...

    async def post(self, event: Event) -> None: ...

    async def close(self, program: str, *, reason: str | None = None) -> None: ...


class LocalScheduler:
    """`SchedulerPort` on a service in this process."""

    def __init__(self, service: SchedulerService) -> None:
        self._service = service

    async def open(self, program: str, *, owner: str = "", sandbox: SandboxSpec | None = None) -> None:
        self._service.open(program, owner=owner, sandbox=sandbox)

    async def admit(self, event: TurnRequested) -> Grant:
        return await self._service.admit(event)

    async def post(self, event: Event) -> None:
        self._service.handle(event)

    async def report(self, stats: BackendStats) -> bool:
        return self._service.report(stats)

    async def close(self, program: str, *, reason: str | None = None) -> None:
        self._service.close(program, reason=reason)


class ProgramClient:
    """One program from open to close, as an async context manager; the agent loop's `ModelClient`.

    `block_size` makes it send block hashes with each request (policies that look at prefixes). A
    turn whose engine dies, or that is aborted from outside, is asked again, from the same ids.

    Poison: a turn that may have brought an engine down (`EngineDied.by_turn`: it ran while the engine
    failed at its work or hung, or its own result was nonsense) runs alone when it is asked again; one
    that does so again is `RequestPoisoned`. An engine killed from outside is never held against a turn.
    """

    def __init__(
        self,
        program: str,
        scheduler: SchedulerPort,
        engines: Mapping[str, Engine],
        *,
        group: str | None = None,
        task_kind: str | None = None,
        owner: str = "",
        sandbox: SandboxSpec | None = None,
        block_size: int | None = None,
    ) -> None:
        self.program = program
        self._scheduler = scheduler
        self._engines = engines
        self._group = group
        self._task_kind = task_kind
        self._owner = owner
        self._sandbox = sandbox
        self._hasher = BlockHasher(block_size) if block_size else None
        self._turn_numbers = itertools.count()

    async def __aenter__(self) -> ProgramClient:
        await self._scheduler.open(self.program, owner=self._owner, sandbox=self._sandbox)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reason = None if error is None else type(error).__name__
        await asyncio.shield(self._scheduler.close(self.program, reason=reason))

    async def turn(self, prompt_ids: list[int], sampling: Sampling) -> TurnResult:
        """Run one turn; raises `EngineDied` only when no engine is left, `EngineFailed` when a living
        one could not finish it, `RequestPoisoned` when it brings engines down."""
        started = asyncio.get_running_loop().time()
        queue_s = 0.0
        suspect = False
        while True:
            request = f"{self.program}/{next(self._turn_numbers)}"
            grant = await self._scheduler.admit(self._request(request, prompt_ids, sampling))
            queue_s += grant.queue_s
            try:
                generation = await self._generate(
                    grant,
                    GenerateRequest(
                        request_id=request,
                        prompt_ids=prompt_ids,
                        sampling=sampling,
                        suspect=suspect,
                        program=self.program,
                        released=grant.released,
                    ),
                )
            except EngineDied as error:
                await self._report_dead(grant, error)
                if error.by_turn and suspect:
                    raise RequestPoisoned(
                        f"program {self.program}: a turn of {len(prompt_ids)} prompt tokens brought two engines down, "
                        f"the second while it ran alone: {error}"
                    ) from error
                suspect = suspect or error.by_turn
                continue
            if generation.finish_reason == FinishReason.ABORT:
                continue  # somebody cut the turn, not its program
            if generation.finish_reason == FinishReason.ERROR:
                raise EngineFailed(f"program {self.program}: {grant.backend} could not finish a turn")
            return TurnResult(
                generation=generation,
                backend=grant.backend,
                queue_s=queue_s,
                engine_s=asyncio.get_running_loop().time() - started - queue_s,
            )

    async def tool_started(self, tool: str) -> None:
        await self._scheduler.post(ToolStarted(program=self.program, tool=tool))

    async def tool_ended(self) -> None:
        await self._scheduler.post(ToolEnded(program=self.program))

    async def _generate(self, grant: Grant, request: GenerateRequest) -> Generation:
        try:
            generation = await self._engines[grant.backend].generate(request)
        except EngineDied:
            raise
        except BaseException:
            ended = TurnEnded(program=self.program, grant=grant.grant, finish_reason=FinishReason.ABORT)
            await asyncio.shield(self._scheduler.post(ended))
            raise
        await self._scheduler.post(
            TurnEnded(
                program=self.program,
                grant=grant.grant,
                output_tokens=len(generation.token_ids),
                cached_tokens=generation.cached_tokens,
                finish_reason=FinishReason(generation.finish_reason),
            )
        )
        return generation

    async def _report_dead(self, grant: Grant, error: EngineDied) -> None:
        down = BackendDown(backend=grant.backend, generation=grant.generation, reason=str(error), returning=True)
        with contextlib.suppress(BadEvent):  # another program may have reported it first
            await self._scheduler.post(down)

    def _request(self, request: str, prompt_ids: list[int], sampling: Sampling) -> TurnRequested:
        return TurnRequested(
            program=self.program,
            request=request,
            prompt_tokens=len(prompt_ids),
            block_hashes=tuple(self._hasher.hashes(prompt_ids)) if self._hasher else None,
            group=self._group,
            task_kind=self._task_kind,
            sandbox=self._sandbox is not None,
        )
