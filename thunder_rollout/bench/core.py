"""`thunder-rollout bench-core`: what the scheduler's own decisions cost.

A fleet in virtual time drives `core.Scheduler` with the events that the shells send, in the mix in which
they come: each program asks for a turn, is granted it, starts, ends it, starts a tool, ends it, asks
again, until it ends and another takes its place; every `tick_s` there is a tick, now and then a backend
dies and returns, and weights are updated once. Prompts carry block hashes; the samples of a group
share their task's prefix. Only `handle` is timed, in CPU time of its thread, so that what else runs on the
machine is left out.

The scheduler actor's own latency (Ray, and hashing the ids) is measured apart.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import math
import multiprocessing
import random
import resource
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from thunder_rollout.bench.config import BenchCoreConfig
from thunder_rollout.core.decisions import Restore
from thunder_rollout.core.events import (
    BackendDown,
    BackendUp,
    Event,
    ProgramEnded,
    Tick,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnRequested,
    TurnStarted,
    WeightsUpdated,
    WeightsUpdating,
)
from thunder_rollout.core.scheduler import Scheduler
from thunder_rollout.observe.console import table_console

_MEAN_TURN_S = 12.0
_MEAN_TOOL_S = 4.0
MEAN_GROWTH_TOKENS = 600
_NUM_TURNS = 40
_MICROSECONDS = 1e6
_TABLE_WIDTH = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class EventCost:
    """One row of bench_core.json: CPU time of `Scheduler.handle`; `rss_mb` is the process's peak."""

    programs: int
    backends: int
    event: str
    count: int
    p50_us: float
    p99_us: float
    max_us: float
    rss_mb: float


@dataclass(slots=True)
class _Program:
    name: str
    number: int
    group: int
    tokens: int
    num_turns: int = 0


class _Fleet:
    """See the module. `costs` are seconds by the event's name, while `is_timed`."""

    def __init__(self, config: BenchCoreConfig, num_programs: int, num_backends: int) -> None:
        self.costs: dict[str, list[float]] = defaultdict(list)
        self.is_timed = False
        self.num_handled = 0
        self._config = config
        self._scheduler = Scheduler(config.scheduler)
        self._rng = random.Random(config.seed)
        self._now = 0.0
        self._heap: list[tuple[float, int, str, Any]] = []
        self._sequence = itertools.count()
        self._numbers = itertools.count()
        self._programs: dict[str, _Program] = {}
        self._grants: dict[int, tuple[_Program, str]] = {}  # turns in flight and where
        self._generations = dict.fromkeys((f"b{index}" for index in range(num_backends)), 0)
        for name in self._generations:
            self._up(name)
        for _ in range(num_programs):
            self._push(self._rng.uniform(0, _MEAN_TURN_S), "start", None)
        self._push(config.scheduler.tick_s, "tick", None)

    def run(self, num_events: int) -> None:
        goal = self.num_handled + num_events
        while self.num_handled < goal:
            self._now, _, kind, what = heapq.heappop(self._heap)
            getattr(self, f"_on_{kind}")(what)

    def restart(self, name: str) -> None:
        """It dies and returns; whoever had a turn there asks again."""
        cut = {grant: program for grant, (program, backend) in self._grants.items() if backend == name}
        for grant in cut:
            del self._grants[grant]
        self._handle(BackendDown(backend=name, generation=self._generations[name]))
        self._generations[name] += 1
        self._up(name)
        for program in cut.values():
            self._ask(program)

    def update_weights(self, num_events: int) -> None:
        names = tuple(self._generations)
        self._handle(WeightsUpdating(backends=names))
        self.run(num_events)
        self._handle(WeightsUpdated(backends=names))

    def backends(self) -> list[str]:
        return list(self._generations)

    def _up(self, name: str) -> None:
        config = self._config
        self._handle(
            BackendUp(
                backend=name,
                generation=self._generations[name],
                capacity_tokens=config.capacity_tokens,
                max_running=256,
                block_size=config.block_size,
            )
        )

    def _on_start(self, _: None) -> None:
        config, number = self._config, next(self._numbers)
        tokens = round(self._rng.lognormvariate(math.log(config.context_tokens) - 0.08, 0.4))
        program = _Program(
            name=f"p{number}",
            number=number,
            group=number // config.group_size,
            tokens=max(2 * config.shared_tokens, min(3 * config.context_tokens, tokens)),
            num_turns=self._rng.randrange(_NUM_TURNS),
        )
        self._programs[program.name] = program
        self._ask(program)

    def _on_tick(self, _: None) -> None:
        self._handle(Tick())
        self._push(self._now + self._config.scheduler.tick_s, "tick", None)

    def _on_turn_ended(self, grant: int) -> None:
        if grant not in self._grants:
            return  # its backend died
        program, _ = self._grants.pop(grant)
        output = self._rng.randrange(50, 400)
        cached = program.tokens - MEAN_GROWTH_TOKENS
        self._handle(TurnEnded(program=program.name, grant=grant, output_tokens=output, cached_tokens=max(0, cached)))
        program.tokens += output
        program.num_turns += 1
        self._handle(ToolStarted(program=program.name, tool=self._rng.choice(("edit", "shell", "tests"))))
        self._push(self._now + self._rng.expovariate(1 / _MEAN_TOOL_S), "tool_ended", program)

    def _on_tool_ended(self, program: _Program) -> None:
        self._handle(ToolEnded(program=program.name))
        if program.num_turns >= _NUM_TURNS:
            del self._programs[program.name]
            self._handle(ProgramEnded(program=program.name))
            self._push(self._now, "start", None)
            return
        program.tokens += self._rng.randrange(2 * MEAN_GROWTH_TOKENS)
        self._ask(program)

    def _ask(self, program: _Program) -> None:
        self._handle(
            TurnRequested(
                program=program.name,
                request=f"{program.name}/{program.num_turns}/{self.num_handled}",
                prompt_tokens=program.tokens,
                block_hashes=self._hashes(program),
                group=f"g{program.group}",
                task_kind="swe",
            )
        )

    def _hashes(self, program: _Program) -> tuple[int, ...]:
        size = self._config.block_size
        shared, blocks = self._config.shared_tokens // size, program.tokens // size
        head, tail = (2 * program.group) << 32, (2 * program.number + 1) << 32
        return (*range(head, head + shared), *range(tail, tail + blocks - shared))

    def _handle(self, event: Event) -> None:
        self.num_handled += 1
        started = time.thread_time()
        decisions = self._scheduler.handle(event, self._now)
        took = time.thread_time() - started
        if self.is_timed:
            self.costs[type(event).__name__].append(took)
        for decision in decisions:
            if isinstance(decision, Restore) and decision.grant is not None:
                self._granted(self._programs[decision.program], decision.grant, decision.backend)

    def _granted(self, program: _Program, grant: int, backend: str) -> None:
        self._grants[grant] = (program, backend)
        self._push(self._now, "turn_started", grant)
        self._push(self._now + self._rng.expovariate(1 / _MEAN_TURN_S), "turn_ended", grant)

    def _on_turn_started(self, grant: int) -> None:
        if grant in self._grants:
            self._handle(TurnStarted(program=self._grants[grant][0].name, grant=grant))

    def _push(self, at: float, kind: str, what: Any) -> None:
        heapq.heappush(self._heap, (at, next(self._sequence), kind, what))


