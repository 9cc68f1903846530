"""Sandboxes in virtual time on a node whose starts share its CPU: up when their programs are granted, not long before.

A closed loop of programs, some of which run at once; each is replaced by the next one when it ends. The rest wait, and
a few more are announced.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count

import pytest

from thunder_rollout.core.config import CappedConfig, SchedulerConfig
from thunder_rollout.core.decisions import PrepareSandbox, ReleaseSandbox, Restore
from thunder_rollout.core.events import BackendUp, Event, ProgramAnnounced, ProgramEnded, SandboxReady, TurnRequested
from thunder_rollout.core.scheduler import Scheduler
from thunder_rollout.observe.sandbox_waits import SandboxWait, SandboxWaits, quantile

NUM_SLOTS, NUM_RUNNING, LIFE_S = 36, 8, 10.0
SLEEP_S, WORK_S = 2.0, 1.0  # of a start: waiting for something else, and of one CPU


class Node:
    """Starts that sleep, then work; `cores` are shared by those that work, one each at most."""

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self._now = 0.0
        self._sleeping: dict[str, float] = {}  # until
        self._left_s: dict[str, float] = {}  # of work

    def start(self, program: str) -> None:
        self._sleeping[program] = self._now + SLEEP_S

    def drop(self, program: str) -> None:
        self._sleeping.pop(program, None)
        self._left_s.pop(program, None)

    @property
    def next_s(self) -> float:
        worked_s = self._now + min(self._left_s.values(), default=math.inf) / self._speed
        return min(worked_s, *self._sleeping.values(), math.inf)

    def advance(self, now: float) -> list[str]:
        """To `now`, at most `next_s`; those that are ready."""
        self._left_s = {name: left_s - (now - self._now) * self._speed for name, left_s in self._left_s.items()}
        self._now = now
        ready = [name for name, left_s in self._left_s.items() if left_s < 1e-9]
        for name in [name for name, until_s in self._sleeping.items() if until_s <= now]:
            del self._sleeping[name]
            self._left_s[name] = WORK_S
        for name in ready:
            del self._left_s[name]
        return ready

    @property
    def _speed(self) -> float:
        return min(1.0, self.cores / max(1, len(self._left_s)))


class Loop:
    """Programs of one turn each, that lasts until their end; they live `life_s` from when their sandbox is ready."""

    def __init__(self, cores: float, life_s: Callable[[random.Random], float], *, prepare_ahead: int = 64) -> None:
        capped = CappedConfig(max_programs=NUM_RUNNING)
        self._scheduler = Scheduler(SchedulerConfig(policy="capped", capped=capped, prepare_ahead=prepare_ahead))
        self.node = Node(cores)
        self._now = 0.0
        self._life_s = partial(life_s, random.Random(0))
        self._waits = SandboxWaits()
        self._ends: list[tuple[float, str]] = []
        self._halves: Counter[str] = Counter()  # a program that has both its grant and its sandbox has two
        self._asking, self._announced = count(), count(NUM_SLOTS)
        self._send(BackendUp(backend="a", generation=1, capacity_tokens=10_000, max_running=NUM_RUNNING))
        for _ in range(prepare_ahead):
            self._announce()
        for _ in range(NUM_SLOTS):
            self._ask()

    def run(self, until_s: float) -> list[SandboxWait]:
        """Of every program that was granted its turn and has its sandbox."""
        while (now := min(self.node.next_s, *(at_s for at_s, _ in self._ends[:1]), math.inf)) < until_s:
            self._now = now
            for name in self.node.advance(now):
                self._send(SandboxReady(program=name))
                self._have(name)
            while self._ends and self._ends[0][0] <= now:
                self._send(ProgramEnded(program=heapq.heappop(self._ends)[1]))
                self._announce()
                self._ask()
        return list(self._waits.waits)

    def _announce(self) -> None:
        self._send(ProgramAnnounced(program=f"p{next(self._announced)}", task_kind="toy"))

    def _ask(self) -> None:
        name = f"p{next(self._asking)}"
        self._send(TurnRequested(program=name, request=name, prompt_tokens=9, sandbox=True, task_kind="toy"))

    def _send(self, event: Event) -> None:
        decisions = self._scheduler.handle(event, self._now)
        self._waits.observe(event, decisions, self._now)
        for decision in decisions:
            match decision:
                case PrepareSandbox(program=name):
                    self.node.start(name)
                case ReleaseSandbox(program=name):
                    self.node.drop(name)
                case Restore(program=name):
                    self._have(name)

    def _have(self, name: str) -> None:
        self._halves[name] += 1
        if self._halves[name] == 2:
            heapq.heappush(self._ends, (self._now + self._life_s(), name))


def even(rng: random.Random) -> float:
    return rng.uniform(0.5, 1.5) * LIFE_S


def in_waves(rng: random.Random) -> float:
    return rng.choice([0.5, 1.0, 1.5]) * LIFE_S


def at_random(rng: random.Random) -> float:
    return rng.expovariate(1 / LIFE_S)


def p95_and_idle(waits: list[SandboxWait], since_s: float, until_s: float) -> tuple[float, float]:
    """The wait that 95% of those granted in between don't exceed, and how long sandboxes stood ready before; in s."""
    window = [wait for wait in waits if since_s <= wait.granted_s < until_s]
    return quantile([wait.wait_s for wait in window], 0.95), sum(wait.idle_s for wait in window) / len(window)


@pytest.mark.parametrize(("life_s", "num_starts"), [(even, 1.5), (in_waves, 1.5), (at_random, 2.1)])
@pytest.mark.parametrize("cores", [2.0, 8.0])
def test_hardly_anyone_waits_and_sandboxes_stand_ready_for_a_start_or_two(
    cores: float, life_s: Callable[[random.Random], float], num_starts: float
) -> None:
    p95_s, idle_s = p95_and_idle(Loop(cores, life_s).run(600.0), 150.0, 600.0)
    assert p95_s <= 0.1 * (SLEEP_S + WORK_S)
    assert idle_s < num_starts * (SLEEP_S + WORK_S)


def test_started_by_their_grants_everyone_waits_for_all_of_a_start() -> None:
    waits = Loop(8.0, even, prepare_ahead=0).run(300.0)
    assert min(wait.wait_s for wait in waits) == pytest.approx(SLEEP_S + WORK_S)
    assert {wait.idle_s for wait in waits} == {0.0}


def test_many_starts_at_once_in_the_beginning_are_no_reason_to_prepare_for_as_many() -> None:
    _, idle_s = p95_and_idle(Loop(1.0, even).run(150.0), 60.0, 150.0)
    assert idle_s < 8.0


def test_after_a_time_of_slow_starts_things_are_as_before() -> None:
    loop = Loop(2.0, even)
    loop.run(200.0)
    loop.node.cores = 0.5
    loop.run(260.0)
    loop.node.cores = 2.0
    p95_s, idle_s = p95_and_idle(loop.run(800.0), 500.0, 800.0)
    assert p95_s == 0.0
    assert idle_s < 1.5 * (SLEEP_S + WORK_S)
