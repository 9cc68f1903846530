"""Weight updates of engines under load, in virtual time: nothing lost, every token's weights known."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine_contract import CONFIG, new_prompt, run
from thunder_rollout.agent.loop import TurnResult
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.events import BackendDown, BackendUp, Event, WeightsUpdated, WeightsUpdating
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.protocol import Engine, Sampling
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.engine.weights import FolderWeights, MemoryWeights, UpdateMode, WeightSource
from thunder_rollout.errors import EngineDied, Stale, WeightsRefused
from thunder_rollout.runtime.client import LocalScheduler, ProgramClient
from thunder_rollout.runtime.service import SchedulerService
from thunder_rollout.runtime.weights import Weights, WeightsFolder, update_weights

WEIGHTS = MemoryWeights(shapes={}, buckets=())  # an engine without a model knows them by their version
OUTPUT_TOKENS = 120


class Scheduler(LocalScheduler):
    """Notes what it is told."""

    def __init__(self, service: SchedulerService) -> None:
        super().__init__(service)
        self.events: list[Event] = []

    async def post(self, event: Event) -> None:
        self.events.append(event)
        await super().post(event)


@dataclass
class Shell:
    service: SchedulerService
    scheduler: Scheduler
    engines: dict[str, Engine]

    def up(self, name: str, generation: int) -> None:
        self.service.handle(BackendUp(backend=name, generation=generation, capacity_tokens=4096, max_running=16))

    def client(self, name: str, mode: UpdateMode) -> ProgramClient:
        keep = mode is not UpdateMode.CUT
        return ProgramClient(name, self.scheduler, self.engines, block_size=32, keep_cut_output=keep)


def with_shell(test: Callable[[Shell], Awaitable[None]], config: SchedulerConfig | None = None) -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        service = SchedulerService(config or SchedulerConfig(tick_s=0.5), clock=clock)
        shell = Shell(service, Scheduler(service), {name: FakeEngine(CONFIG, update_s=0.5) for name in ("e0", "e1")})
        for name, engine in shell.engines.items():
            await engine.start()
            shell.up(name, 0)
        await service.start()
        try:
            await test(shell)
        finally:
            await service.stop()
            for engine in shell.engines.values():
                await engine.stop()

    run_in_virtual_time(main())


async def serving(shell: Shell, batch: int | None = None) -> Weights:
    weights = Weights(mode=UpdateMode.KEEP, batch=batch)
    for name, engine in shell.engines.items():
        async with weights.load_into(name, engine):
            pass  # it is up already
    return weights


async def play(client: ProgramClient, num_turns: int) -> list[tuple[list[int], TurnResult]]:
    """Each turn's prompt and result."""
    context, turns = new_prompt(200), []
    async with client:
        for _ in range(num_turns):
            result = await client.turn(list(context), Sampling(max_tokens=OUTPUT_TOKENS, ignore_eos=True))
            turns.append((list(context), result))
            context += result.generation.token_ids + new_prompt(20)
            await asyncio.sleep(0.05)
    return turns


async def said(version: str, context: list[int], num_tokens: int) -> list[int]:
    """What an engine of that version says to a context."""
    engine = FakeEngine(CONFIG)
    await engine.start()
    await engine.update_weights(WEIGHTS, version=version, mode=UpdateMode.CUT)
    generation = await run(engine, context, max_tokens=num_tokens)
    await engine.stop()
    return generation.token_ids


async def check_versions(turns: list[tuple[list[int], TurnResult]]) -> None:
    """Each segment is what its version says to the prompt and the segments before."""
    for prompt, result in turns:
        generation, context = result.generation, list(prompt)
        assert len(generation.token_ids) == len(generation.logprobs) == OUTPUT_TOKENS
        assert sum(segment.num_tokens for segment in result.weights) == OUTPUT_TOKENS
        assert generation.weight_version == result.weights[-1].version
        for segment in result.weights:
            start = len(context) - len(prompt)
            tokens = generation.token_ids[start : start + segment.num_tokens]
            assert tokens == await said(segment.version, context, segment.num_tokens)
            context += tokens


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("mode", list(UpdateMode))
def test_no_turn_is_lost_and_every_token_has_its_weights(mode: UpdateMode, batch: int | None) -> None:
    async def test(shell: Shell) -> None:
        programs = [asyncio.create_task(play(shell.client(f"p{n}", mode), 6)) for n in range(20)]
        for version in ("1", "2"):
            await asyncio.sleep(0.7)
            report = await update_weights(
                shell.scheduler, shell.engines, WEIGHTS, version=version, mode=mode, batch=batch
            )
            assert report.died == ()
            assert report.duration_s >= (0.5 if batch is None else 1.0)
        turns = [turn for program in await asyncio.gather(*programs) for turn in program]
        assert len(turns) == 20 * 6
        await check_versions(turns)
        versions = {tuple(segment.version for segment in result.weights) for _, result in turns}
        assert {("0",), ("2",)} <= versions
        assert {version for combination in versions for version in combination} == {"0", "1", "2"}
        mixed = {combination for combination in versions if len(combination) > 1}
        assert bool(mixed) == (mode is UpdateMode.KEEP)
        assert any(result.refill_tokens > 200 for _, result in turns) == (mode is UpdateMode.KEEP)
        assert not any(backend.updating for backend in shell.service.metrics().scheduler.backends)

    with_shell(test)


