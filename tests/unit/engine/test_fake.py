"""The contract on `FakeEngine`, and what only it promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.support.engine_contract import *  # noqa: F403
from tests.support.engine_contract import CONFIG, GREEDY, VOCAB_SIZE, new_prompt, new_request, run
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.model import EngineTiming
from thunder_rollout.engine.protocol import Engine, Generation
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.engine.weights import MemoryWeights, UpdateMode, WeightSource
from thunder_rollout.errors import ConfigError, EngineDied


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    fake = FakeEngine(replace(CONFIG, model="fake"), vocab_size=VOCAB_SIZE)
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
def weights() -> tuple[WeightSource, WeightSource]:
    return MemoryWeights(shapes={}, buckets=()), MemoryWeights(shapes={}, buckets=())


async def test_what_it_says_of_itself(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="starts once"):
        await engine.start()


async def test_a_script_is_the_output() -> None:
    fake = FakeEngine(CONFIG, script=lambda prompt_ids, sampling: [prompt_ids[-1], 7])
    await fake.start()
    generation = await run(fake, [1, 2, 3])
    assert (generation.token_ids, generation.finish_reason) == ([3, 7], "stop")
    assert (await run(fake, [1, 2, 3], max_tokens=1)).finish_reason == "length"
    await fake.stop()


async def test_death_fails_turns_now_and_later(engine: FakeEngine) -> None:
    turns = [asyncio.create_task(run(engine, new_prompt(50), max_tokens=1000)) for _ in range(20)]
    await asyncio.sleep(0.01)
    engine.die()
    assert all(isinstance(r, EngineDied) for r in await asyncio.gather(*turns, return_exceptions=True))
    for call in (engine.stats, engine.reset_prefix_cache, lambda: run(engine, [1]), lambda: engine.abort("x")):
        with pytest.raises(EngineDied, match="killed by a test"):
            await call()


async def test_a_failing_script_fails_its_own_turn_only() -> None:
    def script(prompt_ids: list[int], _: object) -> list[int]:
        return [1 // prompt_ids[0]]

    fake = FakeEngine(CONFIG, script=script)
    await fake.start()
    with pytest.raises(ZeroDivisionError):
        await run(fake, [0])
    assert (await run(fake, [1])).token_ids == [1]
    await fake.stop()


async def test_stop_before_start_and_twice() -> None:
    fake = FakeEngine(CONFIG)
    await fake.stop()
    with pytest.raises(EngineDied):
        await run(fake, [1])
    await fake.stop()


async def test_an_id_may_come_back_in_the_same_step(engine: FakeEngine) -> None:
    request = new_request(new_prompt(50), max_tokens=100)
    first = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0.02)
    await engine.abort(request.request_id)
    await first
    again = await engine.generate(request)
    assert len(again.token_ids) == 100


async def test_an_engine_that_dies_while_it_loads_lets_nobody_wait() -> None:
    fake = FakeEngine(CONFIG, update_s=0.05)
    await fake.start()
    update = asyncio.create_task(
        fake.update_weights(MemoryWeights(shapes={}, buckets=()), version="1", mode=UpdateMode.CUT)
    )
    await asyncio.sleep(0.01)
    late = asyncio.create_task(run(fake, [1]))
    await asyncio.sleep(0.01)
    fake.die()
    for waiting in (update, late):
        with pytest.raises(EngineDied, match="killed by a test"):
            await waiting
    await fake.stop()


async def test_an_update_that_is_cancelled_while_it_loads_still_ends_by_itself() -> None:
    fake = FakeEngine(CONFIG, update_s=0.05)
    await fake.start()
    update = asyncio.create_task(
        fake.update_weights(MemoryWeights(shapes={}, buckets=()), version="1", mode=UpdateMode.CUT)
    )
    await asyncio.sleep(0.01)
    update.cancel()
    await asyncio.gather(update, return_exceptions=True)
    assert (await run(fake, [1])).weight_version == "1", "no turn ran before the weights were whole"
    await fake.update_weights(MemoryWeights(shapes={}, buckets=()), version="2", mode=UpdateMode.CUT)
    assert (await run(fake, [1])).weight_version == "2"
    await fake.stop()


def test_virtual_time_is_the_models() -> None:
    timing = EngineTiming(step_s=1.0, prefill_token_s=0.1, decode_turn_s=2.0, context_token_s=0.0)

    async def main() -> tuple[Generation, float]:
        fake = FakeEngine(CONFIG, timing=timing)
        await fake.start()
        generation = await fake.generate(new_request(new_prompt(300), replace(GREEDY, max_tokens=11)))
        await fake.stop()
        return generation, asyncio.get_running_loop().time()

    generation, now_s = run_in_virtual_time(main())
    assert generation.prefill_s == pytest.approx(2 * 1.0 + 300 * 0.1)  # two chunks of at most 256
    assert generation.decode_s == pytest.approx(10 * 3.0)
    assert now_s == pytest.approx(62.0)


def test_virtual_time_repeats_exactly() -> None:
    prompts = [new_prompt(200 + 37 * number) for number in range(30)]

    async def main() -> list[Generation]:
        fake = FakeEngine(CONFIG)
        await fake.start()
        turns = [
            fake.generate(new_request(prompt, replace(GREEDY, max_tokens=5 + number)))
            for number, prompt in enumerate(prompts)
        ]
        generations = await asyncio.gather(*turns)
        await fake.stop()
        return generations

    assert run_in_virtual_time(main()) == run_in_virtual_time(main())