def measure(config: BenchCoreConfig, num_programs: int, num_backends: int) -> list[EventCost]:
    """The rows of one size, in this process."""
    fleet = _Fleet(config, num_programs, num_backends)
    fleet.run(6 * num_programs)
    fleet.is_timed = True
    names = fleet.backends()
    for index in range(config.num_restarts):
        fleet.run(config.num_events // (2 * config.num_restarts))
        fleet.restart(names[index * 7 % len(names)])
    fleet.run(config.num_events // 4)
    fleet.update_weights(min(config.num_events // 20, num_programs))  # with more, only ticks would be left
    fleet.run(config.num_events // 5)
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        EventCost(
            programs=num_programs,
            backends=num_backends,
            event=event,
            count=len(costs),
            p50_us=round(quantile_us(costs, 0.5), 1),
            p99_us=round(quantile_us(costs, 0.99), 1),
            max_us=round(max(costs) * _MICROSECONDS, 1),
            rss_mb=round(rss_mb, 1),
        )
        for event, costs in sorted(fleet.costs.items())
    ]


def run_bench_core(config: BenchCoreConfig) -> list[EventCost]:
    """Measure every size in a process of its own; write `runs/bench/bench_core.json`."""
    context = multiprocessing.get_context("spawn")
    rows: list[EventCost] = []
    for num_programs, num_backends in config.sizes:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows += pool.submit(measure, config, num_programs, num_backends).result()
    write_json(config, "bench_core.json", [asdict(row) for row in rows])
    return rows


def print_core_table(rows: list[EventCost], console: Console | None = None) -> None:
    console = table_console(console, _TABLE_WIDTH)
    table = Table(title="thunder-rollout bench-core: CPU time of Scheduler.handle")
    for name in ("programs", "backends", "event", "count", "p50 us", "p99 us", "max us", "RSS MB"):
        table.add_column(name, justify="left" if name == "event" else "right")
    for _, same in itertools.groupby(rows, key=lambda row: (row.programs, row.backends)):
        for row in same:
            numbers = (row.count, row.p50_us, row.p99_us, row.max_us, row.rss_mb)
            table.add_row(str(row.programs), str(row.backends), row.event, *(f"{number:.0f}" for number in numbers))
        table.add_section()
    console.print(table)


def bench_core(config: BenchCoreConfig) -> None:
    """Everything, with its tables."""
    rows = run_bench_core(config)
    print_core_table(rows)
    if config.num_actor_turns:
        from thunder_rollout.bench.actor import run_actor

        console = Console()
        console.print("scheduler actor (Ray, hashing apart), wall time:")
        for name, value in asyncio.run(run_actor(config)).items():
            console.print(f"  {name}: {value:.0f}")


def quantile_us(seconds: list[float], share: float) -> float:
    return float(np.quantile(seconds, share)) * _MICROSECONDS


def write_json(config: BenchCoreConfig, name: str, what: Any) -> None:
    folder = Path(config.runs_dir) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(what, indent=2) + "\n")
