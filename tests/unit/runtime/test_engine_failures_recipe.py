"""What the recipe that kills engines calls whole, and what it calls the same."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from tests.support.recipes import load_recipe
from thunder_rollout.engine.protocol import Generation

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


def test_a_turn_is_whole_if_all_went_in_and_all_came_out(recipe: ModuleType) -> None:
    record = recipe.Record(10)
    record.add("p", [7, 8], 3, SAID)
    assert record.wrong == []
    record.add("p", [7], 3, SAID)
    record.add("p", [7, 8], 4, SAID)
    record.add("p", [7, 8], 3, replace(SAID, token_ids=[1, 2, 10]))
    assert record.wrong == [
        "p: 2/1 tokens in, 3/3 out",
        "p: 2/2 tokens in, 3/4 out",
        "p: ids outside the vocabulary",
    ]


def test_only_equally_likely_tokens_may_differ(recipe: ModuleType) -> None:
    assert recipe.same_speech(SAID, SAID) == "same"
    parted = replace(SAID, token_ids=[1, 4, 5], logprobs=[-1.0, -2.01, -9.0])
    assert recipe.same_speech(SAID, parted) == "tie", "what follows a tie is another text"
    assert recipe.same_speech(SAID, replace(parted, logprobs=[-1.0, -3.0, -1.5])) == "different"


def test_throughput_is_counted_in_a_window(recipe: ModuleType) -> None:
    record = recipe.Record(10, ended_at=[1.0, 2.0, 3.0, 9.0])
    assert record.per_s(1.0, 3.0) == 1.0
