"""The host: when an engine counts as dead, and what its turns then hear."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support.engine_contract import *  # noqa: F403
from tests.support.engine_contract import CONFIG, GREEDY, VOCAB_SIZE, new_prompt, new_request, run
from tests.support.failing_engines import check_that_an_update_finds_a_hang
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.host import EngineHost
from thunder_rollout.engine.protocol import GenerateRequest, Generation
from thunder_rollout.engine.result_check import what_is_wrong
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.engine.weights import MemoryWeights, UpdateMode, WeightSource
from thunder_rollout.errors import EngineDied

GOOD = Generation(
    token_ids=[1, 2],
    logprobs=[-0.5, 0.0],
    finish_reason="stop",
    prompt_tokens=3,
    cached_tokens=0,
    queue_s=0.0,
    prefill_s=0.1,
    decode_s=0.1,
)
NONSENSE: list[tuple[str, dict[str, Any]]] = [
    ("21 tokens of 20", {"token_ids": [1] * 21, "logprobs": [0.0] * 21}),
    ("1 log-probabilities for 2", {"logprobs": [0.0]}),
    ("ids from 1 to 512", {"token_ids": [1, VOCAB_SIZE]}),
    ("ids from -1 to 1", {"token_ids": [1, -1]}),
    ("not finite", {"logprobs": [0.0, math.nan]}),
    ("not finite", {"logprobs": [0.0, -math.inf]}),
    ("above 0", {"logprobs": [0.0, 0.5]}),
    ("a prompt of 4 tokens", {"prompt_tokens": 4}),
    ("4 of 3 prompt tokens", {"cached_tokens": 4}),
]


def make_host() -> EngineHost:
    return EngineHost(lambda: FakeEngine(CONFIG, vocab_size=VOCAB_SIZE), hang_s=5.0)


@pytest.fixture
async def engine() -> AsyncIterator[EngineHost]:
    host = make_host()
    await host.start()
    yield host
    await host.stop()


@pytest.fixture
def weights() -> tuple[WeightSource, WeightSource]:
    return MemoryWeights(shapes={}, buckets=()), MemoryWeights(shapes={}, buckets=())


async def test_an_update_of_an_engine_that_hangs_ends_with_it(engine: EngineHost) -> None:
    turn = asyncio.create_task(run(engine, new_prompt(40), max_tokens=1000))
    await asyncio.sleep(0.05)
    update = asyncio.create_task(
        engine.update_weights(MemoryWeights(shapes={}, buckets=()), version="1", mode=UpdateMode.WAIT)
    )
    await asyncio.sleep(0.05)
    engine._alive().end(EngineDied("it hangs"))
    for waiting in (turn, update):
        with pytest.raises(EngineDied, match="it hangs"):
            await waiting
    await engine.start()
    assert (await run(engine, new_prompt(40))).weight_version == "0"


@pytest.mark.parametrize("mode", [UpdateMode.KEEP, UpdateMode.CUT])
@pytest.mark.parametrize("in_host", [False, True])
def test_an_update_finds_a_hang_that_no_turn_shows_any_more(mode: UpdateMode, in_host: bool) -> None:
    async def main() -> None:
        fake = FakeEngine(CONFIG, vocab_size=VOCAB_SIZE)
        engine = EngineHost(lambda: fake, hang_s=5.0) if in_host else fake
        await engine.start()
        weights = MemoryWeights(shapes={}, buckets=())
        await check_that_an_update_finds_a_hang(engine, fake.hang, weights, mode, CONFIG.hang_s)
        await engine.stop()

    run_in_virtual_time(main())


async def test_what_is_late_to_hear_of_a_death_does_not_end_the_next_engine() -> None:
    class Late(FakeEngine):
        async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.2)

    first = Late(CONFIG, vocab_size=VOCAB_SIZE)
    engines = [first, FakeEngine(CONFIG, vocab_size=VOCAB_SIZE)]
    host = EngineHost(lambda: engines.pop(0), hang_s=5.0)
    await host.start()
    update = host.update_weights(MemoryWeights(shapes={}, buckets=()), version="1", mode=UpdateMode.WAIT)
    updating = asyncio.create_task(update)
    await asyncio.sleep(0.05)
    first.die()
    with pytest.raises(EngineDied):
        await host.stats()
    await host.start()
    with pytest.raises(EngineDied):
        await updating
    await host.stats()
    await host.stop()


class Answers(FakeEngine):
    """Always the same."""

    answer = GOOD

    async def generate(self, request: GenerateRequest) -> Generation:
        return self.answer


@pytest.mark.parametrize(("message", "changes"), NONSENSE, ids=[message for message, _ in NONSENSE])
async def test_nonsense_ends_the_engine_and_blames_its_own_turn_alone(message: str, changes: dict[str, Any]) -> None:
    engine = Answers(CONFIG, vocab_size=VOCAB_SIZE)
    host = EngineHost(lambda: engine, hang_s=5.0)
    await host.start()
    assert await host.generate(new_request([1, 2, 3])) == GOOD
    engine.answer = replace(GOOD, **changes)
    with pytest.raises(EngineDied, match=message) as caught:
        await host.generate(new_request([1, 2, 3]))
    assert (caught.value.by_turn, caught.value.num_together) == (True, 1)
    with pytest.raises(EngineDied, match=message) as caught:
        await host.stats()
    assert not caught.value.by_turn
    await host.stop()


def test_a_turn_that_the_engine_reports_as_failed_is_no_nonsense() -> None:
    failed = replace(GOOD, finish_reason="error", logprobs=[])
    assert what_is_wrong(new_request([1, 2, 3], GREEDY), failed, vocab_size=VOCAB_SIZE) is None


async def test_nothing_is_served_before_the_start_and_after_the_stop() -> None:
    host = make_host()
    with pytest.raises(EngineDied, match="not started"):
        await run(host, [1])
    await host.start()
    await host.stop()
    await host.stop()
    with pytest.raises(EngineDied, match="stopped"):
        await host.stats()


async def test_a_new_start_ends_the_turns_of_the_engine_before(engine: EngineHost) -> None:
    turn = asyncio.create_task(run(engine, new_prompt(100), max_tokens=1500))
    await asyncio.sleep(0.05)
    await engine.start()
    with pytest.raises(EngineDied) as caught:
        await turn
    assert not caught.value.by_turn
    assert len((await run(engine, new_prompt(100))).token_ids) == 20


@pytest.mark.parametrize(("fault", "blamed"), [("hang", True), ("crash", True), ("kill", False)])
def test_turns_that_ran_are_blamed_only_where_they_may_be_the_cause(fault: str, blamed: bool) -> None:
    async def main() -> list[tuple[bool, int | None]]:
        engine = FakeEngine(CONFIG)
        host = EngineHost(lambda: engine, hang_s=5.0)
        await host.start()
        ran = [asyncio.create_task(run(host, new_prompt(100), max_tokens=1500)) for _ in range(2)]
        await asyncio.sleep(0.1)
        held_back = asyncio.create_task(host.generate(replace(new_request(new_prompt(100)), max_together=1)))
        await asyncio.sleep(0.1)
        if fault == "hang":
            engine.hang()
            await asyncio.sleep(0.2)
            await host.stats()
            await asyncio.sleep(5.1)
            with pytest.raises(EngineDied, match="2 turns, no step for 5 s"):
                await host.stats()
        else:
            engine.die(by_turn=fault == "crash")
        errors = await asyncio.gather(*ran, held_back, return_exceptions=True)
        await host.stop()
        assert all(isinstance(error, EngineDied) for error in errors)
        return [(error.by_turn, error.num_together) for error in errors if isinstance(error, EngineDied)]

    assert run_in_virtual_time(main()) == [(blamed, 2), (blamed, 2), (False, 0)]


async def test_a_turn_that_comes_after_the_crash_is_not_blamed_for_it() -> None:
    engine = FakeEngine(CONFIG)
    host = EngineHost(lambda: engine, hang_s=5.0)
    await host.start()
    ran = asyncio.create_task(run(host, new_prompt(100), max_tokens=1500))
    await asyncio.sleep(0.1)
    engine.die(by_turn=True)
    with pytest.raises(EngineDied) as caught:
        await ran
    assert caught.value.by_turn
    with pytest.raises(EngineDied) as caught:
        await run(host, new_prompt(100))
    assert (caught.value.by_turn, caught.value.num_together) == (False, 0)
    await host.stop()


def test_an_idle_engine_never_hangs() -> None:
    async def main() -> None:
        host = make_host()
        await host.start()
        for _ in range(20):
            await host.stats()
            await asyncio.sleep(3)
        turn = asyncio.create_task(run(host, new_prompt(100), max_tokens=1500))
        for _ in range(20):
            await host.stats()
            await asyncio.sleep(0.3)
        await turn
        await host.stop()

    run_in_virtual_time(main())


class Watched(FakeEngine):
    """Remembers of each turn as it came how many it allows, and how many ran then."""

    def __init__(self) -> None:
        super().__init__(CONFIG, vocab_size=VOCAB_SIZE)
        self.came: list[tuple[int | None, int]] = []
        self.inside = 0

    async def generate(self, request: GenerateRequest) -> Generation:
        self.inside += 1
        self.came.append((request.max_together, self.inside))
        try:
            return await super().generate(request)
        finally:
            self.inside -= 1


def test_suspects_run_in_small_companies_and_the_others_after_them() -> None:
    async def main() -> list[tuple[int | None, int]]:
        engine = Watched()
        host = EngineHost(lambda: engine, hang_s=5.0)
        await host.start()
        turns = []
        for max_together in (*[None] * 5, *[2] * 3, 1, 1, *[None] * 3):
            request = replace(new_request(new_prompt(100), max_tokens=200), max_together=max_together)
            turns.append(asyncio.create_task(host.generate(request)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*turns)
        await host.stop()
        return engine.came

    came = run_in_virtual_time(main())
    assert [max_together for max_together, _ in came] == [*[None] * 5, 1, 1, *[2] * 3, *[None] * 3]
    assert [inside for _, inside in came[:7]] == [1, 2, 3, 4, 5, 1, 1]
    assert max(inside for _, inside in came[7:10]) == 2


def test_cancelling_a_suspect_that_waits_lets_the_others_go() -> None:
    async def main() -> None:
        host = make_host()
        await host.start()
        running = asyncio.create_task(run(host, new_prompt(100), max_tokens=1500))
        await asyncio.sleep(0.1)
        suspect = asyncio.create_task(host.generate(replace(new_request(new_prompt(100)), max_together=1)))
        await asyncio.sleep(0.1)
        other = asyncio.create_task(run(host, new_prompt(100)))
        await asyncio.sleep(0.1)
        assert not other.done()
        suspect.cancel()
        await other
        assert not running.done()
        await running
        await host.stop()

    run_in_virtual_time(main())
