"""A program's way to the engines: ask the scheduler, generate where it says, report back.

`SchedulerPort` is the seam: `SchedulerService` behind it in one process (tests, benchmarks), its
Ray actor behind it in a cluster (`runtime.actor.RemoteScheduler`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import NoReturn, Protocol

from thunder_rollout.agent.loop import TurnResult
from thunder_rollout.agent.trajectory import WeightSegment
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
from thunder_rollout.engine.giving_up import unless
from thunder_rollout.engine.hashing import BlockHasher
from thunder_rollout.engine.protocol import Engine, GenerateRequest, Generation, Sampling
from thunder_rollout.errors import BadEvent, EngineDied, EngineFailed, RequestPoisoned
from thunder_rollout.observe.metrics import MetricsSnapshot
from thunder_rollout.runtime.service import Grant, SchedulerService
from thunder_rollout.runtime.suspicion import Suspicion
from thunder_rollout.sandbox.protocol import SandboxSpec

LAST_WORD_S = 2.0  # for a turn to hear from its engine, once the scheduler knows that it is down


class SchedulerPort(Protocol):
    async def open(self, program: str, *, owner: str = "", sandbox: SandboxSpec | None = None) -> None: ...

    async def admit(self, event: TurnRequested) -> Grant: ...

    async def post(self, event: Event) -> None: ...

    async def until_down(self, backend: str, generation: int) -> None:
        """Returns once the turns granted there have to be asked again."""

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

    async def until_down(self, backend: str, generation: int) -> None:
        await self._service.until_down(backend, generation)

    async def close(self, program: str, *, reason: str | None = None) -> None:
        self._service.close(program, reason=reason)

    async def metrics(self) -> MetricsSnapshot:
        return self._service.metrics()


@dataclass(slots=True)
class _Pieces:
    """A turn's output as far as it got: one generation, or several where it was cut and went on."""

    prompt_ids: list[int]
    sampling: Sampling
    parts: list[Generation] = field(default_factory=list)

    @property
    def context_ids(self) -> list[int]:
        return self.prompt_ids + [token_id for part in self.parts for token_id in part.token_ids]

    @property
    def rest(self) -> Sampling:
        done = sum(len(part.token_ids) for part in self.parts)
        return replace(self.sampling, max_tokens=self.sampling.max_tokens - done)

    def add(self, part: Generation) -> None:
        if part.token_ids or part.finish_reason != FinishReason.ABORT:
            self.parts.append(part)

    def whole(self) -> Generation:
        """Prompt, hits and queue of the first part, version and finish reason of the last, the rest summed."""
        first, last = self.parts[0], self.parts[-1]
        return replace(
            last,
            token_ids=[token_id for part in self.parts for token_id in part.token_ids],
            logprobs=[logprob for part in self.parts for logprob in part.logprobs],
            prompt_tokens=first.prompt_tokens,
            cached_tokens=first.cached_tokens,
            queue_s=sum(part.queue_s for part in self.parts),
            prefill_s=sum(part.prefill_s for part in self.parts),
            decode_s=sum(part.decode_s for part in self.parts),
        )

    def weights(self) -> list[WeightSegment]:
        by_version = itertools.groupby(self.parts, key=lambda part: part.weight_version)
        segments = [(version, sum(len(part.token_ids) for part in parts)) for version, parts in by_version]
        return [WeightSegment(version=version, num_tokens=num_tokens) for version, num_tokens in segments]

    @property
    def refill_tokens(self) -> int:
        return sum(part.prompt_tokens - part.cached_tokens for part in self.parts[1:])