def test_the_next_turn_after_an_update_finds_no_cache_and_the_one_after_it_does() -> None:
    async def test(shell: Shell) -> None:
        program = asyncio.create_task(play(shell.client("p", UpdateMode.WAIT), 3))
        await asyncio.sleep(0.2)
        await update_weights(shell.scheduler, shell.engines, WEIGHTS, version="1", mode=UpdateMode.WAIT)
        cached = [result.generation.cached_tokens for _, result in await program]
        assert cached[:2] == [0, 0]
        assert cached[2] > 0

    with_shell(test)


def test_in_slices_the_others_go_on() -> None:
    async def test(shell: Shell) -> None:
        updating = asyncio.create_task(
            update_weights(shell.scheduler, shell.engines, WEIGHTS, version="1", mode=UpdateMode.CUT, batch=1)
        )
        await asyncio.sleep(0.1)
        async with shell.client("p", UpdateMode.CUT) as client:
            result = await client.turn(new_prompt(50), Sampling(max_tokens=5, ignore_eos=True))
        assert (result.backend, result.generation.weight_version) == ("e1", "0")
        await updating
        gates = [event.backends for event in shell.scheduler.events if isinstance(event, WeightsUpdating)]
        assert gates == [("e0",), ("e1",)]

    with_shell(test)


def test_an_engine_that_dies_in_an_update_comes_back_with_the_new_weights_and_an_open_gate() -> None:
    async def test(shell: Shell) -> None:
        weights = await serving(shell)
        programs = [asyncio.create_task(play(shell.client(f"p{n}", UpdateMode.KEEP), 4)) for n in range(6)]
        await asyncio.sleep(0.2)
        update = asyncio.create_task(weights.update(shell.scheduler, WEIGHTS, version="1"))
        await asyncio.sleep(0.1)
        dead = shell.engines["e0"]
        assert isinstance(dead, FakeEngine)
        dead.die()
        shell.service.handle(BackendDown(backend="e0", generation=0, reason="died"))
        fresh = shell.engines["e0"] = FakeEngine(CONFIG)
        await fresh.start()
        async with weights.load_into("e0", fresh):
            shell.up("e0", 1)
        assert (await update).died == ("e0",)
        assert (await run(fresh, new_prompt(30))).weight_version == "1"
        turns = [turn for program in await asyncio.gather(*programs) for turn in program]
        await check_versions(turns)
        backends = {backend.backend: backend for backend in shell.service.metrics().scheduler.backends}
        assert (backends["e0"].generation, backends["e0"].updating, backends["e1"].updating) == (1, False, False)

    with_shell(test)


class FussyEngine(FakeEngine):
    """Where the folder is not there when it is asked, or is gone when it is to be loaded."""

    refuses_at_once = False

    async def check_weights(self, source: WeightSource) -> None:
        if self.refuses_at_once:
            raise WeightsRefused("not there")

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        await asyncio.sleep(0.01)
        raise WeightsRefused("gone")

    def kill(self) -> None:
        self.die("killed")


async def make_fussy(shell: Shell, *names: str) -> None:
    for name in names:
        await shell.engines[name].stop()
        shell.engines[name] = FussyEngine(CONFIG)
        await shell.engines[name].start()


async def versions(shell: Shell) -> dict[str, str]:
    return {name: (await engine.stats()).weight_version for name, engine in shell.engines.items()}


@pytest.mark.parametrize("batch", [None, 1])
def test_weights_that_one_engine_refuses_are_loaded_by_none(batch: int | None) -> None:
    async def test(shell: Shell) -> None:
        await make_fussy(shell, "e1")
        shell.engines["e1"].refuses_at_once = True  # type: ignore[attr-defined]
        weights = await serving(shell, batch)
        with pytest.raises(WeightsRefused):
            await weights.update(shell.scheduler, WEIGHTS, version="1")
        assert weights.version is None
        assert shell.scheduler.events == [], "no cache was lost for it"
        assert await versions(shell) == {"e0": "0", "e1": "0"}
        await check_versions(await play(shell.client("p", UpdateMode.KEEP), 1))

    with_shell(test)


@pytest.mark.parametrize("batch", [None, 1])
def test_weights_that_are_gone_when_others_have_them_cost_the_engine_that_refuses(batch: int | None) -> None:
    async def test(shell: Shell) -> None:
        await make_fussy(shell, "e1")
        weights = await serving(shell, batch)
        report = await weights.update(shell.scheduler, WEIGHTS, version="1")
        assert report.died == ("e1",)
        assert weights.version == "1"
        assert (await shell.engines["e0"].stats()).weight_version == "1"
        with pytest.raises(EngineDied, match="killed"):
            await shell.engines["e1"].stats()
        again = FakeEngine(CONFIG)
        await again.start()
        async with weights.load_into("e1", again):
            assert (await again.stats()).weight_version == "1", "as the supervisor has it start again"
        await again.stop()

    with_shell(test)


