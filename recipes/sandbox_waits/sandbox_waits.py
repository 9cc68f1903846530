"""How long do programs wait for their sandboxes after their KV was granted?

    python recipes/sandbox_waits/sandbox_waits.py [--load 4] [--setup-s 2] [--backend local] [bench overrides]

Scripted programs (those of `thunder-rollout bench`) run on two real engines in a closed loop, with `--load` times as
many as their KV holds. Each acts in a sandbox of its own, in which its tools are commands; its set-up sleeps
for `--setup-s`. Once with sandboxes started by the grant that needs them (scheduler.prepare_ahead=0), once
with those prepared in restore order. The scheduler's trace tells the waits. Exits with 1 where, prepared, their
p95 is over `MOST_OF_SETUP` of a start and over `LEAST_S`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray

from thunder_rollout.bench.config import BenchConfig
from thunder_rollout.bench.workload import Position, mean_context_tokens, random_positions, script
from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.core.decisions import Decision
from thunder_rollout.core.events import Event, TurnRequested
from thunder_rollout.engine.protocol import Sampling
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.observe.sandbox_waits import SandboxWait, SandboxWaits, quantile
from thunder_rollout.observe.trace import read_trace
from thunder_rollout.runtime.actor import RemoteScheduler, create_scheduler_actor
from thunder_rollout.runtime.client import ProgramClient
from thunder_rollout.runtime.cluster import start_ray
from thunder_rollout.runtime.fleet import EngineFleet
from thunder_rollout.sandbox.actor import create_sandbox_fleet
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.images import TOY_IMAGE
from thunder_rollout.sandbox.protocol import SandboxLimits, SandboxSpec
from thunder_rollout.sandbox.remote import RemoteSandboxHosts

MODEL, WORKLOAD = "qwen2_3m", "short_tools"
# Short lives on small pools: new programs come behind all that wait, so one life has to pass before it is their turn.
SMALL = ["workload.short_tools.num_turns=10", "engine.kv_cache_tokens=12288", "engine.max_model_len=12288"]
MOST_OF_SETUP, LEAST_S = 0.10, 0.1
TOOL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Of the grants in the measured window; times in seconds."""

    mode: str
    num_programs: int
    start_s: float  # mean
    wait_p50_s: float
    wait_p95_s: float
    wait_max_s: float
    idle_s: float  # mean
    stood_p95_s: float  # that a program's first command waited
    steps_per_min: float

    @property
    def is_met(self) -> bool:
        return self.wait_p95_s <= max(MOST_OF_SETUP * self.start_s, LEAST_S)


@dataclass(slots=True)
class Record:
    """`began_at` is when the measured window began, on this process's clock."""

    began_at: float = float("inf")
    num_turns: int = 0
    stood_s: list[float] = field(default_factory=list)

    def turn_ended(self) -> None:
        self.num_turns += time.monotonic() >= self.began_at

    def stood(self, since: float) -> None:
        if since >= self.began_at:
            self.stood_s.append(time.monotonic() - since)


def waits_of(entries: Iterable[tuple[float, Event, list[Decision]]], since_s: float) -> list[SandboxWait]:
    waits = SandboxWaits()
    for now, event, decisions in entries:
        waits.observe(event, decisions, now)
    return [wait for wait in waits.waits if wait.granted_s >= since_s]


def row_of(mode: str, waits: list[SandboxWait], record: Record, *, window_s: float) -> Row:
    seconds = [wait.wait_s for wait in waits]
    starts = [wait.took_s for wait in waits if wait.took_s is not None]
    return Row(
        mode=mode,
        num_programs=len(waits),
        start_s=sum(starts) / max(1, len(starts)),
        wait_p50_s=quantile(seconds, 0.5),
        wait_p95_s=quantile(seconds, 0.95),
        wait_max_s=max(seconds, default=0.0),
        idle_s=sum(wait.idle_s for wait in waits) / max(1, len(waits)),
        stood_p95_s=quantile(record.stood_s, 0.95),
        steps_per_min=60 * record.num_turns / window_s,
    )


