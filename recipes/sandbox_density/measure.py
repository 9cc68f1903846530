"""What a sandbox's commands cost, and what many busy sandboxes cost an engine beside them.

    python recipes/sandbox_density/measure.py commands --backend docker|local [--at-once 20]
    python recipes/sandbox_density/measure.py weights --backend docker|local [--busy 8] [--shares 1024 256 64]

`commands` times `echo` through a sandbox's channel, and as a new process that the engine (or `nsenter`) starts each
time. `weights` times the decoding of a real engine of one thread alone, and beside busy sandboxes under each weight.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.protocol import Engine, GenerateRequest, Sampling
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.docker import DockerSandbox
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.images import TOY_IMAGE
from thunder_rollout.sandbox.local import LocalSandbox
from thunder_rollout.sandbox.namespaces import exec_argv, inner_env
from thunder_rollout.sandbox.protocol import SandboxLimits, SandboxSpec
from thunder_rollout.sandbox.shell import EXEC_SCRIPT

SPEC = SandboxSpec(image=TOY_IMAGE, setup="mkdir -p /testbed", limits=SandboxLimits(memory_bytes=256 * 2**20))
COMMAND = "echo on"
NUM_COMMANDS = 40  # one after the other in one sandbox; a quarter each where many run at once
BUSY = "python3 -c 'while True: pass'"
NUM_TURNS, TURN_TOKENS, BATCH = 4, 200, 4

Run = Callable[[], Awaitable[None]]


async def commands(backend: str, at_once: int) -> None:
    host = SandboxHost(SandboxConfig(backend=backend), run=f"density-{os.getpid()}")
    await host.start([TOY_IMAGE])
    programs = [f"p{i}" for i in range(at_once)]
    try:
        began_s = time.monotonic()
        await host.prepare(programs[0], SPEC)
        one_s = time.monotonic() - began_s
        await asyncio.gather(*(host.prepare(program, SPEC) for program in programs))
        print(
            f"start: {one_s * 1000:.0f} ms alone, {(time.monotonic() - began_s) / at_once * 1000:.0f} ms each of many"
        )
        print(
            f"| {backend} | p50 ms | p95 ms | at once | p50 ms | p95 ms | commands/s |\n|---|---|---|---|---|---|---|"
        )
        ways = {"a new process each": lambda program: _new_process(host, program), "one channel": _channel(host)}
        for name, way in ways.items():
            alone, _ = await _timed([way(programs[0])], NUM_COMMANDS)
            many, per_s = await _timed([way(program) for program in programs], NUM_COMMANDS // 4)
            print(f"| {name} | {_row(alone)} | {at_once} | {_row(many)} | {per_s:.0f} |")
        began_s = time.monotonic()
        await host.release(programs[0])
        print(f"stop: {(time.monotonic() - began_s) * 1000:.0f} ms")
    finally:
        await host.stop()


def _channel(host: SandboxHost) -> Callable[[str], Run]:
    def of(program: str) -> Run:
        async def run() -> None:
            assert (await host.exec(program, COMMAND, timeout_s=60)).output == "on\n"

        return run

    return of


def _new_process(host: SandboxHost, program: str) -> Run:
    sandbox = host._slots[program].sandbox
    argv = ["bash", "--norc", "-c", EXEC_SCRIPT, "bash", "/testbed", COMMAND]

    async def in_container() -> None:
        assert isinstance(sandbox, DockerSandbox)
        container = await sandbox._engine.call(lambda: sandbox._engine.client.containers.get(sandbox._container))
        assert (await sandbox._engine.call(lambda: container.exec_run(argv))).output == b"on\n"

    async def in_namespaces() -> None:
        assert isinstance(sandbox, LocalSandbox)
        script = 'exec bash --norc -c "$1" bash "$2" "$3"'
        process = await asyncio.create_subprocess_exec(
            *exec_argv(sandbox._init_pid, script, procs_files=sandbox._procs_files()), "bash", *argv[3:4], *argv[5:],
            stdout=asyncio.subprocess.PIPE, env=inner_env(SPEC.limits),
        )  # fmt: skip
        output, _ = await process.communicate()
        assert output == b"on\n"

    return in_container if isinstance(sandbox, DockerSandbox) else in_namespaces


async def _timed(runs: list[Run], number: int) -> tuple[list[float], float]:
    """Seconds of each command, and commands a second."""
    took: list[float] = []

    async def repeat(run: Run, count: int) -> None:
        for _ in range(count):
            began_s = time.monotonic()
            await run()
            took.append(time.monotonic() - began_s)

    await asyncio.gather(*(repeat(run, 2) for run in runs))
    took.clear()
    began_s = time.monotonic()
    await asyncio.gather(*(repeat(run, number) for run in runs))
    return took, len(took) / (time.monotonic() - began_s)


def _row(took: list[float]) -> str:
    return f"{statistics.median(took) * 1000:.1f} | {statistics.quantiles(took, n=20)[-1] * 1000:.1f}"


async def weights(backend: str, busy: int, shares: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = write_preset("qwen2_3m", Path(folder))
        overrides = [f"engine.model={model.path}", "engine.max_model_len=4096"]
        config = to_typed(EngineConfig, compose_config("rollout", overrides).engine)
        os.environ.update(config.environment())
        from thunder_rollout.engine.factory import create_engine

        engine = create_engine(config)
        await engine.start()
        try:
            await _tokens_per_s(engine, "warm")
            print(f"| {busy} busy sandboxes ({backend}) | tokens/s | of alone | their CPUs |\n|---|---|---|---|")
            alone = await _tokens_per_s(engine, "alone")
            print(f"| none | {alone:.0f} | 1.00 | |", flush=True)
            for number in shares:
                rate, cpus = await _beside(engine, backend, busy, number)
                print(f"| cpu_shares={number} | {rate:.0f} | {rate / alone:.2f} | {cpus:.2f} |", flush=True)
        finally:
            await engine.stop()


async def _beside(engine: Engine, backend: str, busy: int, cpu_shares: int) -> tuple[float, float]:
    host = SandboxHost(SandboxConfig(backend=backend, cpu_shares=cpu_shares), run=f"density-{os.getpid()}")
    await host.start([TOY_IMAGE])
    programs = [f"p{i}" for i in range(busy)]
    try:
        await asyncio.gather(*(host.prepare(program, SPEC) for program in programs))
        await asyncio.gather(*(host.exec(program, f"{BUSY} &", timeout_s=60) for program in programs))
        await asyncio.sleep(2)
        before_s, began_s = await _cpu_s(host, programs), time.monotonic()
        rate = await _tokens_per_s(engine, f"beside{cpu_shares}")
        after_s, wall_s = await _cpu_s(host, programs), time.monotonic() - began_s
        return rate, (after_s - before_s) / wall_s
    finally:
        await host.stop()


async def _cpu_s(host: SandboxHost, programs: list[str]) -> float:
    """What the busy loops have had, as they see it themselves."""
    look = "cat /proc/[0-9]*/stat | grep '(python3)' | cut -d' ' -f14"
    seen = await asyncio.gather(*(host.exec(program, look, timeout_s=120) for program in programs))
    return sum(int(ticks) for one in seen for ticks in one.output.split()) / os.sysconf("SC_CLK_TCK")


async def _tokens_per_s(engine: Engine, name: str) -> float:
    """Of `BATCH` turns side by side, some times; the median."""
    rates = []
    for repeat in range(NUM_TURNS):
        began_s = time.monotonic()
        requests = [
            GenerateRequest(
                request_id=f"{name}-{repeat}-{i}",
                prompt_ids=[repeat * BATCH + i + 1] * 64,
                sampling=Sampling(max_tokens=TURN_TOKENS, temperature=1.0, ignore_eos=True),
                program=f"{name}-{i}",
            )
            for i in range(BATCH)
        ]
        done = await asyncio.gather(*(engine.generate(one) for one in requests))
        rates.append(sum(len(one.token_ids) for one in done) / (time.monotonic() - began_s))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("commands", "weights"))
    parser.add_argument("--backend", choices=("docker", "local"), required=True)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--busy", type=int, default=8)
    parser.add_argument("--shares", type=int, nargs="+", default=[1024, 256, 64])
    options = parser.parse_args()
    if options.what == "commands":
        asyncio.run(commands(options.backend, options.at_once))
    else:
        asyncio.run(weights(options.backend, options.busy, options.shares))


if __name__ == "__main__":
    main()
