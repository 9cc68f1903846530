"""The discrete-event loop: programs, engines and the real `core.Scheduler` in virtual time.

Contract: what happens to a scheduler here is what `runtime` does to it, in the same order: a turn is
requested, granted, run and ended; then its tool starts and ends, then the next turn is requested.
`Restore` sends the turn to its engine, `Pause` changes nothing there unless the engine releases (it
keeps or evicts by itself), `Reject` and `Expire` end the program. As in the live system nobody reports starts,
progress or engine stats. Equal arguments give equal results, whatever the machine.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import Expire, Pause, Reject, Restore
from thunder_rollout.core.events import BackendUp, Event, ProgramEnded, Tick, ToolEnded, ToolStarted, TurnEnded
from thunder_rollout.core.policies.base import Policy
from thunder_rollout.core.scheduler import Scheduler
from thunder_rollout.errors import ConfigError, ThunderError
from thunder_rollout.sim.clairvoyant import Foresight
from thunder_rollout.sim.engine import NEVER, RunEngine, SimEngine, SimTurn
from thunder_rollout.sim.host_tier import HostTier
from thunder_rollout.sim.measure import Recorder, SimResult
from thunder_rollout.sim.profiles import EngineProfile
from thunder_rollout.sim.program import SimProgram
from thunder_rollout.sim.workloads import Script, Workload

MAX_IDLE_TICKS = 10_000  # with no turn, tool or start under way: nobody will ever move again


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Warm-up and measurement: by virtual time if `measure_s` is set, else by ended turns; the first
    programs start somewhere in their lives, as in a steady state. With `num_programs` a fixed set of
    programs is run from its beginning to its end and all of it is measured."""

    warmup_turns: int = 0
    measure_turns: int = 0
    warmup_s: float = 0.0
    measure_s: float | None = None
    num_programs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One simulation: `num_slots` programs at once, each replaced when it ends."""

    workload: Workload
    profile: EngineProfile
    scheduler: SchedulerConfig
    window: Window
    num_backends: int
    num_slots: int
    seed: int = 0


class _Kind(IntEnum):
    ENGINE = 0
    START = 1
    SUBMIT = 2
    TOOL_ENDED = 3
    TICK = 4
    SAMPLE = 5
    OPEN = 6
    CLOSE = 7


class Simulation:
    """One run of a `Setup`. `policy` replaces the one its scheduler config names; `foresight` is
    told what comes, and with it a paused program's blocks are dropped at once (for the bounds). Where the
    scheduler expects `silent_ends` it hears of turns alone: of no tool, no cache hit and no program's end."""

    def __init__(
        self,
        setup: Setup,
        *,
        policy: Policy | None = None,
        foresight: Foresight | None = None,
        make_engine: Callable[[EngineProfile], SimEngine] | None = None,
    ) -> None:
        profile = setup.profile
        self._setup = setup
        self._foresight = foresight
        self._scheduler = Scheduler(setup.scheduler, policy)
        self._silent = setup.scheduler.adaptive.silent_ends
        make = make_engine or _make_engine
        self._engines = [make(profile) for _ in range(setup.num_backends)]
        self._names = [f"e{number:04d}" for number in range(setup.num_backends)]
        self._number_of = {name: number for number, name in enumerate(self._names)}
        self._due = [NEVER] * setup.num_backends
        self._programs: dict[str, SimProgram] = {}
        self._requests: dict[str, SimProgram] = {}  # open, by request
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, _Kind, object]] = []
        self._sequence = itertools.count()
        self._recorder = Recorder(profile.shape.capacity_tokens * setup.num_backends)
        self._now = 0.0
        self._num_ended = 0
        self._num_under_way = 0  # events on the heap that are not the clock's own
        self._num_idle_ticks = 0
        self._done = False

    def run(self) -> SimResult:
        setup = self._setup
        capacity = setup.profile.shape.capacity_tokens
        for name in self._names:
            self._handle(
                BackendUp(
                    backend=name,
                    generation=0,
                    capacity_tokens=capacity,
                    max_running=setup.profile.max_running,
                    offload_tokens=setup.profile.host_tokens,
                    releases=setup.profile.release_on_pause,
                )
            )
        for slot in range(setup.num_slots):
            self._push(0.0, _Kind.START, slot)
        self._push(setup.scheduler.tick_s, _Kind.TICK, None)
        self._push(self._recorder.interval_s, _Kind.SAMPLE, None)
        self._schedule_window()
        while not self._done:
            time, _, kind, what = heapq.heappop(self._heap)
            self._now = time
            self._happen(kind, what)
        return self._recorder.result(
            num_preemptions=sum(engine.num_preemptions for engine in self._engines),
            makespan_s=self._now if setup.window.num_programs is not None else None,
        )

    def _schedule_window(self) -> None:
        window = self._setup.window
        if window.num_programs is not None or (window.measure_s is None and window.warmup_turns == 0):
            self._recorder.open(0.0)
        elif window.measure_s is not None:
            self._push(window.warmup_s, _Kind.OPEN, None)
            self._push(window.warmup_s + window.measure_s, _Kind.CLOSE, None)

    def _happen(self, kind: _Kind, what: object) -> None:
        if kind not in (_Kind.TICK, _Kind.SAMPLE, _Kind.OPEN, _Kind.CLOSE):
            self._num_under_way -= 1
            self._num_idle_ticks = 0
        match kind, what:
            case _Kind.ENGINE, int(number):
                self._advance(number)
            case _Kind.START, int(slot):
                self._start(slot)
            case _Kind.SUBMIT, (SimTurn() as turn, int(number)):
                self._submit(turn, number)
            case _Kind.TOOL_ENDED, SimProgram() as program:
                self._tool_ended(program)
            case _Kind.TICK, _:
                self._tick()
            case _Kind.SAMPLE, _:
                capacity = self._setup.profile.shape.capacity_tokens
                self._recorder.add_usage(self._now, [engine.used_tokens / capacity for engine in self._engines])
                self._push(self._now + self._recorder.interval_s, _Kind.SAMPLE, None)
            case _Kind.OPEN, _:
                self._recorder.open(self._now)
            case _:
                self._close()

    # Programs

    def _start(self, slot: int) -> None:
        """The slot's next program, if there is one."""
        setup = self._setup
        number = next(self._numbers)
        if setup.window.num_programs is not None and number >= setup.window.num_programs:
            if not self._programs:
                self._close()
            return
        script = self._trimmed(setup.workload.script(number, setup.seed))
        if number < setup.num_slots and setup.window.num_programs is None:
            rng = random.Random(f"{setup.workload.name}/{setup.seed}/age {number}")
            script = script.aged(rng.randrange(len(script.turns)))
        hashes = setup.scheduler.uses_block_hashes
        program = SimProgram(f"p{number}", slot, script, setup.profile.block_size, hashes=hashes)
        self._programs[program.name] = program
        self._request(program)

    def _trimmed(self, script: Script) -> Script:
        """What an agent loop does: it stops before a turn that would pass the longest context."""
        limit = self._setup.profile.longest_context_tokens
        if script.longest_context_tokens < limit:
            return script
        contexts = itertools.accumulate(turn.new_tokens + turn.output_tokens for turn in script.turns)
        number = sum(context < limit for context in contexts)
        if number == 0:
            raise ConfigError(
                f"workloads: {self._setup.workload.name}: a first turn takes "
                f"{script.turns[0].new_tokens + script.turns[0].output_tokens} tokens, more than "
                f"sim_engine.name={self._setup.profile.name} bears ({limit}); choose a larger engine"
            )
        return script.first(number)

    def _request(self, program: SimProgram) -> None:
        event = program.request(self._now)
        if self._foresight is not None:
            self._foresight.contexts[program.name] = program.contexts_to_come()
            self._foresight.shared[program.name] = program.script.shared
        self._requests[event.request] = program
        self._handle(event)

    def _tool_ended(self, program: SimProgram) -> None:
        if program.name not in self._programs:
            return
        self._end_hold(program)
        if not self._silent:
            self._handle(ToolEnded(program=program.name))
        if program.is_over:
            self._end(program)
        else:
            self._request(program)

    def _end(self, program: SimProgram, *, known: bool = True) -> None:
        del self._programs[program.name]
        if self._foresight is not None:
            self._foresight.forget(program.name)
            if program.engine_number is not None:
                self._engines[program.engine_number].drop(program.name)
        elif self._setup.profile.release_on_pause and program.engine_number is not None:
            self._engines[program.engine_number].release(program.name)
        if known and not self._silent:
            self._handle(ProgramEnded(program=program.name))
        self._push(self._now, _Kind.START, program.slot)

    def _end_hold(self, program: SimProgram) -> None:
        if program.held_since is not None:
            self._recorder.add_hold(program.context_tokens, self._now - program.held_since)
            program.held_since = None

    # Engines

    def _submit(self, turn: SimTurn, number: int) -> None:
        self._engines[number].add(turn, self._now)
        self._watch(number)

    def _advance(self, number: int) -> None:
        engine = self._engines[number]
        if engine.ends_at != self._now:
            return  # it was given something else to do since
        ended = engine.advance()
        self._due[number] = NEVER
        for turn in ended:
            if turn.program in self._programs:
                self._turn_ended(self._programs[turn.program], turn)
        self._watch(number)

    def _watch(self, number: int) -> None:
        ends_at = self._engines[number].ends_at
        if ends_at != self._due[number] and ends_at != NEVER:
            self._due[number] = ends_at
            self._push(ends_at, _Kind.ENGINE, number)

    def _turn_ended(self, program: SimProgram, turn: SimTurn) -> None:
        now = self._now
        self._recorder.add_turn(
            turn, requested_at=program.requested_at, previous_context_tokens=program.context_tokens, now=now
        )
        tool, tool_s = program.end_turn(turn, now)
        if self._foresight is not None:
            self._foresight.returns_at[program.name] = now + tool_s
            self._foresight.contexts[program.name] = program.contexts_to_come() or [0]
        self._handle(
            TurnEnded(
                program=program.name,
                grant=turn.grant,
                output_tokens=turn.output_tokens,
                cached_tokens=None if self._silent else turn.cached_tokens,
            )
        )
        if not self._silent:
            self._handle(ToolStarted(program=program.name, tool=tool))
        self._push(now + tool_s, _Kind.TOOL_ENDED, program)
        self._count_turn()

    def _count_turn(self) -> None:
        self._num_ended += 1
        window = self._setup.window
        if window.num_programs is not None or window.measure_s is not None:
            return
        if self._num_ended == window.warmup_turns:
            self._recorder.open(self._now)
        elif self._num_ended >= window.warmup_turns + window.measure_turns:
            self._close()

    def _close(self) -> None:
        self._recorder.close(self._now)
        self._done = True

    # The scheduler

    def _handle(self, event: Event) -> None:
        for decision in self._scheduler.handle(event, self._now):
            match decision:
                case Restore(request=str(request), grant=int(grant), backend=backend):
                    self._granted(self._requests.pop(request), grant, self._number_of[backend])
                case Pause(program=name, backend=backend):
                    self._paused(name, backend)
                case Reject(request=request):
                    program = self._requests.pop(request)
                    self._recorder.num_rejected += 1
                    self._end(program, known=program.num_turns_ended > 0)
                case Expire(program=name):
                    self._expired(self._programs[name])
                case _:
                    pass

    def _expired(self, program: SimProgram) -> None:
        """Its turn in flight, if any, runs on without it."""
        self._requests.pop(program.request_name, None)
        self._end(program, known=False)

    def _granted(self, program: SimProgram, grant: int, number: int) -> None:
        turn = program.turn(grant)
        program.engine_number = number
        overhead_s = self._setup.profile.turn_overhead_s
        if overhead_s:
            self._push(self._now + overhead_s, _Kind.SUBMIT, (turn, number))
        else:
            self._submit(turn, number)

    def _paused(self, name: str, backend: str) -> None:
        self._recorder.num_pauses += 1
        program = self._programs.get(name)
        if program is None:  # it ended without a word
            return
        self._end_hold(program)
        if self._foresight is not None:
            self._engines[self._number_of[backend]].drop(name)
        elif self._setup.profile.release_on_pause:
            self._engines[self._number_of[backend]].release(name)

    def _tick(self) -> None:
        self._handle(Tick())
        self._push(self._now + self._setup.scheduler.tick_s, _Kind.TICK, None)
        if self._num_under_way:
            return
        self._num_idle_ticks += 1
        if self._num_idle_ticks > MAX_IDLE_TICKS:
            raise ThunderError(
                f"scheduler.policy={self._setup.scheduler.policy}: {len(self._requests)} requests wait and nothing "
                f"has happened for {MAX_IDLE_TICKS} ticks; the policy leaves them for ever"
            )

    def _push(self, time: float, kind: _Kind, what: object) -> None:
        assert math.isfinite(time)
        if kind not in (_Kind.TICK, _Kind.SAMPLE, _Kind.OPEN, _Kind.CLOSE):
            self._num_under_way += 1
        heapq.heappush(self._heap, (time, next(self._sequence), kind, what))


def _make_engine(profile: EngineProfile) -> RunEngine:
    host = HostTier(profile.host_tokens // profile.block_size) if profile.host_tokens else None
    return RunEngine(profile.shape, profile.timing, host, load_token_s=profile.load_token_s)