def table(rows: Iterable[Row]) -> str:
    columns = [
        "sandboxes are started",
        "programs",
        "a start takes s",
        "wait p50 s",
        "p95 s",
        "max s",
        "ready before the grant s",
        "first command waits p95 s",
        "steps/min",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [
        f"| {row.mode} | {row.num_programs} | {row.start_s:.2f} | {row.wait_p50_s:.2f} | {row.wait_p95_s:.2f} "
        f"| {row.wait_max_s:.2f} | {row.idle_s:.1f} | {row.stood_p95_s:.2f} | {row.steps_per_min:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shells:
    """What a run has on Ray."""

    scheduler: RemoteScheduler
    engines: dict[str, RemoteEngine]
    hosts: RemoteSandboxHosts
    vocab_size: int
    capacity_tokens: int
    block_size: int | None


@asynccontextmanager
async def shells(config: BenchConfig, sandbox: SandboxConfig, folder: Path) -> AsyncIterator[Shells]:
    start_ray(config.ray)
    model = await asyncio.to_thread(write_preset, MODEL, folder / MODEL)
    handles = create_sandbox_fleet(sandbox, run=f"waits-{os.getpid()}", owner_pid=os.getpid())
    hosts = RemoteSandboxHosts(handles)
    trace = (folder / "trace.jsonl").resolve()
    scheduler = RemoteScheduler(create_scheduler_actor(config.scheduler, trace_path=trace, hosts=handles))
    fleet = EngineFleet(replace(config.engine, model=str(model.path)), scheduler, prefix="waits", on_join=_nobody)
    try:
        await asyncio.gather(scheduler.start(), hosts.start([TOY_IMAGE]), fleet.start(config.num_engines))
        await fleet.announce()
        infos = [supervisor.info for supervisor in fleet.supervisors.values()]
        yield Shells(
            scheduler=scheduler,
            engines={name: RemoteEngine(handle) for name, handle in fleet.handles.items()},
            hosts=hosts,
            vocab_size=model.vocab_size,
            capacity_tokens=sum(info.capacity_tokens for info in infos),
            block_size=infos[0].block_size if config.scheduler.uses_block_hashes else None,
        )
    finally:
        await asyncio.gather(hosts.stop(), scheduler.stop(), fleet.stop(), return_exceptions=True)
        fleet.shutdown()
        ray.shutdown()


async def run(config: BenchConfig, mode: str, args: argparse.Namespace) -> Row:
    sandbox = SandboxConfig(backend=args.backend, max_starts=args.max_starts)
    record = Record()
    with tempfile.TemporaryDirectory(prefix="thunder-waits-") as scratch:
        async with shells(config, sandbox, Path(scratch)) as shell:
            num_slots = max(
                1, round(args.load * shell.capacity_tokens / mean_context_tokens(config.workload[WORKLOAD]))
            )
            print(f"{mode}: {num_slots} programs at load {args.load:g}", flush=True)
            slots = asyncio.create_task(_play_all(config, shell, record, num_slots, args.setup_s))
            await asyncio.wait([slots], timeout=args.warmup_s)
            record.began_at = time.monotonic()
            warm_s = (await shell.scheduler.metrics()).time_s
            await asyncio.wait([slots], timeout=args.measure_s)
            window_s = time.monotonic() - record.began_at
            if slots.done():
                slots.result()
            slots.cancel()
            await asyncio.gather(slots, return_exceptions=True)
        entries = read_trace(Path(scratch) / "trace.jsonl")
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(scratch) / "trace.jsonl", args.keep / f"{mode.replace(' ', '_')}.jsonl")
    began_s = next(now for now, event, _ in entries if isinstance(event, TurnRequested))
    return row_of(mode, waits_of(entries, began_s + warm_s), record, window_s=window_s)


async def _play_all(config: BenchConfig, shell: Shells, record: Record, num_slots: int, setup_s: float) -> None:
    upcoming = itertools.count(num_slots)
    unannounced = itertools.count(num_slots)

    async def announce(num_programs: int) -> None:
        """As the driver does: the scheduler knows so many programs that have no slot yet."""
        for index in itertools.islice(unannounced, num_programs):
            spec = sandbox_spec(f"program{index}", setup_s)
            await shell.scheduler.announce(f"program{index}", task_kind="toy", sandbox=spec)

    async def slot(position: Position) -> None:
        while True:
            await _play(config, shell, record, position, setup_s)
            position = Position(next(upcoming), 0)
            await announce(min(1, config.scheduler.prepare_ahead))

    await announce(config.scheduler.prepare_ahead)
    async with asyncio.TaskGroup() as group:
        for position in random_positions(config.workload[WORKLOAD], seed=0, num_slots=num_slots):
            group.create_task(slot(position))


async def _play(config: BenchConfig, shell: Shells, record: Record, position: Position, setup_s: float) -> None:
    program = script(config.workload[WORKLOAD], position, seed=0, vocab_size=shell.vocab_size)
    name, context = f"program{position.index}", list(program.context_ids)
    spec = sandbox_spec(name, setup_s)
    box = shell.hosts.sandbox(name, spec)
    started = False
    client = ProgramClient(
        name, shell.scheduler, shell.engines, task_kind="toy", sandbox=spec, block_size=shell.block_size
    )
    async with client:
        for turn in program.turns:
            context += turn.new_ids
            sampling = Sampling(max_tokens=turn.output_tokens, temperature=0.0, ignore_eos=True)
            context += (await client.turn(context, sampling)).generation.token_ids
            record.turn_ended()
            await client.tool_started(turn.tool)
            if not started:
                since = time.monotonic()
                await box.start()
                record.stood(since)
                started = True
            await box.exec(f"sleep {turn.tool_s:.3f}", timeout_s=TOOL_TIMEOUT_S)
            await client.tool_ended()


def sandbox_spec(program: str, setup_s: float) -> SandboxSpec:
    """Sleeps, as an install does that waits for a disk or a network: on two cores, work would take the engines'."""
    return SandboxSpec(
        image=TOY_IMAGE,
        files={"/testbed/a.py": b"x = 1\n"},
        setup=f"sleep {setup_s:g}",
        limits=SandboxLimits(memory_bytes=256 * 2**20, disk_bytes=16 * 2**20, pids=64),
        labels={"program": program},
    )


async def _nobody(name: str, handle: object) -> None:
    """No worker needs to know."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, default=4.0)
    parser.add_argument("--setup-s", type=float, default=2.0)
    parser.add_argument("--backend", default="local")
    parser.add_argument("--max-starts", type=int, default=16)
    parser.add_argument("--warmup-s", type=float, default=60.0)
    parser.add_argument("--measure-s", type=float, default=90.0)
    parser.add_argument("--only", choices=["by the grant", "ahead of it"])
    parser.add_argument("--keep", type=Path, help="folder for the traces")
    args, overrides = parser.parse_known_args()
    config = to_typed(BenchConfig, compose_config("bench", [*SMALL, *overrides]))
    modes = {"by the grant": 0, "ahead of it": config.scheduler.prepare_ahead}
    rows = [
        asyncio.run(run(replace(config, scheduler=replace(config.scheduler, prepare_ahead=most)), mode, args))
        for mode, most in modes.items()
        if args.only in (None, mode)
    ]
    print(table(rows))
    return int(not all(row.is_met for row in rows if row.mode == "ahead of it"))


if __name__ == "__main__":
    sys.exit(main())