def test_weights_that_are_gone_for_all_leave_all_as_they_were_and_open_the_gate() -> None:
    async def test(shell: Shell) -> None:
        await make_fussy(shell, "e0", "e1")
        weights = await serving(shell)
        with pytest.raises(WeightsRefused, match="gone"):
            await weights.update(shell.scheduler, WEIGHTS, version="1")
        assert weights.version is None
        assert shell.scheduler.events[-1] == WeightsUpdated(backends=("e0", "e1"), version=None)
        assert await versions(shell) == {"e0": "0", "e1": "0"}
        await check_versions(await play(shell.client("p", UpdateMode.KEEP), 1))

    with_shell(test)


def test_weights_under_the_name_of_those_that_engines_start_with_are_refused() -> None:
    async def test(shell: Shell) -> None:
        weights = await serving(shell)
        with pytest.raises(WeightsRefused, match="version='0'"):
            await weights.update(shell.scheduler, WEIGHTS, version="0")
        with pytest.raises(WeightsRefused, match="version='0'"):
            weights.start_with(WEIGHTS, version="0")
        assert weights.version is None
        assert shell.scheduler.events == []

    with_shell(test)


def test_a_cancelled_update_opens_the_gate() -> None:
    async def test(shell: Shell) -> None:
        for after_s in (0.0, 0.01, 0.3):
            call = update_weights(shell.scheduler, shell.engines, WEIGHTS, version=f"after {after_s}")
            update = asyncio.create_task(call)
            await asyncio.sleep(after_s)
            update.cancel()
            await asyncio.gather(update, return_exceptions=True)
            assert not any(backend.updating for backend in shell.service.metrics().scheduler.backends)
            await check_versions(await play(shell.client(f"p{after_s}", UpdateMode.KEEP), 1))

    with_shell(test)


def test_a_program_with_tokens_too_old_is_told_so_before_it_is_computed_again() -> None:
    async def test(shell: Shell) -> None:
        programs = [asyncio.create_task(play(shell.client(f"p{n}", UpdateMode.KEEP), 20)) for n in range(4)]
        await asyncio.sleep(0.5)
        await update_weights(shell.scheduler, shell.engines, WEIGHTS, version="1")
        results = await asyncio.gather(*programs, return_exceptions=True)
        assert all(isinstance(result, Stale) for result in results)
        assert shell.service.metrics().scheduler.num_programs == 0

    with_shell(test, SchedulerConfig(tick_s=0.5, max_staleness=0))


def test_a_checkpoint_counts_once_it_is_renamed_into_place_and_the_newest_wins(tmp_path: Path) -> None:
    folder, number = WeightsFolder(str(tmp_path)), itertools.count(1)

    def leave(name: str) -> Path:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (next(number), next(number)))
        return tmp_path / name

    assert WeightsFolder(str(tmp_path / "not yet there")).newest() is None
    half = leave(".step_2")
    assert folder.newest() is None
    first = leave("step_1")
    assert folder.newest() == (FolderWeights(path=str(first)), "step_1")
    assert folder.newest() is None
    half.rename(tmp_path / "step_2")
    third = leave("step_3")
    assert folder.newest() == (FolderWeights(path=str(third)), "step_3")
    assert folder.newest() is None


def test_a_checkpoint_that_others_came_after_is_no_newer_for_what_is_written_into_it_or_removed(tmp_path: Path) -> None:
    folder = WeightsFolder(str(tmp_path))
    for number, name in enumerate(("step_1", "step_2", "step_3"), start=1):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (number, number))
    assert folder.newest() == (FolderWeights(path=str(tmp_path / "step_3")), "step_3")
    for name in ("step_2", "step_3", "step_1"):
        (tmp_path / name / "results.json").touch()
        assert folder.newest() is None
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_1" / "results.json").unlink()
    assert folder.newest() == (FolderWeights(path=str(tmp_path / "step_4")), "step_4")


def test_a_checkpoint_that_is_removed_while_it_is_looked_at_was_never_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = WeightsFolder(str(tmp_path))
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_2").mkdir()
    os.utime(tmp_path / "step_1", (1, 1))
    stat, is_dir = Path.stat, Path.is_dir

    def rotate(path: Path) -> None:
        if path.name == "step_2" and os.path.exists(path):
            path.rmdir()

    def removed_before_stat(path: Path, *args: Any, **kwargs: Any) -> os.stat_result:
        rotate(path)
        return stat(path, *args, **kwargs)

    def removed_after_is_dir(path: Path) -> bool:
        found = is_dir(path)
        rotate(path)
        return found

    monkeypatch.setattr(Path, "stat", removed_before_stat)
    monkeypatch.setattr(Path, "is_dir", removed_after_is_dir)
    assert folder.newest() == (FolderWeights(path=str(tmp_path / "step_1")), "step_1")
