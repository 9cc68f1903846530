"""The asyncio shell around `core.Scheduler`: events in, decisions carried out, one clock.

Contract: `admit` returns when the program is restored and leaves no trace if it is cancelled. A
bad event is refused to its sender (`BadEvent`); any other exception out of the core is a broken
invariant, which ends the service loudly: every waiter and every later call raises it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import (
    Decision,
    Expire,
    ExpiryReason,
    Pause,
    PrepareSandbox,
    Reject,
    ReleaseSandbox,
    Restore,
)
from thunder_rollout.core.events import (
    BackendDown,
    BackendStats,
    BackendUp,
    Event,
    FinishReason,
    ProgramAnnounced,
    ProgramEnded,
    SandboxFailed,
    SandboxReady,
    SandboxStopped,
    Tick,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnRequested,
    Withdrawn,
)
from thunder_rollout.core.scheduler import Scheduler
from thunder_rollout.errors import (
    BadEvent,
    EngineDied,
    InfrastructureFailure,
    LeaseExpired,
    Rejected,
    Stale,
    ThunderError,
)
from thunder_rollout.observe.metrics import MetricsSnapshot, RunMetrics
from thunder_rollout.observe.trace import TraceWriter
from thunder_rollout.runtime.places import Places
from thunder_rollout.sandbox.protocol import SandboxSpec

logger = logging.getLogger(__name__)

REST_AFTER_S = 2.0  # a wait shorter than that is not worth a word to the sandbox's host


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Leave to run one turn on `backend`; the programs in `released` gave up their KV there since the last."""

    grant: int
    backend: str
    generation: int
    queue_s: float
    released: tuple[str, ...] = ()


class _Waiter(NamedTuple):
    program: str
    future: asyncio.Future[Grant]
    since_s: float


class SandboxPort(Protocol):
    """Where `PrepareSandbox` and `ReleaseSandbox` go."""

    async def prepare(self, program: str, spec: SandboxSpec, *, within_s: float) -> float:
        """Have the sandbox ready, if possible `within_s` from now; returns the seconds its start took. Raises
        `SandboxFailed`."""

    async def release(self, program: str) -> None: ...

    async def rest(self, program: str) -> bool:
        """The program waits: its sandbox, if it has one, may take up less. Whether it was put away, so that
        it has to be prepared again."""

    async def wake(self, program: str) -> None:
        """It was granted a turn, and will act next."""


