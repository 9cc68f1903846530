"""What the recipe that kills engines calls whole, and what it calls the same."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from tests.support.engine_contract import CONFIG
from tests.support.recipes import load_recipe
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.protocol import GenerateRequest, Generation, Sampling

SAID = Generation(
    token_ids=[1, 2, 3],
    logprobs=[-1.0, -2.0, -1.5],
    finish_reason="length",
    prompt_tokens=2,
    cached_tokens=0,
    queue_s=0.0,
    prefill_s=0.0,
    decode_s=0.0,
)


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("engine_failures", "kill_engines.py")


def add(record: Any, given: list[int], asked: int = 3, said: Generation = SAID) -> None:
    record.heard["p"] = [(given, said.token_ids)]
    record.contexts.clear()
    record.add("p", [7, 8], asked, said)


def test_a_turn_is_whole_if_all_went_in_and_all_came_out(recipe: ModuleType) -> None:
    record = recipe.Record(10)
    add(record, [7, 8])
    assert record.wrong == []
    add(record, [7, 8], said=replace(SAID, prompt_tokens=1))
    add(record, [7, 8], asked=4)
    add(record, [7, 8], said=replace(SAID, token_ids=[1, 2, 10]))
    assert record.wrong == [
        "p: 1/2 tokens in, 3/3 out",
        "p: 2/2 tokens in, 3/4 out",
        "p: ids outside the vocabulary",
    ]


def test_a_turn_is_whole_if_it_follows_from_the_one_before_token_for_token(recipe: ModuleType) -> None:
    def complaints(*pieces: tuple[list[int], list[int]], told: list[int] = SAID.token_ids) -> int:
        record = recipe.Record(10, contexts={"p": [4, 5]}, heard={"p": list(pieces)})
        record.add("p", [6], 3, replace(SAID, token_ids=told, prompt_tokens=3))
        assert record.contexts == {"p": [4, 5, 6, *told]}
        return len(record.wrong)

    assert not complaints(([4, 5, 6], [1, 2, 3]))
    assert complaints(([4, 9, 6], [1, 2, 3])), "as long, and another"
    assert complaints(([4, 5, 6], [1, 2, 3]), told=[1, 2, 4]), "the program was told something else"
    assert complaints(), "nobody said it"
    assert not complaints(([4, 5, 6], [1]), ([4, 5, 6, 1], [2, 3])), "cut and gone on with"
    assert complaints(([4, 5, 6], [1]), ([4, 5, 6, 2], [2, 3]))
    assert not complaints(([4, 5, 6], [9, 9, 9]), ([4, 5, 6], [1, 2, 3])), "its engine died as it was done"


async def test_what_an_engine_is_given_and_says_is_overheard(recipe: ModuleType) -> None:
    engine, heard = FakeEngine(CONFIG), {}
    await engine.start()
    prompt = [1, 2, 3]
    request = GenerateRequest(request_id="r", prompt_ids=prompt, sampling=Sampling(max_tokens=4), program="p")
    generation = await recipe.Overheard(engine, heard).generate(request)
    prompt.append(4)
    await engine.stop()
    assert heard == {"p": [([1, 2, 3], generation.token_ids)]}


def test_only_equally_likely_tokens_may_differ(recipe: ModuleType) -> None:
    assert recipe.same_speech(SAID, SAID) == "same"
    parted = replace(SAID, token_ids=[1, 4, 5], logprobs=[-1.0, -2.01, -9.0])
    assert recipe.same_speech(SAID, parted) == "tie", "what follows a tie is another text"
    assert recipe.same_speech(SAID, replace(parted, logprobs=[-1.0, -3.0, -1.5])) == "different"


def test_throughput_is_counted_in_a_window(recipe: ModuleType) -> None:
    record = recipe.Record(10, ended_at=[1.0, 2.0, 3.0, 9.0])
    assert record.per_s(1.0, 3.0) == 1.0