class ProgramClient:
    """One program from open to close, as an async context manager; the agent loop's `ModelClient`.

    `block_size` makes it send block hashes with each request (policies that look at prefixes). A
    turn whose engine dies is asked again, from the same ids, also where only the scheduler knows of the
    death (a node that is gone answers nobody, and Ray takes its time to say so). So is one that is cut
    from outside (for new weights): from what it has if `keep_cut_output`, else from its prompt.

    Poison: a turn that brings engines down is found out and `RequestPoisoned` (`runtime.suspicion`).
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
        keep_cut_output: bool = True,
    ) -> None:
        self.program = program
        self._scheduler = scheduler
        self._engines = engines
        self._group = group
        self._task_kind = task_kind
        self._owner = owner
        self._sandbox = sandbox
        self._hasher = BlockHasher(block_size) if block_size else None
        self._keep_cut_output = keep_cut_output
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
        one could not finish it, `RequestPoisoned` when it brings engines down, `Stale` when its tokens
        are of weights too old to go on from."""
        started = asyncio.get_running_loop().time()
        queue_s = 0.0
        suspicion = Suspicion()
        pieces = _Pieces(prompt_ids, sampling)
        while True:
            request, context_ids = f"{self.program}/{next(self._turn_numbers)}", pieces.context_ids
            grant = await self._scheduler.admit(self._request(request, context_ids))
            queue_s += grant.queue_s
            try:
                generation = await self._generate(
                    grant,
                    GenerateRequest(
                        request_id=request,
                        prompt_ids=context_ids,
                        sampling=pieces.rest,
                        max_together=suspicion.max_together,
                        program=self.program,
                        released=grant.released,
                    ),
                )
            except EngineDied as error:
                await self._report_dead(grant, error)
                suspicion.add(error)
                if suspicion.is_proved:
                    raise RequestPoisoned(
                        f"program {self.program}: under a turn of {len(prompt_ids)} prompt tokens "
                        f"{suspicion.num_deaths} engines went down, the last while it ran alone: {error}"
                    ) from error
                continue
            if generation.finish_reason == FinishReason.ABORT:  # somebody cut the turn, not its program
                if self._keep_cut_output:
                    pieces.add(generation)
                continue
            if generation.finish_reason == FinishReason.ERROR:
                raise EngineFailed(f"program {self.program}: {grant.backend} could not finish a turn")
            pieces.add(generation)
            return TurnResult(
                generation=pieces.whole(),
                weights=pieces.weights(),
                refill_tokens=pieces.refill_tokens,
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
            generation = await unless(self._until_void(grant), self._engines[grant.backend].generate(request))
        except EngineDied:
            raise
        except BaseException:
            ended = TurnEnded(program=self.program, grant=grant.grant, finish_reason=FinishReason.ABORT)
            await asyncio.shield(self._scheduler.post(ended))
            raise
        is_dropped = generation.finish_reason == FinishReason.ABORT and not self._keep_cut_output
        await self._scheduler.post(
            TurnEnded(
                program=self.program,
                grant=grant.grant,
                output_tokens=0 if is_dropped else len(generation.token_ids),
                cached_tokens=generation.cached_tokens,
                finish_reason=FinishReason(generation.finish_reason),
                weight_version=generation.weight_version,
            )
        )
        return generation

    async def _until_void(self, grant: Grant) -> NoReturn:
        """A dead engine's own word comes first where it has one: it says whether the turn may be the cause."""
        await self._scheduler.until_down(grant.backend, grant.generation)
        await asyncio.sleep(LAST_WORD_S)
        raise EngineDied(f"{grant.backend} is down and says nothing")

    async def _report_dead(self, grant: Grant, error: EngineDied) -> None:
        down = BackendDown(backend=grant.backend, generation=grant.generation, reason=str(error), returning=True)
        with contextlib.suppress(BadEvent):  # another program may have reported it first
            await self._scheduler.post(down)

    def _request(self, request: str, prompt_ids: list[int]) -> TurnRequested:
        return TurnRequested(
            program=self.program,
            request=request,
            prompt_tokens=len(prompt_ids),
            block_hashes=tuple(self._hasher.hashes(prompt_ids)) if self._hasher else None,
            group=self._group,
            task_kind=self._task_kind,
            sandbox=self._sandbox is not None,
        )