class SchedulerService:
    """Owns the scheduler. All methods run on one event loop."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        sandboxes: SandboxPort | None = None,
        trace: TraceWriter | None = None,
        clock: Callable[[], float] = time.monotonic,
        rest_after_s: float = REST_AFTER_S,
    ) -> None:
        self._config = config
        self._scheduler = Scheduler(config)
        self._sandboxes = sandboxes
        self._trace = trace
        self._clock = clock
        self._started_at = clock()
        self._metrics = RunMetrics()
        self._waiting: dict[str, _Waiter] = {}  # by request
        self._silent: set[str] = set()  # programs whose lease ran out, and that nobody closed since
        self._specs: dict[str, SandboxSpec] = {}
        self._owners: dict[str, str] = {}
        self._rest_after_s = rest_after_s
        self._resting: dict[str, asyncio.Task[None]] = {}
        self._preparing: dict[str, asyncio.Task[None]] = {}  # the last of each program, if not released since
        self._places = Places()
        self._live_backends: dict[str, int] = {}  # generation
        self._returning: set[str] = set()  # down, and a restart may come
        self._lost: dict[str, int] = {}  # the newest generation that went down and is to return
        self._a_loss = asyncio.Event()
        self._no_engine: str | None = None  # why the last backend is gone
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._broken: ThunderError | None = None

    async def start(self) -> None:
        self._ticker = asyncio.create_task(self._tick_forever(), name="scheduler tick")
        self._ticker.add_done_callback(self._reap)

    async def stop(self) -> None:
        """Idempotent. Waiters are cancelled; sandboxes under way are left to their host."""
        tasks = [*self._tasks, *([self._ticker] if self._ticker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._resting.clear()
        for waiter in self._waiting.values():
            waiter.future.cancel()
        if self._trace is not None:
            self._trace.close()
            self._trace = None

    def announce(self, program: str, *, task_kind: str | None, sandbox: SandboxSpec) -> None:
        """The program will be opened later: its sandbox may be prepared until then. `close` takes it back."""
        self._specs[program] = sandbox
        self.handle(ProgramAnnounced(program=program, task_kind=task_kind))

    def open(self, program: str, *, owner: str = "", sandbox: SandboxSpec | None = None) -> None:
        """Announce a program before its first turn: who runs it and what sandbox it acts in."""
        if program in self._owners:
            raise BadEvent(f"program={program} is open already; program ids are used once")
        self._owners[program] = owner
        if sandbox is not None:
            self._specs[program] = sandbox

    async def admit(self, event: TurnRequested) -> Grant:
        """Wait until the program may run this turn.

        Raises `Rejected` if it never can, `BadEvent` for a bad request, `Stale` if its tokens are of
        weights older than `max_staleness` allows, `EngineDied` when no backend is left and none is
        returning.
        """
        if event.request in self._waiting:
            raise BadEvent(f"request={event.request} is waiting already; request ids are used once")
        if self._no_engine is not None:
            raise EngineDied(self._no_engine)
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._waiting[event.request] = _Waiter(event.program, future, self._now())
        patience = asyncio.get_running_loop().call_later(self._rest_after_s, self._rest_sandbox, event.program)
        try:
            self.handle(event)
            return await future
        except (asyncio.CancelledError, EngineDied):
            self._undo_admission(event, future)
            raise
        finally:
            patience.cancel()
            self._wake_sandbox(event.program)
            del self._waiting[event.request]

    def handle(self, event: Event) -> None:
        """Feed one event to the scheduler and carry out what it decides. Raises `LeaseExpired` for a program that
        was given up meanwhile and goes on; a turn of it may still end."""
        if self._broken is not None:
            raise self._broken
        if isinstance(event, TurnRequested | ToolStarted | ToolEnded) and event.program in self._silent:
            raise LeaseExpired(
                f"program={event.program} was silent for scheduler.lease_s={self._config.lease_s:g}; "
                "raise it above the longest turn and tool call"
            )
        now = self._now()
        try:
            decisions = self._scheduler.handle(event, now)
            self._follow(event, decisions, now)
        except BadEvent:
            raise
        except Exception as error:
            self._break(error)
            raise

    def report(self, stats: BackendStats) -> bool:
        """Feed an engine's report; whether its generation still counts as up here."""
        self.handle(stats)
        return self._live_backends.get(stats.backend) == stats.generation

    def close(self, program: str, *, reason: str | None = None) -> None:
        """End a program and release all it holds; a program that never asked is only forgotten."""
        self._silent.discard(program)
        try:
            self.handle(ProgramEnded(program=program, reason=reason))
        except BadEvent:
            self._owners.pop(program, None)
            self._specs.pop(program, None)

    async def until_down(self, backend: str, generation: int) -> None:
        """Returns once the turns granted there have to be asked again: that generation of the backend, or
        a later one, was lost. One that leaves is not lost; its turns may finish."""
        while self._lost.get(backend, -1) < generation:
            await self._a_loss.wait()

    def owner_died(self, owner: str) -> None:
        """End every program that `owner` (a worker) ran; nobody else can take back what they wait for."""
        reason = f"owner {owner} died"
        programs = {program for program, its_owner in self._owners.items() if its_owner == owner}
        for program in programs:
            self.close(program, reason=reason)
        for request, waiter in self._waiting.items():
            if waiter.program in programs:
                self._fail_waiter(request, Rejected(f"program={waiter.program}: {reason}"))

    def metrics(self) -> MetricsSnapshot:
        """Raises the error that broke the service, so that whoever watches it hears."""
        if self._broken is not None:
            raise self._broken
        return self._metrics.snapshot(self._scheduler.snapshot(), self._now())

    def _follow(self, event: Event, decisions: list[Decision], now: float) -> None:
        self._note_backends(event)
        self._metrics.observe(event, decisions, now)
        if self._trace is not None:
            self._trace.write(now, event, decisions)
        self._places.note(event, decisions)
        for decision in decisions:
            self._carry_out(decision, now)
        if isinstance(event, ProgramEnded):
            self._owners.pop(event.program, None)
            self._specs.pop(event.program, None)

    def _undo_admission(self, event: TurnRequested, future: asyncio.Future[Grant]) -> None:
        granted = future.done() and not future.cancelled() and future.exception() is None
        if self._broken is not None:
            return
        if granted:
            grant = future.result().grant
            self.handle(TurnEnded(program=event.program, grant=grant, finish_reason=FinishReason.ABORT))
        else:
            self.handle(Withdrawn(program=event.program, request=event.request))

    def _carry_out(self, decision: Decision, now: float) -> None:
        match decision:
            case Restore(request=str(request), grant=int(grant), backend=backend, generation=generation):
                _, future, since = self._waiting[request]
                if not future.done():
                    released = self._places.take_released(backend)
                    future.set_result(
                        Grant(
                            grant=grant, backend=backend, generation=generation, queue_s=now - since, released=released
                        )
                    )
            case Reject(request=request, why=why):
                self._fail_waiter(request, Rejected(why))
            case PrepareSandbox(program=program, by_s=by_s):
                self._preparing[program] = self.spawn(self._prepare(program, within_s=by_s - now))
            case ReleaseSandbox(program=program):
                self._preparing.pop(program, None)
                self.spawn(self._release(program))
            case Expire(program=program, reason=reason, requests=requests):
                logger.warning("program=%s expired: %s", program, reason)
                if reason is ExpiryReason.LEASE and program in self._owners:
                    self._silent.add(program)
                for request in requests:
                    self._fail_waiter(request, Stale(f"program={program} has tokens of weights too old to go on from"))
            case Restore() | Pause():
                pass

    async def _prepare(self, program: str, *, within_s: float) -> None:
        spec = self._specs.get(program)
        if self._sandboxes is None or spec is None:
            return
        try:
            took_s = await self._sandboxes.prepare(program, spec, within_s=within_s)
        except InfrastructureFailure as error:
            event: Event = SandboxFailed(program=program, reason=str(error))
        else:
            event = SandboxReady(program=program, took_s=took_s)
        if program not in self._preparing:  # released; the start may have overtaken that on its way to the host
            await self._release(program)
        elif self._preparing[program] is asyncio.current_task():
            del self._preparing[program]
            if isinstance(event, SandboxFailed):
                logger.warning("program=%s sandbox failed: %s", program, event.reason)
            self.handle(event)

    async def _release(self, program: str) -> None:
        if self._sandboxes is None:
            return
        try:
            await self._sandboxes.release(program)
        except InfrastructureFailure as error:
            logger.warning("program=%s sandbox not released: %s", program, error)

    def _rest_sandbox(self, program: str) -> None:
        """A program that waits for the model has ended its tool, so nothing of it runs."""
        if self._sandboxes is not None and program in self._specs and program not in self._resting:
            self._resting[program] = self.spawn(self._rest(self._sandboxes, program))

    def _wake_sandbox(self, program: str) -> None:
        resting = self._resting.pop(program, None)
        if resting is not None and self._sandboxes is not None:
            self.spawn(self._wake(self._sandboxes, program, resting))

    async def _rest(self, sandboxes: SandboxPort, program: str) -> None:
        try:
            is_put_away = await sandboxes.rest(program)
        except InfrastructureFailure as error:  # its program will find out
            logger.info("program=%s: its sandbox does not rest: %s", program, error)
            return
        if is_put_away and program in self._resting:
            self.handle(SandboxStopped(program=program))

    async def _wake(self, sandboxes: SandboxPort, program: str, resting: asyncio.Task[None]) -> None:
        """Ahead of its next command, which would wake it too."""
        await asyncio.wait([resting])
        try:
            await sandboxes.wake(program)
        except InfrastructureFailure as error:
            logger.info("program=%s: its sandbox does not wake: %s", program, error)

    def _note_backends(self, event: Event) -> None:
        if isinstance(event, BackendUp):
            self._live_backends[event.backend] = event.generation
            self._no_engine = None
            self._returning.discard(event.backend)
        elif isinstance(event, BackendDown):
            self._note_down(event)

    def _note_down(self, event: BackendDown) -> None:
        if self._live_backends.get(event.backend) == event.generation:
            del self._live_backends[event.backend]
            self._returning.add(event.backend)
        if event.returning:
            self._lost[event.backend] = max(event.generation, self._lost.get(event.backend, event.generation))
            self._a_loss.set()
            self._a_loss = asyncio.Event()
        if event.returning or event.backend in self._live_backends:
            return
        self._returning.discard(event.backend)
        if not self._live_backends and not self._returning:
            self._no_engine = f"no engine is left: {event.backend}: {event.reason}"
            for request in list(self._waiting):
                self._fail_waiter(request, EngineDied(self._no_engine))

    def _fail_waiter(self, request: str, error: ThunderError) -> None:
        future = self._waiting[request].future
        if not future.done():
            future.set_exception(error)

    def _break(self, error: Exception) -> None:
        logger.critical("the scheduler broke an invariant and stops", exc_info=error)
        self._broken = ThunderError(f"the scheduler stopped: {type(error).__name__}: {error}")
        for request in list(self._waiting):
            self._fail_waiter(request, self._broken)

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run what belongs to the service beside it, until `stop`; a failure there breaks the service."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self._broken is None:
            self._break(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    async def _tick_forever(self) -> None:
        while self._broken is None:
            await asyncio.sleep(self._config.tick_s)
            self.handle(Tick())
            if self._trace is not None:
                self._trace.flush()

    def _now(self) -> float:
        return self._clock() - self._started_at
