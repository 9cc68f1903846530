"""Engines that fail on purpose, and a run in miniature around them: host, supervisor, scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.support.engine_contract import CONFIG, new_prompt, run
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.host import EngineHost
from thunder_rollout.engine.protocol import Engine, EngineInfo, GenerateRequest, Generation, Sampling
from thunder_rollout.engine.weights import UpdateMode, WeightSource
from thunder_rollout.errors import EngineDied
from thunder_rollout.runtime.client import LocalScheduler, ProgramClient
from thunder_rollout.runtime.service import SchedulerService
from thunder_rollout.runtime.supervisor import EngineSupervisor

POISON = 13  # the token that brings a `PoisonedEngine` down
SUPERVISED = replace(CONFIG, hang_s=5.0, max_restarts=3)


class PoisonedEngine(FakeEngine):
    """Fails at its work just after a prompt with `POISON` came."""

    fails = True

    async def generate(self, request: GenerateRequest) -> Generation:
        if POISON in request.prompt_ids:
            asyncio.get_running_loop().call_later(0.05, lambda: self.die("it is gone", by_turn=self.fails))
        return await super().generate(request)


class OvereatingEngine(PoisonedEngine):
    """Is killed then, as a process that takes too much memory."""

    fails = False


async def check_that_an_update_finds_a_hang(
    engine: Engine, hang: Callable[[], None], weights: WeightSource, mode: UpdateMode, hang_s: float
) -> None:
    """`engine` is a started one that does not outlive this; `hang` stops its work. Its turns are cut all the same,
    after which it has none that makes no progress."""
    turns = [asyncio.create_task(run(engine, new_prompt(100), max_tokens=1500)) for _ in range(3)]
    await asyncio.sleep(0.3)
    hang()
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(EngineDied, match="did not pause within"):
        await engine.update_weights(weights, version="new", mode=mode)
    assert asyncio.get_running_loop().time() - began_s < hang_s + 10
    assert {(await turn).finish_reason for turn in turns} == {"abort"}
    with pytest.raises(EngineDied):
        await engine.stats()
    with pytest.raises(EngineDied):
        await run(engine, new_prompt(100))


class NeverStarts(FakeEngine):
    async def start(self) -> EngineInfo:
        raise EngineDied("no start today")


class LocalHost(EngineHost):
    """An `EngineHost` whose process can be killed: `engines` are all it ever had."""

    def __init__(self, make: Callable[[], Engine], config: EngineConfig) -> None:
        self.engines: list[Any] = []
        self.next_makes: list[Callable[[], Engine]] = []  # in place of `make`, once each
        self.num_kills = 0
        self._make = make
        super().__init__(self._make_next, hang_s=config.hang_s)

    def _make_next(self) -> Any:
        make = self.next_makes.pop(0) if self.next_makes else self._make
        self.engines.append(make())
        return self.engines[-1]

    def kill(self) -> None:
        self.num_kills += 1
        self.engines[-1].die("its process was killed")


@dataclass(slots=True)
class Run:
    hosts: dict[str, LocalHost]
    service: SchedulerService
    supervisors: dict[str, EngineSupervisor]
    watching: list[asyncio.Task[None]]

    def client(self, program: str) -> ProgramClient:
        return ProgramClient(program, LocalScheduler(self.service), self.hosts)


@asynccontextmanager
async def supervised_run(
    num_engines: int = 2,
    make: Callable[[], Engine] = lambda: FakeEngine(CONFIG),
    config: EngineConfig = SUPERVISED,
    make_host: type[LocalHost] = LocalHost,
) -> AsyncIterator[Run]:
    hosts = {f"engine{i}": make_host(make, config) for i in range(num_engines)}
    service = SchedulerService(SchedulerConfig(policy="adaptive"), clock=asyncio.get_running_loop().time)
    await service.start()
    supervisors = {
        name: EngineSupervisor(name, host, LocalScheduler(service), await host.start(), config)
        for name, host in hosts.items()
    }
    for supervisor in supervisors.values():
        await supervisor.announce()
    watching = [asyncio.create_task(supervisor.run()) for supervisor in supervisors.values()]
    try:
        yield Run(hosts, service, supervisors, watching)
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await asyncio.gather(*(host.stop() for host in hosts.values()))
        await service.stop()


async def play(
    client: ProgramClient, prompt: list[int], *, num_turns: int = 4, max_tokens: int = 100
) -> list[list[int]]:
    """A whole program; each turn's prompt is the turn before, its output and an observation. Returns
    the outputs."""
    outputs: list[list[int]] = []
    context = list(prompt)
    async with client:
        for number in range(num_turns):
            result = await client.turn(context, Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
            outputs.append(result.generation.token_ids)
            context += [*result.generation.token_ids, 20 + number]
            await client.tool_started("script")
            await asyncio.sleep(0.1)
            await client.tool_ended()
    return outputs
