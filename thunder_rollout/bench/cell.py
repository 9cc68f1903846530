"""One cell of the benchmark: a closed loop of N programs under one policy, measured in a window.

It begins where a rehearsal in virtual time has left the same programs under the same policy, but with empty
caches: who is how old and who waits is as in the steady state, and the warm-up fills the caches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from thunder_rollout.bench.closed_loop import ClosedLoop
from thunder_rollout.bench.plan import CellKey, CellPlan
from thunder_rollout.bench.source import core_digest
from thunder_rollout.bench.window import Window
from thunder_rollout.bench.workload import Position
from thunder_rollout.engine.protocol import Engine
from thunder_rollout.observe.metrics import MetricsSnapshot
from thunder_rollout.runtime.client import SchedulerPort

STATS_PERIOD_S = 1.0
UpdateWeights = Callable[[str], Awaitable[object]]  # to the version so called


class MeteredScheduler(SchedulerPort, Protocol):
    async def metrics(self) -> MetricsSnapshot: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One row of bench.json. Latency is from the turn's request to its last token, seconds; hits are shares of
    the prompts' tokens, `infinite_kv_hit_rate` what a cache that forgets nothing would give; `imbalance` is max
    - min over engines of the share of their KV in use, averaged over samples; `cost_shares` are the five terms
    of the paper's cost as shares of capacity x time, `caching` as if a context was held during all of each tool call
    (and `unused` what is left then); waits are for admission, those still open included;
    `driver_cpu_share` is of one core, for playing the programs; `drift_p95` is the 95th percentile, over samples and
    engines, of what the scheduler believed of an engine's cache and its report corrected, as a share of its KV."""

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
    max_programs: int | None  # the limit of `capped`
    model: str
    settings: str
    kv_tokens: list[int]  # of each engine
    num_ended: int  # programs, in the window
    num_weight_updates: int
    infinite_kv_hit_rate: float
    recomputed_tokens: int
    wait_p95_s: float
    longest_wait_s: float
    num_waits_past_rule: int  # longer than scheduler.max_wait_s, which a cell outlasts only where it is set so
    driver_cpu_share: float
    drift_p95: float | None = None  # None: the policy has no such belief, the engines don't report, or an older row
    core: str | None = None  # digest of the scheduler's source; None: of a row from before it was recorded

    @property
    def key(self) -> CellKey:
        return CellKey(
            workload=self.workload,
            model=self.model,
            load=self.load,
            policy=self.policy,
            seed=self.seed,
            settings=self.settings,
        )


async def run_cell(
    plan: CellPlan,
    start: Sequence[Position],
    scheduler: MeteredScheduler,
    engines: Mapping[str, Engine],
    *,
    capacities: Mapping[str, int],
    vocab_size: int,
    update_weights: UpdateWeights | None = None,
) -> CellResult:
    """Play the cell to its end; `capacities` are the engines' KV tokens. Raises what a slot raises."""
    core = core_digest()
    stats = await next(iter(engines.values())).stats()
    loop = ClosedLoop(
        plan.workload,
        start,
        scheduler,
        engines,
        name=f"{plan.key.policy}-{plan.key.load:g}-{plan.key.seed}",
        seed=plan.key.seed,
        vocab_size=vocab_size,
        block_size=plan.engines[0].block_size,
        send_hashes=plan.scheduler.uses_block_hashes,
        weight_version=stats.weight_version,
    )
    tasks = loop.begin()
    tasks.append(asyncio.create_task(_sample(loop.window, scheduler, engines, capacities)))
    if plan.workload.weight_update_s is not None:
        assert update_weights is not None
        first_s = plan.warmup_s + plan.workload.weight_update_s / 2
        period_s = plan.workload.weight_update_s
        tasks.append(asyncio.create_task(_update_forever(loop.window, update_weights, first_s, period_s)))
    try:
        await sleep_or_raise(plan.warmup_s, tasks)
        with loop.window.opened():
            cpu_s = time.process_time()
            await sleep_or_raise(plan.measure_s, tasks)
        cpu_s = time.process_time() - cpu_s
        open_waits_s = loop.waits.open_waits_s()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return replace(_result(plan, loop, open_waits_s, cpu_s / loop.window.measured_s), core=core)


def _result(plan: CellPlan, loop: ClosedLoop, open_waits_s: list[float], driver_cpu_share: float) -> CellResult:
    window = loop.window
    latencies_s = sorted(window.latencies_s) or [float("nan")]
    waits_s = sorted(window.waits_s + open_waits_s) or [0.0]
    num_prompt = max(1, window.prompt_tokens)
    return CellResult(
        workload=plan.key.workload,
        policy=plan.key.policy,
        load=plan.key.load,
        seed=plan.key.seed,
        model=plan.key.model,
        settings=plan.key.settings,
        kv_tokens=[engine.kv_cache_tokens or 0 for engine in plan.engines],
        num_programs=plan.num_programs,
        num_turns=len(window.latencies_s),
        num_ended=window.num_ended,
        num_weight_updates=window.num_weight_updates,
        steps_per_min=60 * len(window.latencies_s) / window.measured_s,
        kv_hit_rate=window.cached_tokens / num_prompt,
        infinite_kv_hit_rate=window.reusable_tokens / num_prompt,
        recomputed_tokens=window.recomputed_tokens,
        turn_latency_p50_s=latencies_s[len(latencies_s) // 2],
        turn_latency_p95_s=latencies_s[int(0.95 * (len(latencies_s) - 1))],
        wait_p95_s=waits_s[int(0.95 * (len(waits_s) - 1))],
        longest_wait_s=waits_s[-1],
        num_waits_past_rule=sum(wait_s > plan.scheduler.max_wait_s for wait_s in waits_s),
        imbalance=window.imbalance,
        drift_p95=window.drift_p95,
        cost_shares=asdict(window.cost.shares(plan.capacity_tokens, window.measured_s).fractions()),
        warmup_s=plan.warmup_s,
        measure_s=plan.measure_s,
        max_programs=plan.max_programs,
        driver_cpu_share=driver_cpu_share,
    )


async def sleep_or_raise(seconds: float, tasks: list[asyncio.Task[None]]) -> None:
    """Tasks never end by themselves: one that does has failed, and the cell with it."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _update_forever(window: Window, update_weights: UpdateWeights, first_s: float, period_s: float) -> None:
    await asyncio.sleep(first_s)
    while True:
        next_one = asyncio.get_running_loop().time() + period_s
        await update_weights(f"{time.monotonic_ns()}")
        window.num_weight_updates += 1
        await asyncio.sleep(max(0.0, next_one - asyncio.get_running_loop().time()))


async def _sample(
    window: Window, scheduler: MeteredScheduler, engines: Mapping[str, Engine], capacities: Mapping[str, int]
) -> None:
    while True:
        await asyncio.sleep(STATS_PERIOD_S)
        stats: list[Any] = await asyncio.gather(*(engine.stats() for engine in engines.values()))
        if window.open:
            used = [one.used_tokens / capacities[name] for name, one in zip(engines, stats, strict=True)]
            window.imbalances.append(max(used) - min(used))
            window.add_drifts((await scheduler.metrics()).scheduler)
