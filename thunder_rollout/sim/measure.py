"""What a simulated run is judged by, collected in a window of virtual time."""

from __future__ import annotations

import itertools
import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from thunder_rollout.core.cost import CostMeter, CostShares, TurnCost
from thunder_rollout.sim.engine import SimTurn

NUM_DECILES = 10
MAX_SAMPLES = 512  # of usage; beyond it every second one is dropped and the interval doubles
FIRST_INTERVAL_S = 0.25
MAX_TRACED_BACKENDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSeries:
    """Share of each traced backend's KV that running turns hold, at each time."""

    times_s: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]  # one for each time, by backend


@dataclass(frozen=True, slots=True, kw_only=True)
class SimResult:
    """Latency is from a turn's request to its last token, wait to its first admission by an engine
    (the scheduler's queue and the engine's); `wait_p99_by_decile_s` goes from the shortest tenth of
    the prompts to the longest. `kv_load_rate`: the part of
    `kv_hit_rate` from a host tier. `imbalance` is max - min over backends of the share of KV in use.
    `makespan_s` is set where a fixed set of programs was run to its end."""

    num_turns: int
    measured_s: float
    steps_per_min: float
    kv_hit_rate: float
    kv_load_rate: float
    turn_latency_p50_s: float
    turn_latency_p95_s: float
    wait_p50_s: float
    wait_p99_s: float
    wait_p99_by_decile_s: tuple[float, ...]
    waits_s: tuple[float, ...]  # quantiles 0, 1%, ..., 100%
    imbalance: float
    cost: CostShares
    makespan_s: float | None
    num_preemptions: int
    num_pauses: int
    num_rejected: int
    usage: UsageSeries


class Recorder:
    """Collects while open; turns that end inside the window count."""

    def __init__(self, capacity_tokens: int) -> None:
        self.is_open = False
        self.opened_at = 0.0
        self.closed_at = 0.0
        self.num_pauses = 0
        self.num_rejected = 0
        self._capacity_tokens = capacity_tokens
        self._cost = CostMeter()
        self._latencies = array("d")
        self._waits = array("d")
        self._prompts = array("q")
        self._cached_tokens = 0
        self._loaded_tokens = 0
        self._imbalances: list[float] = []
        self._times: list[float] = []
        self._shares: list[tuple[float, ...]] = []
        self.interval_s = FIRST_INTERVAL_S

    def open(self, now: float) -> None:
        self.is_open = True
        self.opened_at = now

    def close(self, now: float) -> None:
        self.is_open = False
        self.closed_at = now

    def add_turn(self, turn: SimTurn, *, requested_at: float, previous_context_tokens: int, now: float) -> None:
        if not self.is_open:
            return
        self._latencies.append(now - requested_at)
        self._waits.append(turn.admitted_at - requested_at)
        self._prompts.append(turn.prompt_tokens)
        self._cached_tokens += turn.cached_tokens
        self._loaded_tokens += turn.loaded_tokens
        self._cost.add_turn(
            TurnCost(
                prompt_tokens=turn.prompt_tokens,
                cached_tokens=turn.cached_tokens,
                previous_context_tokens=previous_context_tokens,
                output_tokens=turn.output_tokens,
                prefill_s=turn.first_token_at - turn.admitted_at,
                decode_s=now - turn.first_token_at,
            )
        )

    def add_hold(self, context_tokens: int, held_s: float) -> None:
        if self.is_open:
            self._cost.add_hold(context_tokens, held_s)

    def add_usage(self, now: float, shares: Sequence[float]) -> None:
        if not self.is_open:
            return
        self._imbalances.append(max(shares) - min(shares))
        self._times.append(now - self.opened_at)
        self._shares.append(tuple(shares[:MAX_TRACED_BACKENDS]))
        if len(self._times) > MAX_SAMPLES:
            self._imbalances, self._times, self._shares = self._imbalances[::2], self._times[::2], self._shares[::2]
            self.interval_s *= 2

    def result(self, *, num_preemptions: int, makespan_s: float | None) -> SimResult:
        measured_s = self.closed_at - self.opened_at
        latencies, waits = sorted(self._latencies), sorted(self._waits)
        prompt_tokens = sum(self._prompts)
        return SimResult(
            num_turns=len(latencies),
            measured_s=measured_s,
            steps_per_min=60 * len(latencies) / measured_s if measured_s > 0 else 0.0,
            kv_hit_rate=self._cached_tokens / prompt_tokens if prompt_tokens else 0.0,
            kv_load_rate=self._loaded_tokens / prompt_tokens if prompt_tokens else 0.0,
            turn_latency_p50_s=quantile(latencies, 0.5),
            turn_latency_p95_s=quantile(latencies, 0.95),
            wait_p50_s=quantile(waits, 0.5),
            wait_p99_s=quantile(waits, 0.99),
            wait_p99_by_decile_s=self._wait_by_decile(),
            waits_s=tuple(quantile(waits, percent / 100) for percent in range(101)),
            imbalance=statistics.fmean(self._imbalances) if self._imbalances else 0.0,
            cost=self._cost.shares(self._capacity_tokens, measured_s).fractions(),
            makespan_s=makespan_s,
            num_preemptions=num_preemptions,
            num_pauses=self.num_pauses,
            num_rejected=self.num_rejected,
            usage=UsageSeries(times_s=tuple(self._times), shares=tuple(self._shares)),
        )

    def _wait_by_decile(self) -> tuple[float, ...]:
        by_size = sorted(range(len(self._prompts)), key=self._prompts.__getitem__)
        edges = [len(by_size) * decile // NUM_DECILES for decile in range(NUM_DECILES + 1)]
        parts = [by_size[start:end] for start, end in itertools.pairwise(edges)]
        return tuple(quantile(sorted(self._waits[i] for i in part), 0.99) for part in parts)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value with `share` of the others below it; nan of nothing."""
    return ordered[int(share * (len(ordered) - 1))] if ordered else float("nan")
