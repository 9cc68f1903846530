"""One cell of the benchmark: a closed loop of N programs under one policy, measured in a window."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from thunder_rollout.agent.loop import TurnResult
from thunder_rollout.bench.config import WorkloadConfig
from thunder_rollout.bench.workload import ScriptedTurn, programs
from thunder_rollout.core.cost import CostMeter, CostShares, TurnCost
from thunder_rollout.engine.protocol import Engine, Sampling
from thunder_rollout.runtime.client import ProgramClient, SchedulerPort


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One row of bench.json. Latency is from the turn's request to its last token, seconds;
    `imbalance` is max - min over engines of the share of their KV in use, averaged over samples a
    second apart; `cost_shares` are the five terms of the paper's cost as shares of capacity x time."""

    workload: str
    policy: str
    load: float
    seed: int
    num_programs: int
    num_turns: int
    steps_per_min: float
    kv_hit_rate: float
    turn_latency_p50_s: float
    turn_latency_p95_s: float
    imbalance: float
    cost_shares: dict[str, float]
    warmup_s: float
    measure_s: float
    max_programs: int | None = None  # the limit of `capped`


@dataclass(slots=True)
class _Window:
    """Collects while `open`; turns that end inside it count."""

    open: bool = False
    latencies: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    imbalances: list[float] = field(default_factory=list)
    cost: CostMeter = field(default_factory=CostMeter)

    def add_turn(self, result: TurnResult, previous_context_tokens: int) -> None:
        if not self.open:
            return
        generation = result.generation
        self.latencies.append(result.queue_s + result.engine_s)
        self.prompt_tokens += generation.prompt_tokens
        self.cached_tokens += generation.cached_tokens
        self.cost.add_turn(
            TurnCost(
                prompt_tokens=generation.prompt_tokens,
                cached_tokens=generation.cached_tokens,
                previous_context_tokens=previous_context_tokens,
                output_tokens=len(generation.token_ids),
                prefill_s=generation.prefill_s,
                decode_s=generation.decode_s,
            )
        )

    def add_hold(self, context_tokens: int, held_s: float) -> None:
        if self.open:
            self.cost.add_hold(context_tokens, held_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    workload: WorkloadConfig
    policy: str
    load: float
    seed: int
    num_programs: int
    vocab_size: int
    warmup_s: float
    measure_s: float
    max_programs: int | None = None

    async def run(
        self, scheduler: SchedulerPort, engines: Mapping[str, Engine], *, capacity_tokens: int, block_size: int | None
    ) -> CellResult:
        """Play the cell to its end; `capacity_tokens` is of all engines together."""
        window = _Window()
        slots = [
            asyncio.create_task(self._slot(slot, window, scheduler, engines, block_size))
            for slot in range(self.num_programs)
        ]
        meter = asyncio.create_task(_sample_imbalance(window, engines, capacity_tokens / len(engines)))
        try:
            await _sleep_or_raise(self.warmup_s, slots)
            window.open, opened = True, asyncio.get_running_loop().time()
            await _sleep_or_raise(self.measure_s, slots)
            window.open, measured_s = False, asyncio.get_running_loop().time() - opened
        finally:
            for task in (*slots, meter):
                task.cancel()
            await asyncio.gather(*slots, meter, return_exceptions=True)
        return self._result(window, measured_s, window.cost.shares(capacity_tokens, measured_s))

    async def _slot(
        self,
        slot: int,
        window: _Window,
        scheduler: SchedulerPort,
        engines: Mapping[str, Engine],
        block_size: int | None,
    ) -> None:
        scripts = programs(self.workload, seed=self.seed, slot=slot, vocab_size=self.vocab_size)
        for number, turns in enumerate(scripts):
            name = f"{self.policy}-{self.load}-{self.seed}/{slot}.{number}"
            async with ProgramClient(name, scheduler, engines, block_size=block_size) as client:
                await _play(turns, client, window)

    def _result(self, window: _Window, measured_s: float, shares: CostShares) -> CellResult:
        latencies = sorted(window.latencies) or [float("nan")]
        return CellResult(
            workload=self.workload.name,
            policy=self.policy,
            load=self.load,
            seed=self.seed,
            num_programs=self.num_programs,
            num_turns=len(window.latencies),
            steps_per_min=60 * len(window.latencies) / measured_s,
            kv_hit_rate=window.cached_tokens / window.prompt_tokens if window.prompt_tokens else 0.0,
            turn_latency_p50_s=latencies[len(latencies) // 2],
            turn_latency_p95_s=latencies[int(0.95 * (len(latencies) - 1))],
            imbalance=statistics.fmean(window.imbalances) if window.imbalances else 0.0,
            cost_shares=asdict(shares.fractions()),
            warmup_s=self.warmup_s,
            measure_s=self.measure_s,
            max_programs=self.max_programs,
        )


async def _play(turns: list[ScriptedTurn], client: ProgramClient, window: _Window) -> None:
    context: list[int] = []
    computed = 0
    for turn in turns:
        context += turn.new_ids
        result = await client.turn(context, Sampling(max_tokens=turn.output_tokens, ignore_eos=True))
        window.add_turn(result, computed)
        context += result.generation.token_ids
        computed = len(context)
        await client.tool_started("script")
        await asyncio.sleep(turn.tool_s)
        await client.tool_ended()
        window.add_hold(computed, turn.tool_s)


async def _sleep_or_raise(seconds: float, tasks: list[asyncio.Task[None]]) -> None:
    """Slots never end by themselves: one that does has failed, and the cell with it."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _sample_imbalance(window: _Window, engines: Mapping[str, Engine], capacity_tokens: float) -> None:
    while True:
        await asyncio.sleep(1.0)
        stats: list[Any] = await asyncio.gather(*(engine.stats() for engine in engines.values()))
        if window.open:
            used = [s.used_tokens / capacity_tokens for s in stats]
            window.imbalances.append(max(used) - min(used))
