"""The scheduler actor's own latency, for `bench-core`: Ray's part, and hashing the ids."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from thunder_rollout.bench.config import BenchCoreConfig
from thunder_rollout.bench.core import MEAN_GROWTH_TOKENS, quantile_us, write_json
from thunder_rollout.core.events import BackendUp, ToolEnded, ToolStarted, TurnEnded, TurnRequested
from thunder_rollout.engine.hashing import BlockHasher
from thunder_rollout.runtime.actor import RemoteScheduler, create_scheduler_actor
from thunder_rollout.runtime.cluster import start_ray
from thunder_rollout.runtime.config import RayConfig


async def run_actor(config: BenchCoreConfig) -> dict[str, float]:
    """Microseconds of wall time through a scheduler actor on an idle one-node Ray: a turn's admission (the
    round trip, hashes included), a message, and hashing a grown prompt. Writes
    `runs/bench/scheduler_actor.json`."""
    start_ray(RayConfig())
    handle = create_scheduler_actor(config.scheduler, trace_path=None, hosts=None)
    scheduler = RemoteScheduler(handle)
    costs: dict[str, list[float]] = defaultdict(list)
    hasher, ids = BlockHasher(config.block_size), list(range(config.context_tokens))
    try:
        await scheduler.start()
        await scheduler.post(
            BackendUp(
                backend="b", generation=0, capacity_tokens=100 * config.capacity_tokens, max_running=256,
                block_size=config.block_size,
            )
        )  # fmt: skip
        await scheduler.open("p")
        hasher.hashes(ids)
        for number in range(config.num_actor_turns):
            ids += range(number, number + MEAN_GROWTH_TOKENS)
            with _timed(costs["hash_prompt"]):
                hashes = tuple(hasher.hashes(ids))
            event = TurnRequested(program="p", request=str(number), prompt_tokens=len(ids), block_hashes=hashes)
            with _timed(costs["admit"]):
                grant = await scheduler.admit(event)
            with _timed(costs["post"]):
                await scheduler.post(TurnEnded(program="p", grant=grant.grant, output_tokens=1))
            await scheduler.post(ToolStarted(program="p"))
            await scheduler.post(ToolEnded(program="p"))
            del ids[config.context_tokens :]
    finally:
        await scheduler.stop()
        ray.kill(handle)
        ray.shutdown()
    result = {
        f"{what}_{name}_us": round(quantile_us(values, share), 1)
        for what, values in costs.items()
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    write_json(config, "scheduler_actor.json", result)
    return result


@contextmanager
def _timed(costs: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    costs.append(time.perf_counter() - started)
