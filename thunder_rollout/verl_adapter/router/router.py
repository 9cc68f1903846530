"""verl's load balancer as a program scheduler: the plain asyncio class behind `ProgramRouter`.

Contract, towards verl: `acquire` returns when the request may run, on the server it names, and is held
until then; `release` never waits. Without servers both behave as verl's own balancer does. Nothing happens
before the first `acquire` or `add_servers` (in `separate_async` verl makes a router that it never asks).

What verl does not tell is read from the replicas (`pool`) or concluded: a release while its replica is
paused, or under other weights than the turn began with, is of an aborted turn, after which no tool runs; a
turn that its replica does not have has lost its caller, and its program with it (`turns`); a program that
is idle is discounted by the policy as it learns how long tools take, and comes back with its next request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from thunder_rollout.core.events import FinishReason, ToolStarted, TurnEnded
from thunder_rollout.errors import BadEvent, ConfigError, EngineDied
from thunder_rollout.runtime.service import SchedulerService
from thunder_rollout.verl_adapter.router.config import RouterConfig
from thunder_rollout.verl_adapter.router.metrics import RouterMetrics
from thunder_rollout.verl_adapter.router.pool import REFRESH_S, ReplicaPool
from thunder_rollout.verl_adapter.router.programs import VALIDATION, VALIDATION_PREFIX, ProgramRecord, Programs
from thunder_rollout.verl_adapter.router.replica import ReplicaFacts, ReplicaPort, ReplicaState
from thunder_rollout.verl_adapter.router.turns import HeldTurn, HeldTurns, orphans

logger = logging.getLogger(__name__)

NO_SERVERS = "No available servers in load balancer"  # verl's words: its clients look for them
QUIET_S = 0.05  # a request that finds no turn in flight reads the replicas, unless they were read so lately


class Router:
    """One event loop runs all methods."""

    def __init__(
        self,
        servers: Mapping[str, ReplicaPort],
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._service = SchedulerService(config.scheduler, clock=clock)
        self._pool = ReplicaPool(config, self._service.handle, clock)
        self._programs = Programs()
        self._turns = HeldTurns()
        self._metrics = RouterMetrics()
        self._num_held = 0
        self._joining = dict(servers)  # told, and not read yet
        self._joins: dict[str, asyncio.Task[Exception | None]] = {}
        self._started: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def inspect(self) -> None:
        """Raises `ConfigError` for servers that can't be scheduled; starts nothing, and lets the dead rest."""
        results = await asyncio.gather(*(port.facts() for port in self._joining.values()), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, EngineDied | TimeoutError):
                raise error

    async def acquire(
        self, request_id: str, prompt_ids: list[int], sampling_params: Mapping[str, Any] | None = None
    ) -> tuple[str, ReplicaPort]:
        """Wait until the request may run; returns where.

        Raises `RuntimeError` in verl's words when there is no server, `Rejected` for a prompt that fits none.
        """
        self._require_servers()
        self._num_held += 1
        try:
            await self._start()
            if self._joining and (joins := self._let_join()) and not len(self._pool):
                await self._wait_for_servers(joins)
            if not len(self._turns) and self._clock() - self._pool.refreshed_s > QUIET_S:
                await self._pool.refresh()
            while (before := self._programs.current(request_id)) is not None and before.ending:
                await before.settled()
            return await self._admit(request_id, prompt_ids, sampling_params or {})
        finally:
            self._num_held -= 1

    def release(self, server_id: str, request_id: str) -> None:
        """The turn ended; idempotent, and nothing for turns of servers that left."""
        turn = self._turns.pop(server_id, request_id)
        if turn is not None:
            task = self._service.spawn(self._end(turn))
            turn.record.ending.add(task)
            task.add_done_callback(turn.record.ending.discard)

    async def tool_started(self, request_id: str, tool: str) -> None:
        """Of a caller that tells, as `thunder_swe` does: which tool runs since its last release."""
        record = self._programs.current(request_id)
        if record is not None:
            await record.settled()
            if not record.num_open:
                self._service.handle(ToolStarted(program=record.name, tool=tool))

    async def program_ended(self, request_id: str) -> None:
        """Of a caller that tells: the program makes room at once, not when it has been idle for long. (This may
        come before its last release, for Ray keeps no order.)"""
        record = self._programs.current(request_id)
        if record is not None:
            await record.settled()
            self._programs.forget(record)
            record.is_over = True
            if not record.num_open:
                self._service.close(record.name, reason="its caller said so")

    async def add_servers(self, servers: Mapping[str, ReplicaPort]) -> None:
        """One that can't join is asked again with the next request. Raises as `acquire` does where no other serves."""
        self._joining.update(servers)
        await self._start()
        await self._wait_for_servers(self._let_join())

    def remove_servers(self, server_ids: list[str]) -> None:
        for server_id in server_ids:
            self._joining.pop(server_id, None)
        self._pool.leave(server_ids, "verl removed it")
        self._drop_turns()

    def servers(self) -> list[str]:
        return [*self._pool.names, *(name for name in self._joining if name not in self._pool)]

    def lost_servers(self) -> dict[str, str]:
        """Why each that died did; verl has neither removed it nor brought another of its name since."""
        return dict(self._pool.lost)

    def inflight(self, server_id: str) -> int:
        return self._turns.count(server_id)

    def total_inflight(self) -> int:
        """Held requests count: their callers wait for them as for any other."""
        return self._num_held + len(self._turns)

    def status(self) -> dict[str, Any]:
        loads = {server: self._turns.count(server) for server in self.servers()}
        return {
            "servers": loads,
            "total_inflight": self.total_inflight(),
            "active_servers": len(loads),
            "registered_handles": list(loads),
            "held": self._num_held,
            "programs": len(self._programs),
        }

    def clear_sticky_cache(self) -> dict[str, Any]:
        """No program has a place any more: each goes where there is most room for it next."""
        bound = sum(b.num_reasoning + b.num_acting for b in self._service.metrics().scheduler.backends)
        if len(self._pool):
            self._pool.void_caches()
        return {"cleared_entries": bound, "server_loads": self.status()["servers"]}

    def metrics(self) -> dict[str, float]:
        """Of the time since the last call; see `RouterMetrics.figures`."""
        metrics, self._metrics = self._metrics, RouterMetrics()
        return metrics.figures(self._service.metrics())

    async def stop(self) -> None:
        for join in self._joins.values():
            join.cancel()
        await asyncio.gather(*self._joins.values(), return_exceptions=True)
        await self._service.stop()
        await self._pool.stop()

    async def poll(self) -> None:
        """Take in what became of the replicas, and of turns and programs that nobody speaks of any more."""
        states = await self._pool.refresh()
        self._drop_turns()
        for server_id, state in states.items():
            self._reclaim(server_id, state)
        for record in self._programs.idle_for(self._config.forget_after_s, self._clock()):
            self._programs.put_away(record)
            self._service.close(record.name, reason="idle")
        self._service.metrics()  # the mean of the imbalance is of the moments when it was asked for

    # Start

    def _require_servers(self) -> None:
        if not len(self._pool) and not self._joining:
            raise RuntimeError(NO_SERVERS)

    async def _start(self) -> None:
        async with self._starting:
            if self._started is None:
                await self._service.start()
                self._started = self._service.spawn(self._watch())

    def _let_join(self) -> list[asyncio.Task[Exception | None]]:
        """Those that were told since; whoever waits for one shares the attempt."""
        for name, port in self._joining.items():
            if name not in self._joins or self._joins[name].done():
                self._joins[name] = asyncio.create_task(self._join(name, port), name=f"{name} joins")
        return [self._joins[name] for name in self._joining]

    async def _join(self, name: str, port: ReplicaPort) -> Exception | None:
        """Returns why it can't for now."""
        try:
            facts = await self._pool.join(name, port)
        except (ConfigError, TimeoutError) as error:
            logger.error("replica=%s can't join: %s", name, error)
            return error
        if self._joining.pop(name, None) is None:
            self._pool.leave([name], "verl removed it")
        elif facts is not None:
            self._learn(facts)
        return None

    async def _wait_for_servers(self, joins: list[asyncio.Task[Exception | None]]) -> None:
        """Until all that join are there, so that the first requests spread over them; no longer than a moment where
        some are. Raises what keeps the only ones out."""
        if joins:
            await asyncio.wait(joins, timeout=REFRESH_S)
        while not len(self._pool) and (waiting := [join for join in joins if not join.done()]):
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        errors = [error for join in joins if join.done() and not join.cancelled() and (error := join.result())]
        if errors and not len(self._pool):
            raise errors[0]

    def _learn(self, facts: ReplicaFacts) -> None:
        self._programs.placeholder_ids |= facts.placeholder_ids
        if self._config.scheduler.uses_block_hashes:
            self._programs.block_size = facts.block_size

    # Turns

    async def _admit(
        self, request_id: str, prompt_ids: list[int], sampling_params: Mapping[str, Any]
    ) -> tuple[str, ReplicaPort]:
        record, over = self._programs.recognise(
            request_id,
            prompt_ids,
            is_validation=request_id.startswith(VALIDATION_PREFIX) or self._pool.is_validation(sampling_params),
            version=self._pool.version,
            now=self._clock(),
        )
        if over is not None and not over.num_open:
            self._service.close(over.name, reason="it is over")
        try:
            grant = await self._service.admit(self._programs.request(record, prompt_ids, now=self._clock()))
        except BaseException as error:
            self._close_request(record)
            if isinstance(error, EngineDied):
                raise RuntimeError(f"{NO_SERVERS}: {error}") from error
            raise
        replica = self._pool[grant.backend]
        self._turns.add(
            HeldTurn(
                record=record,
                grant=grant.grant,
                server_id=replica.name,
                prompt_tokens=len(prompt_ids),
                max_tokens=sampling_params.get("max_tokens", sampling_params.get("max_new_tokens")),
                version=replica.version,
                seen_s=self._clock(),
            )
        )
        if record.kind != VALIDATION:
            self._metrics.granted(prompt_tokens=len(prompt_ids), queue_s=grant.queue_s)
        return replica.name, replica.port

    async def _end(self, turn: HeldTurn) -> None:
        state = await self._pool.fresh_state(turn.server_id)
        self._drop_turns()
        record = turn.record
        record.was_cut = self._pool.was_cut(turn.server_id, turn.version, state)
        if record.was_cut:
            self._metrics.num_cut += record.kind != VALIDATION
            self._tell_end(turn, FinishReason.ABORT, None)
        else:
            self._tell_end(turn, FinishReason.STOP, self._programs.expected_growth(record, turn.max_tokens))
        self._close_request(record)

    def _tell_end(self, turn: HeldTurn, finish_reason: FinishReason, output_tokens: int | None) -> None:
        ended = TurnEnded(
            program=turn.record.name, grant=turn.grant, output_tokens=output_tokens, finish_reason=finish_reason
        )
        try:
            self._service.handle(ended)
        except BadEvent as error:  # its program was taken for lost
            logger.warning("a release came late: %s", error)

    def _close_request(self, record: ProgramRecord) -> None:
        self._programs.closed(record, self._clock())
        if record.is_over and not record.num_open:
            self._service.close(record.name, reason="it is over")

    # Watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._pool.poll_s)
            await self.poll()

    def _reclaim(self, server_id: str, state: ReplicaState) -> None:
        """A paused replica parks requests where nobody can count them."""
        now, turns = self._clock(), self._turns.of(server_id)
        if state.paused or state.prompt_lengths is None:
            for turn in turns:
                turn.seen_s = now
            return
        for turn in orphans(turns, state.prompt_lengths, now, self._config.orphan_s):
            logger.warning("program=%s lost its caller: replica=%s has no such turn", turn.record.name, server_id)
            self._metrics.num_reclaimed += turn.record.kind != VALIDATION
            self._turns.remove(turn)
            self._tell_end(turn, FinishReason.ABORT, None)
            self._close_request(turn.record)
            if not turn.record.num_open:
                self._programs.forget(turn.record)
                self._service.close(turn.record.name, reason="its caller is gone")

    def _drop_turns(self) -> None:
        """Those of servers that left; the scheduler took their grants back."""
        for turn in self._turns.drop_all_but(self._pool.names):
            turn.record.was_cut = True
            self._close_request(turn.record)
