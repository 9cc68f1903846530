"""What every engine does: `from tests.support.engine_contract import *` in a test module that has the
fixtures `engine` (a started engine of `CONFIG`) and `weights` (its own, and others of its model). Tests
share the engine, so each has prompts of its own."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.hashing import block_hashes
from thunder_rollout.engine.protocol import Engine, EngineStats, GenerateRequest, Generation, Sampling
from thunder_rollout.engine.weights import FolderWeights, UpdateMode, WeightSource
from thunder_rollout.errors import RequestError, WeightsRefused

VOCAB_SIZE = 512
CONFIG = EngineConfig(
    model="",
    max_model_len=2048,
    kv_cache_tokens=4096,
    block_size=32,
    max_num_seqs=16,
    max_num_batched_tokens=256,
    enforce_eager=True,
    release_on_pause=True,
)
GREEDY = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)

_numbers = itertools.count()


def new_prompt(num_tokens: int) -> list[int]:
    return random.Random(next(_numbers)).choices(range(VOCAB_SIZE), k=num_tokens)


def new_request(prompt_ids: list[int], sampling: Sampling = GREEDY, **changes: Any) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"r{next(_numbers)}", prompt_ids=prompt_ids, sampling=replace(sampling, **changes)
    )


async def run(engine: Engine, prompt_ids: list[int], **changes: Any) -> Generation:
    return await engine.generate(new_request(prompt_ids, **changes))


async def settled(engine: Engine) -> EngineStats:
    """Statistics once nothing runs."""
    for _ in range(1000):
        stats = await engine.stats()
        if not (stats.running or stats.waiting or stats.used_tokens):
            return stats
        await asyncio.sleep(0.01)
    pytest.fail(f"still busy after 10 s: {stats}")


async def test_a_turn_gives_exact_ids_and_a_logprob_each(engine: Engine) -> None:
    generation = await run(engine, new_prompt(100), temperature=1.0)
    assert len(generation.token_ids) == len(generation.logprobs) == 20
    assert all(0 <= token_id < VOCAB_SIZE for token_id in generation.token_ids)
    assert all(math.isfinite(logprob) and logprob <= 0 for logprob in generation.logprobs)
    assert (generation.finish_reason, generation.prompt_tokens, generation.cached_tokens) == ("length", 100, 0)
    assert min(generation.queue_s, generation.prefill_s, generation.decode_s) >= 0
    assert 0 < generation.prefill_s + generation.decode_s < 60


async def test_greedy_turns_repeat(engine: Engine) -> None:
    prompt = new_prompt(70)
    first, second = await run(engine, prompt), await run(engine, prompt)
    assert first.token_ids == second.token_ids


async def test_a_stop_token_ends_the_turn_and_is_part_of_it(engine: Engine) -> None:
    prompt = new_prompt(50)
    whole = (await run(engine, prompt)).token_ids
    stop = whole[5]
    cut = await run(engine, prompt, stop_token_ids=(stop,))
    assert cut.token_ids == whole[: whole.index(stop) + 1]
    assert len(cut.logprobs) == len(cut.token_ids)
    assert cut.finish_reason == "stop"


async def test_the_next_turn_finds_its_history_in_the_cache(engine: Engine) -> None:
    prompt = new_prompt(100)
    first = await run(engine, prompt)
    second = await run(engine, [*prompt, *first.token_ids, *new_prompt(30)])
    computed = 100 + 20 - 1  # the last token was sampled but never computed
    assert second.cached_tokens == computed // 32 * 32


async def test_a_full_hit_still_computes_the_last_token(engine: Engine) -> None:
    prompt = new_prompt(96)
    await run(engine, prompt)
    assert (await run(engine, prompt)).cached_tokens == 64


async def test_a_forked_history_shares_its_prefix(engine: Engine) -> None:
    prompt = new_prompt(320)
    await run(engine, prompt)
    fork = [*prompt[:200], *new_prompt(100)]
    assert (await run(engine, fork)).cached_tokens == 192


async def test_what_a_released_program_left_goes_first(engine: Engine) -> None:
    await settled(engine)
    await engine.reset_prefix_cache()
    older, released = new_prompt(800), new_prompt(800)
    for name, prompt in (("older", older), ("released", released)):
        await engine.generate(replace(new_request(prompt), program=name))
    await run(engine, new_prompt(1900))
    await engine.generate(replace(new_request(new_prompt(900)), program="next", released=("released", "nobody")))
    assert (await run(engine, older)).cached_tokens == 768, "LRU would have taken of this one"
    assert 0 < (await run(engine, released)).cached_tokens <= 480, "ten blocks of its tail"


async def test_what_others_share_outlives_a_release(engine: Engine) -> None:
    await settled(engine)
    await engine.reset_prefix_cache()
    prefix = new_prompt(640)
    prompts = {name: [*prefix, *new_prompt(320)] for name in ("stays", "goes")}
    for name, prompt in prompts.items():
        await engine.generate(replace(new_request(prompt), program=name))
    await run(engine, new_prompt(1900))
    await run(engine, new_prompt(300))
    await engine.generate(replace(new_request(new_prompt(900)), released=("goes",)))
    assert (await run(engine, prompts["stays"])).cached_tokens == 928
    assert 640 <= (await run(engine, prompts["goes"])).cached_tokens <= 672


async def test_reset_forgets_the_cache(engine: Engine) -> None:
    prompt = new_prompt(100)
    await run(engine, prompt)
    await settled(engine)
    await engine.reset_prefix_cache()
    assert (await run(engine, prompt)).cached_tokens == 0


async def test_reset_spares_running_turns(engine: Engine) -> None:
    turn = asyncio.create_task(run(engine, new_prompt(100), max_tokens=200))
    await asyncio.sleep(0.05)
    await engine.reset_prefix_cache()
    assert len((await turn).token_ids) == 200


async def test_abort_returns_what_there_is(engine: Engine) -> None:
    request = new_request(new_prompt(100), max_tokens=1500)
    turn = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0.3)
    await engine.abort(request.request_id)
    generation = await turn
    assert generation.finish_reason == "abort"
    assert 0 < len(generation.token_ids) == len(generation.logprobs) < 1500
    assert (await settled(engine)).running == 0


async def test_abort_of_an_unknown_turn_is_nothing(engine: Engine) -> None:
    await engine.abort("no-such-request")
    await run(engine, new_prompt(10))


async def test_cancelling_a_turn_aborts_it(engine: Engine) -> None:
    for delay_s in (0.0, 0.001, 0.1):
        turn = asyncio.create_task(run(engine, new_prompt(100), max_tokens=1500))
        await asyncio.sleep(delay_s)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert (await settled(engine)).used_tokens == 0


async def test_a_turn_under_new_weights_is_recorded_as_such_and_finds_no_cache(
    engine: Engine, weights: tuple[WeightSource, WeightSource]
) -> None:
    """Also puts the old weights back, for the tests that share the engine: a turn then repeats itself."""
    prompt = new_prompt(100)
    await engine.check_weights(weights[1])
    before = await run(engine, prompt)
    await engine.update_weights(weights[1], version="other", mode=UpdateMode.WAIT)
    during = await run(engine, prompt)
    assert during.logprobs != before.logprobs, "other weights spoke (random models may repeat the same ids)"
    assert (during.weight_version, during.cached_tokens) == ("other", 0)
    await engine.update_weights(weights[0], version="0", mode=UpdateMode.WAIT)
    after = await run(engine, prompt)
    assert (after.token_ids, after.weight_version, after.cached_tokens) == (before.token_ids, "0", 0)


@pytest.mark.parametrize("mode", [UpdateMode.WAIT, UpdateMode.CUT])
async def test_turns_in_flight_finish_or_are_cut_and_later_ones_wait(
    engine: Engine, weights: tuple[WeightSource, WeightSource], mode: UpdateMode
) -> None:
    """Whatever a turn returns, all of it is of one version."""
    turns = [asyncio.create_task(run(engine, new_prompt(100), max_tokens=150)) for _ in range(24)]
    await asyncio.sleep(0.1)
    update = asyncio.create_task(engine.update_weights(weights[0], version="next", mode=mode))
    await asyncio.sleep(0.1)
    late = asyncio.create_task(run(engine, new_prompt(40)))
    await update
    old = await asyncio.gather(*turns)
    assert {generation.weight_version for generation in old} == {"0"}
    if mode is UpdateMode.WAIT:
        assert {len(generation.token_ids) for generation in old} == {150}
    else:
        assert "abort" in {generation.finish_reason for generation in old}
        assert any(0 < len(generation.token_ids) < 150 for generation in old)
    assert all(len(generation.token_ids) == len(generation.logprobs) for generation in old)
    assert ((await late).weight_version, len((await late).token_ids)) == ("next", 20)
    await engine.update_weights(weights[0], version="0", mode=UpdateMode.WAIT)


async def test_an_update_that_is_cancelled_while_turns_finish_changes_nothing(
    engine: Engine, weights: tuple[WeightSource, WeightSource]
) -> None:
    turn = asyncio.create_task(run(engine, new_prompt(40), max_tokens=200))
    await asyncio.sleep(0.05)
    update = asyncio.create_task(engine.update_weights(weights[0], version="never", mode=UpdateMode.WAIT))
    await asyncio.sleep(0.05)
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    assert (await run(engine, new_prompt(40))).weight_version == "0"
    assert len((await turn).token_ids) == 200


async def test_weights_that_are_not_there_are_refused_and_the_old_ones_serve(engine: Engine) -> None:
    with pytest.raises(WeightsRefused, match="nowhere"):
        await engine.check_weights(FolderWeights(path="/nowhere"))
    with pytest.raises(WeightsRefused, match="nowhere"):
        await engine.update_weights(FolderWeights(path="/nowhere"), version="x", mode=UpdateMode.CUT)
    assert (await run(engine, new_prompt(40))).weight_version == "0"


BAD_REQUESTS: list[tuple[str, list[int], dict[str, Any]]] = [
    ("prompt_ids", [], {}),
    ("prompt_ids", [VOCAB_SIZE], {}),
    ("prompt_ids", [-1], {}),
    ("prompt_ids", ["text"], {}),  # type: ignore[list-item]
    ("max_tokens", [1] * 2040, {}),
    ("max_tokens", [1], {"max_tokens": 0}),
    ("max_tokens", [1], {"max_tokens": 10**9}),
    ("temperature", [1], {"temperature": -0.1}),
    ("temperature", [1], {"temperature": math.nan}),
    ("temperature", [1], {"temperature": 2.5}),
    ("top_p", [1], {"top_p": 0.0}),
    ("top_p", [1], {"top_p": 1.1}),
    ("top_k", [1], {"top_k": -2}),
    ("min_p", [1], {"min_p": 2.0}),
    ("repetition_penalty", [1], {"repetition_penalty": 0.0}),
    ("stop_token_ids", [1], {"stop_token_ids": (VOCAB_SIZE,)}),
    ("seed", [1], {"seed": 7}),
]


@pytest.mark.parametrize(("field", "prompt_ids", "changes"), BAD_REQUESTS)
async def test_a_bad_request_is_refused_and_others_are_served(
    engine: Engine, field: str, prompt_ids: list[int], changes: dict[str, Any]
) -> None:
    other = asyncio.create_task(run(engine, new_prompt(40)))
    with pytest.raises(RequestError, match=rf"r\d+: {field}: "):
        await run(engine, prompt_ids, **changes)
    assert len((await other).token_ids) == 20


async def test_two_turns_of_one_id_are_refused(engine: Engine) -> None:
    request = new_request(new_prompt(40), max_tokens=100)
    first = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0)
    with pytest.raises(RequestError, match="request_id"):
        await engine.generate(request)
    assert len((await first).token_ids) == 100


async def test_every_kind_of_sampling_is_served_in_one_batch(engine: Engine) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "stop_token_ids": (3, 5)},
        {"temperature": 1.0, "ignore_eos": False},
    ]
    turns = [run(engine, new_prompt(300), **kinds[number % len(kinds)]) for number in range(3 * len(kinds))]
    assert all(generation.finish_reason in ("length", "stop") for generation in await asyncio.gather(*turns))


async def test_turns_that_outgrow_the_pool_are_preempted_and_finish(engine: Engine) -> None:
    before = (await settled(engine)).preemptions
    turns = [run(engine, new_prompt(900), max_tokens=600) for _ in range(4)]
    assert [len(generation.token_ids) for generation in await asyncio.gather(*turns)] == [600] * 4
    assert (await settled(engine)).preemptions > before


async def test_statistics_add_up(engine: Engine) -> None:
    before = await settled(engine)
    prompt = new_prompt(100)
    for _ in range(2):
        await run(engine, prompt)
    after = await settled(engine)
    assert after.prompt_tokens - before.prompt_tokens == 200
    assert after.cached_tokens - before.cached_tokens == 96
    assert after.output_tokens - before.output_tokens == 40


def hits(resident: set[int], prompt_ids: list[int]) -> int:
    """Tokens of the prompt that a cache of these blocks would serve; the last token is always computed."""
    hashes = block_hashes(prompt_ids[:-1], CONFIG.block_size)
    return CONFIG.block_size * sum(1 for _ in itertools.takewhile(resident.__contains__, hashes))


async def follow(engine: Engine, resident: set[int], *, whole: bool = False) -> CacheChanges:
    """Bring `resident` up to date by what the engine reports."""
    changes = await engine.cache_changes(whole=whole)
    assert changes is not None
    if changes.whole:
        resident.clear()
    assert resident.isdisjoint(changes.stored), "stored twice"
    assert resident.issuperset(changes.removed), "removed and never stored"
    resident -= set(changes.removed)
    resident |= set(changes.stored)
    return changes


async def test_what_the_cache_is_said_to_hold_is_what_hits(engine: Engine) -> None:
    """Through growth, forks, and more programs than fit: the oldest are evicted."""
    await settled(engine)
    resident: set[int] = set()
    await follow(engine, resident, whole=True)
    programs = [new_prompt(300 + 50 * number) for number in range(12)]
    seen = set()
    for number in (*range(12), 0, 11, 5, 10):
        prompt = programs[number]
        if number == 10:
            prompt = [*prompt[:100], *new_prompt(250)]
        await follow(engine, resident)
        expected = hits(resident, prompt)
        generation = await run(engine, prompt)
        assert generation.cached_tokens == expected
        seen.add(expected)
        programs[number] = [*prompt, *generation.token_ids, *new_prompt(40)]
    assert {0, 96} < seen
    assert len(resident) <= 4096 // 32


async def test_copies_of_one_prefix_are_one(engine: Engine) -> None:
    """Two turns that compute the same blocks at once hold them twice; one copy may go before the other."""
    await settled(engine)
    resident: set[int] = set()
    await follow(engine, resident, whole=True)
    prompt = new_prompt(1000)
    await asyncio.gather(run(engine, prompt, max_tokens=1), run(engine, prompt, max_tokens=60))
    await follow(engine, resident)
    for _ in range(6):
        assert hits(resident, prompt) == (await run(engine, prompt, max_tokens=1)).cached_tokens
        await run(engine, new_prompt(1900), max_tokens=1)
        await follow(engine, resident)


async def test_changes_are_told_once_and_all_of_them_when_asked(engine: Engine) -> None:
    await settled(engine)
    await run(engine, new_prompt(100))
    await settled(engine)
    whole = await engine.cache_changes(whole=True)
    again = await engine.cache_changes()
    assert whole is not None
    assert whole.whole
    assert whole.stored
    assert again == CacheChanges(stored=(), removed=(), whole=False)


async def test_a_cache_that_was_reset_holds_nothing_and_then_what_came_after(engine: Engine) -> None:
    """Also before the next turn, and before what came ahead of the reset was ever asked for."""
    await settled(engine)
    resident: set[int] = set()
    await follow(engine, resident, whole=True)
    prompt = new_prompt(100)
    await run(engine, prompt)
    await settled(engine)
    await engine.reset_prefix_cache()
    await follow(engine, resident)
    assert resident == set()
    await run(engine, prompt)
    await follow(engine, resident)
    assert hits(resident, prompt) == 96


async def test_a_reset_under_way_spares_what_is_known_of_running_turns(engine: Engine) -> None:
    resident: set[int] = set()
    prompt = new_prompt(100)
    turn = asyncio.create_task(run(engine, prompt, max_tokens=200))
    await asyncio.sleep(0.05)
    await engine.reset_prefix_cache()
    generation = await turn
    await follow(engine, resident, whole=True)
    again = [*prompt, *generation.token_ids]
    assert hits(resident, again) == (await run(engine, again, max_tokens=1)).cached_tokens > 0


async def test_a_cache_that_new_weights_voided_holds_nothing_and_then_what_came_after(
    engine: Engine, weights: tuple[WeightSource, WeightSource]
) -> None:
    """Also before the next turn. The old weights are put back."""
    await settled(engine)
    resident: set[int] = set()
    await follow(engine, resident, whole=True)
    prompt = new_prompt(100)
    await run(engine, prompt)
    await settled(engine)
    await engine.update_weights(weights[1], version="other", mode=UpdateMode.WAIT)
    await follow(engine, resident)
    assert resident == set()
    await engine.update_weights(weights[0], version="0", mode=UpdateMode.WAIT)
    await run(engine, prompt)
    await follow(engine, resident)
    assert hits(resident, prompt) == 96
