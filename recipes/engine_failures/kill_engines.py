"""`kill -9` of engine processes, one after another, under load: does anything get lost, and how long does it last?

    python recipes/engine_failures/kill_engines.py [--kills 10] [--load 4] [bench overrides]

Scripted programs (those of `thunder-rollout bench`) run greedily on two real engines in a closed loop. Every second
kill takes the engine core alone, the others its whole actor. The next kill comes when throughput is back. At the end
every program finishes, every turn is checked token for token, and every `CHECK_EVERY`th is computed again, alone on an
engine. Exits with 1 where anything is lost or recovery takes longer than `RECOVER_WITHIN_S`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import ray

from thunder_rollout.bench.config import BenchConfig
from thunder_rollout.bench.workload import Position, mean_context_tokens, random_positions, script
from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.core.events import BackendDown, BackendUp, Event
from thunder_rollout.engine.protocol import GenerateRequest, Generation, Sampling
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.runtime.actor import RemoteScheduler, create_scheduler_actor
from thunder_rollout.runtime.client import ProgramClient
from thunder_rollout.runtime.cluster import start_ray
from thunder_rollout.runtime.fleet import EngineFleet

MODEL, WORKLOAD = "qwen2_3m", "short_tools"
WARMUP_S, BASELINE_S = 25.0, 30.0
WINDOW_S = 5.0  # throughput is that of the last so many seconds
RECOVERED = 0.8  # of the throughput before the first kill
RECOVER_WITHIN_S = 30.0  # of the restart
GIVE_UP_S = 120.0
CHECK_EVERY = 20
NEAR_TIE = 0.05  # nats: batches of another shape may order two tokens so close the other way

Piece = tuple[list[int], list[int]]  # what an engine was given, and what it said


class Listening(RemoteScheduler):
    """Notes when a backend's generation first went down and came up."""

    def __init__(self, handle: object) -> None:
        super().__init__(handle)
        self.down_at: dict[tuple[str, int], float] = {}
        self.up_at: dict[tuple[str, int], float] = {}

    async def post(self, event: Event) -> None:
        if isinstance(event, BackendDown):
            self.down_at.setdefault((event.backend, event.generation), time.monotonic())
        await super().post(event)
        if isinstance(event, BackendUp):
            self.up_at[event.backend, event.generation] = time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    number: int
    what: str
    found_s: float
    up_s: float
    recovered_s: float  # after it was up


class Overheard:
    """An engine of which is noted what it was given and what it said, by program, for `Record.add` to take."""

    def __init__(self, engine: RemoteEngine, heard: dict[str, list[Piece]]) -> None:
        self._engine = engine
        self._heard = heard

    async def generate(self, request: GenerateRequest) -> Generation:
        generation = await self._engine.generate(request)
        self._heard.setdefault(request.program, []).append((list(request.prompt_ids), list(generation.token_ids)))
        return generation


