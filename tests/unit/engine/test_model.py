from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from thunder_rollout.engine.model import EngineModel, EngineShape, EngineTiming, Step

SHAPE = EngineShape(num_blocks=8, block_size=4, max_running=4, max_batched_tokens=16)


def step(model: EngineModel) -> Step:
    begun = model.begin_step()
    assert begun is not None
    model.end_step(dict.fromkeys(begun.sampled, 0))
    return begun


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    model = EngineModel(SHAPE, EngineTiming())
    model.add("a", list(range(20)))
    first, second, third = step(model), step(model), step(model)
    assert [s.num_prefill_tokens for s in (first, second, third)] == [16, 4, 0]
    assert [s.sampled for s in (first, second, third)] == [(), ("a",), ("a",)]
    assert (first.admitted, second.admitted, third.num_decodes) == (("a",), (), 1)


def test_decoding_turns_come_before_prefills() -> None:
    model = EngineModel(SHAPE, EngineTiming())
    model.add("a", [1])
    step(model)
    model.add("b", list(range(20)))
    mixed = step(model)
    assert (mixed.num_decodes, mixed.num_prefill_tokens) == (1, 15)


def test_no_more_run_than_may() -> None:
    model = EngineModel(replace(SHAPE, max_running=2), EngineTiming())
    for name in "abc":
        model.add(name, [1])
    assert step(model).admitted == ("a", "b")
    model.remove("a")
    assert step(model).admitted == ("c",)


def test_a_prompt_waits_until_all_of_it_fits() -> None:
    model = EngineModel(SHAPE, EngineTiming())
    model.add("a", list(range(20)))
    model.add("b", list(range(100, 116)))
    for _ in range(2):
        step(model)
    assert (model.num_running, model.num_waiting) == (1, 1)
    model.remove("a")
    assert step(model).admitted == ("b",)


def test_the_youngest_is_preempted_and_finds_its_blocks_again() -> None:
    model = EngineModel(SHAPE, EngineTiming())
    model.add("a", list(range(12)))
    model.add("b", list(range(100, 112)))
    while model.num_preemptions == 0:
        step(model)
    assert (model.num_running, model.num_waiting) == (1, 1)
    outputs = model.output_ids("b")
    model.remove("a")
    resumed = step(model)
    assert resumed.admitted == ("b",)
    assert resumed.num_prefill_tokens + resumed.num_decodes < 12 + len(outputs)
    assert model.cached_tokens("b") == 0  # as it was when b was first admitted


def test_time_is_the_sum_of_its_terms() -> None:
    timing = EngineTiming(step_s=1, prefill_token_s=10, decode_turn_s=100, context_token_s=1000)
    model = EngineModel(SHAPE, timing)
    model.add("a", [1, 2, 3])
    assert step(model).took_s == 1 + 3 * 10 + 3 * 1000
    assert step(model).took_s == 1 + 100 + 4 * 1000


def test_idle() -> None:
    assert EngineModel(SHAPE, EngineTiming()).begin_step() is None


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 11), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_every_turn_that_fits_alone_finishes(
    turns: list[tuple[int, int, bool]], max_running: int, max_batched_tokens: int
) -> None:
    shape = replace(SHAPE, max_running=max_running, max_batched_tokens=max_batched_tokens)
    model = EngineModel(shape, EngineTiming())
    left = {}
    for number, (num_prompt, num_output, shared) in enumerate(turns):
        model.add(str(number), [0 if shared else number] * num_prompt)
        left[str(number)] = num_output
    for _ in range(10_000):
        if not left:
            break
        begun = model.begin_step()
        assert begun is not None, "turns wait and nothing runs"
        assert begun.num_prefill_tokens + begun.num_decodes <= max_batched_tokens
        model.end_step(dict.fromkeys(begun.sampled, 0))
        for name in begun.sampled:
            left[name] -= 1
            if left[name] == 0:
                model.remove(name)
                del left[name]
    assert not left
    assert model.used_tokens == 0
    assert model.begin_step() is None
