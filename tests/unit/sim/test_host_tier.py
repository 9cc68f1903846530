from __future__ import annotations

import pytest

from thunder_rollout.engine.model import EngineShape, EngineTiming
from thunder_rollout.sim.cache import SharedRun
from thunder_rollout.sim.engine import RunEngine, SimTurn
from thunder_rollout.sim.host_tier import HostTier

GROUP = (SharedRun("group", 10),)


def test_it_holds_what_a_turn_held_and_finds_it_in_one_piece() -> None:
    tier = HostTier(100)
    tier.store(GROUP, "p", 30)
    assert tier.match(GROUP, "p", 0, 50) == 30
    assert tier.match(GROUP, "p", 12, 20) == 8, "behind what the GPU has, within the limit"
    assert tier.match(GROUP, "q", 0, 50) == 10, "the shared part"
    assert tier.match(GROUP, "q", 10, 50) == 0
    assert tier.match((SharedRun("other", 10),), "p", 0, 50) == 0, "no piece from the middle"


def test_the_sequence_used_longest_ago_goes_first_its_tail_before_its_head() -> None:
    tier = HostTier(40)
    tier.store((), "p", 20)
    tier.store((), "q", 15)
    tier.store((), "r", 10)
    assert [tier.match((), key, 0, 99) for key in "pqr"] == [15, 15, 10]
    tier.store((), "p", 15)
    tier.store((), "s", 20)
    assert [tier.match((), key, 0, 99) for key in "pqrs"] == [15, 0, 5, 20]
    assert tier.num_used == 40


def test_a_shared_part_outlives_the_programs_behind_it() -> None:
    tier = HostTier(20)
    tier.store(GROUP, "p", 20)
    tier.store((), "q", 10)
    assert [tier.match(GROUP, "p", 0, 99), tier.match((), "q", 0, 99)] == [10, 10]


SHAPE = EngineShape(num_blocks=100, block_size=16, max_running=8, max_batched_tokens=4096)
TIMING = EngineTiming(step_s=1e-3, prefill_token_s=1e-4, decode_turn_s=0.0, context_token_s=0.0)


def run(engine: RunEngine, key: str, prompt_tokens: int) -> tuple[SimTurn, float]:
    """The turn and the seconds until its first token, which is its last."""
    turn = SimTurn(key=key, prompt_tokens=prompt_tokens, output_tokens=1)
    engine.add(turn, 0.0)
    while not engine.advance():
        pass
    return turn, turn.first_token_at - turn.admitted_at


def test_what_left_the_gpu_is_loaded_and_not_computed() -> None:
    engine = RunEngine(SHAPE, TIMING, HostTier(1000), load_token_s=1e-5)
    run(engine, "p", 1280)
    run(engine, "q", 1280)
    turn, took_s = run(engine, "p", 1344)
    assert (turn.cached_tokens, turn.loaded_tokens) == (1280, 1280 - 320), "20 of 100 blocks were left of it"
    assert took_s == pytest.approx(1e-3 + 64e-4 + 960e-5)
    turn, took_s = run(engine, "p", 1360)
    assert (turn.cached_tokens, turn.loaded_tokens) == (1344, 0)


def test_a_full_hit_in_the_tier_leaves_the_last_token_to_compute() -> None:
    engine = RunEngine(SHAPE, TIMING, HostTier(1000), load_token_s=1e-5)
    run(engine, "p", 1600)
    run(engine, "q", 1600)
    turn, _ = run(engine, "p", 1600)
    assert turn.cached_tokens == turn.loaded_tokens == 1584