@dataclass(slots=True)
class Record:
    """`heard` is what engines were given and said in turns that have ended and were not added yet."""

    vocab_size: int
    heard: dict[str, list[Piece]] = field(default_factory=dict)
    contexts: dict[str, list[int]] = field(default_factory=dict)  # of programs: what engines were given and said
    ended_at: list[float] = field(default_factory=list)
    kept: list[tuple[list[int], Generation]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    num_programs: int = 0
    num_finished: int = 0

    def add(self, program: str, observation: list[int], asked: int, generation: Generation) -> None:
        """A turn is whole if the engine was given the turn before, token for token, and the observation, and said
        what the program was told, as much as was asked."""
        ids = generation.token_ids
        prompt = self.contexts.get(program, []) + observation
        self.contexts[program] = prompt + ids
        if not follows(prompt, self.heard.pop(program, []), ids):
            self.wrong.append(f"{program}: not the turn before and the observation, or not what the engine said")
        if generation.prompt_tokens != len(prompt) or len(ids) != asked or len(generation.logprobs) != asked:
            self.wrong.append(f"{program}: {generation.prompt_tokens}/{len(prompt)} tokens in, {len(ids)}/{asked} out")
        if not all(0 <= i < self.vocab_size for i in ids):
            self.wrong.append(f"{program}: ids outside the vocabulary")
        if len(self.ended_at) % CHECK_EVERY == 0:
            self.kept.append((list(prompt), generation))
        self.ended_at.append(time.monotonic())

    def per_s(self, since: float, until: float) -> float:
        return sum(since < at <= until for at in self.ended_at) / (until - since)


def follows(prompt: list[int], pieces: list[Piece], ids: list[int]) -> bool:
    """Whether engines were given `prompt` and said `ids`: in one piece, or each with those before it. A piece whose
    engine died as it was done is asked again, from the prompt."""
    context = prompt
    for given, said in pieces:
        context = prompt if given == prompt else context
        if given != context:
            return False
        context = context + said
    return context == prompt + ids


def same_speech(said: Generation, again: Generation) -> str:
    """`same`, `tie` (they part where two tokens are equally likely) or `different`."""
    for i, (a, b) in enumerate(zip(said.token_ids, again.token_ids, strict=True)):
        if a != b:
            return "tie" if math.isclose(said.logprobs[i], again.logprobs[i], abs_tol=NEAR_TIE) else "different"
    return "same"


async def main_async(config: BenchConfig, load: float, num_kills: int) -> int:
    start_ray(config.ray)
    with tempfile.TemporaryDirectory(prefix="thunder-kills-") as scratch:
        model = await asyncio.to_thread(write_preset, MODEL, Path(scratch) / MODEL)
        scheduler = Listening(create_scheduler_actor(config.scheduler, trace_path=None, hosts=[]))
        await scheduler.start()
        fleet = EngineFleet(replace(config.engine, model=str(model.path)), scheduler, prefix="kills", on_join=_nobody)
        try:
            await fleet.start(config.num_engines)
            await fleet.announce()
            supervising = asyncio.create_task(fleet.supervise(config.num_engines))
            bad = await _run(config, load, num_kills, scheduler, fleet, Record(model.vocab_size))
            supervising.cancel()
            await asyncio.gather(supervising, return_exceptions=True)
            return bad
        finally:
            await fleet.stop()
            fleet.shutdown()
            ray.shutdown()


async def _run(
    config: BenchConfig, load: float, num_kills: int, scheduler: Listening, fleet: EngineFleet, record: Record
) -> int:
    workload = config.workload[WORKLOAD]
    infos = [supervisor.info for supervisor in fleet.supervisors.values()]
    capacity = sum(info.capacity_tokens for info in infos)
    num_slots = max(1, round(load * capacity / mean_context_tokens(workload)))
    engines = {name: RemoteEngine(handle) for name, handle in fleet.handles.items()}
    overheard = {name: Overheard(engine, record.heard) for name, engine in engines.items()}
    draining = asyncio.Event()
    block_size = infos[0].block_size if config.scheduler.uses_block_hashes else None

    upcoming = itertools.count(num_slots)

    async def slot(position: Position) -> None:
        while not draining.is_set():
            await play(position)
            position = Position(next(upcoming), 0)

    async def play(position: Position) -> None:
        program = script(workload, position, seed=0, vocab_size=record.vocab_size)
        name, context = f"program{position.index}", list(program.context_ids)
        record.num_programs += 1
        record.contexts[name] = list(context)
        async with ProgramClient(name, scheduler, overheard, block_size=block_size) as client:
            for turn in program.turns:
                context += turn.new_ids
                sampling = Sampling(max_tokens=turn.output_tokens, temperature=0.0, ignore_eos=True)
                generation = (await client.turn(context, sampling)).generation
                record.add(name, list(turn.new_ids), turn.output_tokens, generation)
                context += generation.token_ids
                await client.tool_started(turn.tool)
                await asyncio.sleep(turn.tool_s)
                await client.tool_ended()
        record.num_finished += 1
        del record.contexts[name]

    async with asyncio.TaskGroup() as group:
        for position in random_positions(workload, seed=0, num_slots=num_slots):
            group.create_task(slot(position))
        await asyncio.sleep(WARMUP_S + BASELINE_S)
        now = time.monotonic()
        baseline = record.per_s(now - BASELINE_S, now)
        print(f"{num_slots} programs at load {load:g}: {60 * baseline:.0f} steps/min before the first kill", flush=True)
        print("| kill | process | found after s | up again after s | throughput back s after that |")
        print("|---|---|---|---|---|", flush=True)
        kills = [await _kill(number, scheduler, fleet, record, baseline) for number in range(num_kills)]
        draining.set()
    return await _judge(kills, record, engines["engine0"], scheduler)


async def _kill(number: int, scheduler: Listening, fleet: EngineFleet, record: Record, baseline: float) -> Kill:
    name = f"engine{number % len(fleet.handles)}"
    generation = fleet.supervisors[name].generation
    actor = psutil.Process(await fleet.handles[name].pid.remote())
    core = next(child for child in actor.children() if child.name().startswith("VLLM::"))
    what, victim = ("engine core", core) if number % 4 < 2 else ("actor", actor)
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    while (name, generation + 1) not in scheduler.up_at:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    up = scheduler.up_at[name, generation + 1]
    while record.per_s(time.monotonic() - WINDOW_S, time.monotonic()) < RECOVERED * baseline:
        await asyncio.sleep(0.2)
        if time.monotonic() - up > GIVE_UP_S:
            break
    kill = Kill(
        number=number,
        what=f"{what} of {name}",
        found_s=scheduler.down_at[name, generation] - killed,
        up_s=up - killed,
        recovered_s=max(0.0, time.monotonic() - up),
    )
    print(f"| {number + 1} | {kill.what} | {kill.found_s:.1f} | {kill.up_s:.1f} | {kill.recovered_s:.1f} |", flush=True)
    await asyncio.sleep(WINDOW_S)
    return kill


async def _judge(kills: list[Kill], record: Record, engine: RemoteEngine, scheduler: Listening) -> int:
    verdicts = [await _again(engine, number, *turn) for number, turn in enumerate(record.kept)]
    left = (await scheduler.metrics()).scheduler.num_programs
    counts = {verdict: verdicts.count(verdict) for verdict in ("same", "tie", "different")}
    print(f"\n{record.num_finished} of {record.num_programs} programs finished; {left} left in the scheduler")
    print(f"{len(record.ended_at)} turns, of which {len(record.wrong)} are not whole")
    print(f"{len(verdicts)} turns computed again: {counts}")
    slow = [kill for kill in kills if kill.recovered_s > RECOVER_WITHIN_S]
    for complaint in record.wrong[:20]:
        print(complaint)
    lost = record.num_finished != record.num_programs or left
    return int(bool(lost or record.wrong or counts["different"] or slow))


async def _again(engine: RemoteEngine, number: int, prompt: list[int], said: Generation) -> str:
    sampling = Sampling(max_tokens=len(said.token_ids), temperature=0.0, ignore_eos=True)
    again = await engine.generate(GenerateRequest(request_id=f"again{number}", prompt_ids=prompt, sampling=sampling))
    return same_speech(said, again)


async def _nobody(name: str, handle: object) -> None:
    """No worker needs to know."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--load", type=float, default=4.0)
    args, overrides = parser.parse_known_args()
    config = to_typed(BenchConfig, compose_config("bench", overrides))
    sys.exit(asyncio.run(main_async(config, args.load, args.kills)))


if __name__ == "__main__":
    main()
