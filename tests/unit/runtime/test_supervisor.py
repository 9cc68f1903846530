"""Engines under watch: what the scheduler hears, and what becomes of programs when engines fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.support.engine_contract import CONFIG, new_prompt, run
from tests.support.failing_engines import (
    POISON,
    SUPERVISED,
    LocalHost,
    NeverStarts,
    OvereatingEngine,
    PoisonedEngine,
    Run,
    play,
    supervised_run,
)
from thunder_rollout.core.events import BackendDown, BackendStats, BackendUp, Event
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.protocol import EngineInfo, EngineStats, Sampling
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.engine.weights import FolderWeights, MemoryWeights, UpdateMode
from thunder_rollout.errors import EngineDied, RequestPoisoned
from thunder_rollout.runtime.client import LocalScheduler
from thunder_rollout.runtime.supervisor import EngineSupervisor
from thunder_rollout.runtime.weights import Weights, update_weights

PROMPTS = [[1 + number, *range(100, 300)] for number in range(12)]


class RecordingScheduler:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_up = True

    async def post(self, event: Event) -> None:
        self.events.append(event)

    async def report(self, stats: BackendStats) -> bool:
        self.events.append(stats)
        return self.is_up


async def play_all(run: Run, prompts: list[list[int]] = PROMPTS) -> list[list[list[int]]]:
    return await asyncio.gather(*(play(run.client(f"p{i}"), prompt) for i, prompt in enumerate(prompts)))


def undisturbed() -> list[list[list[int]]]:
    async def main() -> list[list[list[int]]]:
        async with supervised_run() as run:
            return await play_all(run)

    return run_in_virtual_time(main())


def backends_up(run: Run) -> dict[str, int]:
    return {backend.backend: backend.generation for backend in run.service.metrics().scheduler.backends}


def test_the_scheduler_hears_what_an_engine_holds() -> None:
    async def main() -> list[Event]:
        host, scheduler = LocalHost(lambda: FakeEngine(CONFIG), SUPERVISED), RecordingScheduler()
        supervisor = EngineSupervisor("e0", host, scheduler, await host.start(), SUPERVISED)
        await supervisor.announce()
        watching = asyncio.create_task(supervisor.run())
        turn = asyncio.create_task(run(host, new_prompt(1000), max_tokens=1000))
        await asyncio.sleep(1.5)
        turn.cancel()
        watching.cancel()
        await host.stop()
        return scheduler.events

    up, stats = run_in_virtual_time(main())
    assert up == BackendUp(
        backend="e0", generation=0, capacity_tokens=4096, max_running=16, block_size=32, releases=True
    )
    assert isinstance(stats, BackendStats)
    assert (stats.backend, stats.generation, stats.running, stats.waiting) == ("e0", 0, 1, 0)
    assert stats.used_tokens is not None
    assert stats.used_tokens >= 1000


@pytest.mark.parametrize(
    "fault", [lambda engine: engine.die(), lambda engine: engine.hang(), lambda engine: engine.die(by_turn=True)],
    ids=["killed", "hangs", "crashes"],
)  # fmt: skip
def test_every_program_finishes_token_for_token_whatever_befalls_an_engine(fault: Callable[[FakeEngine], None]) -> None:
    async def main() -> list[list[list[int]]]:
        async with supervised_run() as run:
            playing = asyncio.create_task(play_all(run))
            await asyncio.sleep(1.0)
            fault(run.hosts["engine0"].engines[-1])
            outputs = await playing
            await asyncio.sleep(10)
            assert backends_up(run) == {"engine0": 1, "engine1": 0}
            assert run.supervisors["engine0"].num_restarts == 1
            assert run.hosts["engine0"].num_kills == 0, "an engine that answers is ended by its host"
            return outputs

    assert run_in_virtual_time(main()) == undisturbed()


def test_a_death_is_known_and_mended_within_seconds() -> None:
    async def main() -> None:
        async with supervised_run() as run:
            await asyncio.sleep(5)
            run.hosts["engine0"].engines[-1].die()
            await asyncio.sleep(2.5)
            assert backends_up(run) == {"engine0": 1, "engine1": 0}

    run_in_virtual_time(main())


def test_ten_kills_in_a_row_poison_nobody() -> None:
    """Also where one turn is hit by every one of them."""

    async def main() -> list[list[list[int]]]:
        async with supervised_run() as run:
            playing = asyncio.create_task(play_all(run))
            for number in range(20):
                await asyncio.sleep(1.2)
                run.hosts[f"engine{number % 2}"].engines[-1].die()
            return await playing

    assert run_in_virtual_time(main()) == undisturbed()


def test_ten_kills_in_a_row_of_the_only_engine_leave_its_only_program_alive() -> None:
    async def main() -> list[int]:
        async with supervised_run(1, config=replace(SUPERVISED, max_restarts=10)) as run, run.client("p") as client:
            sampling = Sampling(max_tokens=1500, temperature=0.0, ignore_eos=True)
            turn = asyncio.create_task(client.turn([1, 2, 3], sampling))
            for number in range(10):
                await asyncio.sleep(1.5)
                engine = run.hosts["engine0"].engines[-1]
                assert (number + 1, (await engine.stats()).in_flight) == (len(run.hosts["engine0"].engines), 1)
                engine.die()
            return (await turn).generation.token_ids

    assert len(run_in_virtual_time(main())) == 1500


def test_a_turn_that_engines_are_killed_under_is_found_out_and_the_others_go_on() -> None:
    async def main() -> list[list[list[int]]]:
        config = replace(SUPERVISED, max_restarts=12)
        async with supervised_run(make=lambda: OvereatingEngine(CONFIG), config=config) as run:
            innocent = asyncio.create_task(play_all(run))
            with pytest.raises(RequestPoisoned, match="11 engines went down, the last while it ran alone"):
                await play(run.client("guilty"), [1, POISON, 2])
            outputs = await innocent
            await asyncio.sleep(10)
            assert sum(supervisor.num_restarts for supervisor in run.supervisors.values()) == 11
            return outputs

    assert run_in_virtual_time(main()) == undisturbed()


def test_while_the_only_engine_restarts_programs_wait() -> None:
    async def main() -> list[list[list[int]]]:
        async with supervised_run(1) as run:
            host = run.hosts["engine0"]
            host.next_makes = [lambda: NeverStarts(CONFIG), lambda: NeverStarts(CONFIG)]
            playing = asyncio.create_task(play_all(run))
            await asyncio.sleep(1.0)
            host.engines[-1].die()
            outputs = await playing
            assert len(host.engines) == 4
            return outputs

    assert run_in_virtual_time(main()) == undisturbed()


def test_an_engine_that_never_starts_again_is_given_up_and_the_run_goes_on() -> None:
    async def main() -> list[list[list[int]]]:
        async with supervised_run() as run:
            playing = asyncio.create_task(play_all(run))
            await asyncio.sleep(1.0)
            host = run.hosts["engine0"]
            host.next_makes = [lambda: NeverStarts(CONFIG)] * 10
            host.engines[-1].die()
            outputs = await playing
            await asyncio.sleep(100)
            assert run.watching[0].done()
            assert len(host.engines) == 1 + SUPERVISED.max_restarts
            assert backends_up(run) == {"engine1": 0}
            return outputs

    assert run_in_virtual_time(main()) == undisturbed()


def test_when_the_last_engine_is_given_up_who_waits_hears_why() -> None:
    async def main() -> None:
        async with supervised_run(1) as run:
            playing = asyncio.create_task(play_all(run))
            await asyncio.sleep(1.0)
            host = run.hosts["engine0"]
            host.next_makes = [lambda: NeverStarts(CONFIG)] * 10
            host.engines[-1].die()
            with pytest.raises(EngineDied, match="no engine is left: engine0: no start today"):
                await playing

    run_in_virtual_time(main())


def test_an_engine_that_dies_before_it_works_is_given_up() -> None:
    async def main() -> None:
        async with supervised_run(1) as run:
            for _ in range(1 + SUPERVISED.max_restarts):
                assert not run.watching[0].done()
                run.hosts["engine0"].engines[-1].die()
                await asyncio.sleep(5)
            assert run.watching[0].done()

    run_in_virtual_time(main())


def test_a_poisoned_turn_ends_alone_and_after_two_deaths() -> None:
    async def main() -> list[list[list[int]]]:
        async with supervised_run(make=lambda: PoisonedEngine(CONFIG)) as run:
            innocent = asyncio.create_task(play_all(run))
            with pytest.raises(RequestPoisoned, match="a turn of 3 prompt tokens 2 engines went down"):
                await play(run.client("guilty"), [1, POISON, 2])
            outputs = await innocent
            await asyncio.sleep(10)
            assert sum(supervisor.num_restarts for supervisor in run.supervisors.values()) == 2
            return outputs

    assert run_in_virtual_time(main()) == undisturbed()


def test_of_many_turns_the_poisoned_one_is_found_by_few_deaths_and_the_others_lose_little() -> None:
    large = replace(SUPERVISED, kv_cache_tokens=200 * 1024, max_num_seqs=256, max_restarts=4)

    async def main(prompts: list[list[int]]) -> tuple[list[object], float, int]:
        loop = asyncio.get_running_loop()
        async with supervised_run(1, lambda: PoisonedEngine(large), large) as run:
            started_s = loop.time()
            turns = (play(run.client(f"p{i}"), prompt, num_turns=1) for i, prompt in enumerate(prompts))
            outcomes = await asyncio.gather(*turns, return_exceptions=True)
            return outcomes, loop.time() - started_s, run.supervisors["engine0"].num_restarts

    prompts = [[20 + number, *range(300, 400)] for number in range(130)]
    undisturbed, usual_s, _ = run_in_virtual_time(main(prompts))
    (guilty, *innocent), took_s, num_restarts = run_in_virtual_time(main([[POISON, 1, 2], *prompts[1:]]))
    assert isinstance(guilty, RequestPoisoned)
    assert innocent == undisturbed[1:]
    assert num_restarts == 4, "of 130, of 16, of 2, and alone"
    assert took_s < 4 * usual_s, "one turn after the other would take eight times as long as all together"


def test_two_poisoned_turns_condemn_no_third() -> None:
    async def main() -> list[list[list[int]]]:
        async with supervised_run(make=lambda: PoisonedEngine(CONFIG)) as run:
            innocent = asyncio.create_task(play_all(run))
            guilty = (play(run.client(f"guilty{i}"), [1 + i, POISON, 2]) for i in range(3))
            failures = await asyncio.gather(*guilty, return_exceptions=True)
            assert [type(failure) for failure in failures] == [RequestPoisoned] * 3
            return await innocent

    assert run_in_virtual_time(main()) == undisturbed()


def test_an_engine_that_hangs_under_new_weights_holds_up_the_others_no_longer_than_any_hang() -> None:
    async def main() -> None:
        async with supervised_run(make=lambda: FakeEngine(SUPERVISED)) as run:
            playing = asyncio.create_task(play_all(run))
            await asyncio.sleep(1.0)
            run.hosts["engine0"].engines[-1].hang()
            report = await update_weights(
                LocalScheduler(run.service), run.hosts, MemoryWeights(shapes={}, buckets=()), version="1"
            )
            assert report.died == ("engine0",)
            assert report.duration_s < SUPERVISED.hang_s + 1
            await asyncio.sleep(SUPERVISED.report_s + 1)
            assert backends_up(run) == {"engine0": 1, "engine1": 0}
            assert {len(output) for outputs in await playing for output in outputs} == {100}

    run_in_virtual_time(main())


class Deaf(LocalHost):
    """Its process does not answer any more until it is killed."""

    deaf = False

    async def stats(self) -> EngineStats:
        if self.deaf:
            await asyncio.Event().wait()
        return await super().stats()

    def kill(self) -> None:
        self.deaf = False
        super().kill()


def test_an_engine_that_does_not_answer_is_killed_and_started_again() -> None:
    async def main() -> list[Event]:
        host, scheduler = Deaf(lambda: FakeEngine(CONFIG), SUPERVISED), RecordingScheduler()
        supervisor = EngineSupervisor("e0", host, scheduler, await host.start(), SUPERVISED)
        watching = asyncio.create_task(supervisor.run())
        await asyncio.sleep(0.5)
        host.deaf = True
        await asyncio.sleep(SUPERVISED.report_s + SUPERVISED.hang_s + 0.1)
        watching.cancel()
        assert host.num_kills == 1
        await host.stop()
        return scheduler.events

    down, up = run_in_virtual_time(main())
    assert isinstance(down, BackendDown)
    assert (down.generation, down.returning, down.reason) == (0, True, "e0 did not answer for 5 s")
    assert isinstance(up, BackendUp)
    assert up.generation == 1


def test_an_engine_lost_from_sight_is_announced_again_without_a_restart() -> None:
    async def main() -> None:
        async with supervised_run() as run:
            run.service.handle(BackendDown(backend="engine0", generation=0, returning=True))
            await asyncio.sleep(1.5)
            assert backends_up(run) == {"engine0": 1, "engine1": 0}
            assert len(run.hosts["engine0"].engines) == 1

    run_in_virtual_time(main())


def test_an_engine_that_a_program_found_dead_first_is_not_announced_again_before_it_is_restarted() -> None:
    async def main() -> tuple[list[Event], int]:
        class HearsOfADeath(RecordingScheduler):
            """From a program, just after the engine was asked."""

            async def report(self, stats: BackendStats) -> bool:
                if len(host.engines) == 1:
                    host.engines[-1].die()
                await super().report(stats)
                return len(host.engines) > 1

        host, scheduler = LocalHost(lambda: FakeEngine(CONFIG), SUPERVISED), HearsOfADeath()
        supervisor = EngineSupervisor("e0", host, scheduler, await host.start(), SUPERVISED)
        watching = asyncio.create_task(supervisor.run())
        await asyncio.sleep(1.5)
        watching.cancel()
        await host.stop()
        return [event for event in scheduler.events if not isinstance(event, BackendStats)], supervisor.num_restarts

    events, num_restarts = run_in_virtual_time(main())
    assert [(type(event), event.generation) for event in events if isinstance(event, BackendDown | BackendUp)] == [
        (BackendDown, 0),
        (BackendUp, 1),
    ]
    assert num_restarts == 1


class StartsSlowly(FakeEngine):
    async def start(self) -> EngineInfo:
        await asyncio.sleep(1000)
        return await super().start()


def test_a_start_that_takes_too_long_is_cut_and_tried_again() -> None:
    async def main() -> None:
        async with supervised_run(1, config=replace(SUPERVISED, startup_timeout_s=10)) as run:
            host = run.hosts["engine0"]
            host.next_makes = [lambda: StartsSlowly(CONFIG)]
            host.engines[-1].die()
            await asyncio.sleep(15)
            assert host.num_kills == 1
            assert backends_up(run) == {"engine0": 1}

    run_in_virtual_time(main())


def test_cancelling_a_restart_leaves_an_engine_that_stops() -> None:
    async def main() -> None:
        async with supervised_run(1, config=replace(SUPERVISED, report_s=0.5)) as run:
            host = run.hosts["engine0"]
            host.next_makes = [lambda: StartsSlowly(CONFIG)]
            host.engines[-1].die()
            await asyncio.sleep(5)
            run.watching[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await run.watching[0]
            with pytest.raises(EngineDied):
                await host.stats()

    run_in_virtual_time(main())


@pytest.mark.parametrize("kv_events", [True, False])
def test_the_scheduler_hears_what_a_cache_holds_once_in_full_and_then_what_changed(kv_events: bool) -> None:
    """In full again where the engine is announced again."""

    async def main() -> list[BackendStats]:
        make = lambda: FakeEngine(replace(CONFIG, kv_events=kv_events))
        host, scheduler = LocalHost(make, SUPERVISED), RecordingScheduler()
        info = await host.start()
        prompt = new_prompt(64)
        await run(host, prompt, max_tokens=1)
        await host.cache_changes()
        watching = asyncio.create_task(EngineSupervisor("e0", host, scheduler, info, SUPERVISED).run())
        await asyncio.sleep(1.5)
        await run(host, [*prompt, *new_prompt(32)], max_tokens=1)
        await asyncio.sleep(1.0)
        await host.reset_prefix_cache()
        scheduler.is_up = False
        await asyncio.sleep(2.0)
        watching.cancel()
        await host.stop()
        return [event for event in scheduler.events if isinstance(event, BackendStats)]

    first, second, third, fourth = run_in_virtual_time(main())
    if not kv_events:
        assert {stats.stored for stats in (first, second, third, fourth)} == {None}
        return
    assert first.stored is not None
    assert second.stored is not None
    assert (len(first.stored), first.removed, first.whole) == (2, (), True)
    assert (len(second.stored), second.removed, second.whole) == (1, (), False)
    assert (third.stored, set(third.removed), third.whole) == ((), {*first.stored, *second.stored}, False)
    assert (fourth.generation, fourth.stored, fourth.whole) == (1, (), True)


def test_an_engine_that_starts_again_has_the_runs_weights_before_the_scheduler_hears_of_it() -> None:
    async def main() -> tuple[list[str], list[BackendUp]]:
        versions: list[str] = []

        class Listening(RecordingScheduler):
            async def post(self, event: Event) -> None:
                if isinstance(event, BackendUp):
                    versions.append((await host.stats()).weight_version)
                await super().post(event)

        host, scheduler = LocalHost(lambda: FakeEngine(CONFIG), SUPERVISED), Listening()
        weights = Weights(mode=UpdateMode.KEEP, batch=None)
        supervisor = EngineSupervisor("e0", host, scheduler, await host.start(), SUPERVISED, weights)
        await supervisor.announce()
        watching = asyncio.create_task(supervisor.run())
        await weights.update(scheduler, MemoryWeights(shapes={}, buckets=()), version="1")
        host.kill()
        await asyncio.sleep(5.0)
        watching.cancel()
        await host.stop()
        return versions, [event for event in scheduler.events if isinstance(event, BackendUp)]

    versions, ups = run_in_virtual_time(main())
    assert versions == ["0", "1"]
    assert [up.generation for up in ups] == [0, 1]


def test_an_engine_whose_weights_are_gone_is_given_up_in_the_generation_that_was_up() -> None:
    async def main() -> tuple[list[Event], int]:
        host, scheduler = LocalHost(lambda: FakeEngine(CONFIG), SUPERVISED), RecordingScheduler()
        weights = Weights(mode=UpdateMode.KEEP, batch=None)
        supervisor = EngineSupervisor("e0", host, scheduler, await host.start(), SUPERVISED, weights)
        await supervisor.announce()
        weights.start_with(FolderWeights(path="/nowhere"), version="1")
        host.kill()
        await supervisor.run()
        await host.stop()
        return scheduler.events, supervisor.num_restarts

    events, num_restarts = run_in_virtual_time(main())
    downs = [event for event in events if isinstance(event, BackendDown)]
    assert [(down.generation, down.returning) for down in downs] == [(0, True), (0, False)]
    assert num_restarts == 0
