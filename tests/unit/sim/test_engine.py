"""`RunEngine` against the block-exact model, turn by turn, on random closed loops of programs."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from tests.unit.sim.block_engine import BlockEngine
from thunder_rollout.engine.model import EngineShape, EngineTiming
from thunder_rollout.sim.cache import SharedRun
from thunder_rollout.sim.engine import RunEngine, SimEngine, SimTurn

pytestmark = pytest.mark.slow

BLOCK_SIZE = 16
TIMINGS = {
    "plain": EngineTiming(),
    "attention": EngineTiming(step_s=1e-3, prefill_token_s=2e-5, context_token_s=5e-7, prefill_context_s=2e-8),
}
LOOPS = [  # programs, blocks that four programs share, max_running
    pytest.param(4, 0, 64, id="all fits"),
    pytest.param(12, 0, 64, id="some is evicted"),
    pytest.param(30, 20, 64, id="groups"),
    pytest.param(30, 0, 6, id="few at once"),
    pytest.param(60, 10, 64, id="thrashing"),
]


def play(
    engine: SimEngine, *, seed: int, num_programs: int, shared_blocks: int, until_s: float, releases: bool = False
) -> list[SimTurn]:
    """A closed loop of programs of 8 turns; what each does depends on the seed and its number alone."""
    rngs = [random.Random(f"{seed}/{number}") for number in range(num_programs)]
    turns = [_turns(rng, number, shared_blocks) for number, rng in enumerate(rngs)]
    returns = [(rng.random(), number) for number, rng in enumerate(rngs)]
    heapq.heapify(returns)
    ended: list[SimTurn] = []
    last: dict[int, SimTurn] = {}
    now = 0.0
    while now <= until_s:
        while returns and returns[0][0] <= now:
            number = heapq.heappop(returns)[1]
            turn = next(turns[number])
            if releases and last.get(number, turn).key != turn.key:
                engine.release(last[number].key)
            last[number] = turn
            engine.add(turn, now)
        if engine.ends_at <= now:
            for turn in engine.advance():
                ended.append(turn)
                number = int(turn.program)
                heapq.heappush(returns, (now + rngs[number].expovariate(5.0), number))
        now = min(returns[0][0] if returns else float("inf"), engine.ends_at)
    return ended


def _turns(rng: random.Random, number: int, shared_blocks: int):
    for life in itertools.count():
        shared = (SharedRun(f"group{number // 4}/{life}", shared_blocks),) if shared_blocks else ()
        context = shared_blocks * BLOCK_SIZE
        for _ in range(8):
            context += int(rng.lognormvariate(5.5, 0.7)) + 1
            turn = SimTurn(
                key=f"{number}/{life}",
                prompt_tokens=context,
                output_tokens=rng.randint(1, 120),
                shared=shared,
                program=str(number),
            )
            context += turn.output_tokens
            yield turn


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("num_programs", "shared_blocks", "max_running"), LOOPS)
def test_it_does_what_the_block_exact_model_does(
    num_programs: int, shared_blocks: int, max_running: int, seed: int, timing: str
) -> None:
    shape = EngineShape(num_blocks=1200, block_size=BLOCK_SIZE, max_running=max_running, max_batched_tokens=512)
    exact, fast = BlockEngine(shape, TIMINGS[timing]), RunEngine(shape, TIMINGS[timing])
    expected, got = (
        play(engine, seed=seed, num_programs=num_programs, shared_blocks=shared_blocks, until_s=30.0)
        for engine in (exact, fast)
    )
    assert len(expected) > 100
    assert fast.num_preemptions == exact.num_preemptions
    assert [(turn.key, turn.prompt_tokens, turn.cached_tokens) for turn in got] == [
        (turn.key, turn.prompt_tokens, turn.cached_tokens) for turn in expected
    ]
    assert [turn.first_token_at for turn in got] == pytest.approx([turn.first_token_at for turn in expected])


def test_what_ended_programs_left_goes_first_in_both() -> None:
    """Not to the block: with the block-exact model releases wait while many empty blocks are left."""
    shape = EngineShape(num_blocks=1200, block_size=BLOCK_SIZE, max_running=64, max_batched_tokens=512)

    def hit_rate(engine: SimEngine, seed: int, *, releases: bool) -> float:
        turns = play(engine, seed=seed, num_programs=9, shared_blocks=0, until_s=30.0, releases=releases)
        return sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns)

    gains = []
    for seed in range(4):
        exact = hit_rate(BlockEngine(shape, EngineTiming()), seed, releases=True)
        fast = hit_rate(RunEngine(shape, EngineTiming()), seed, releases=True)
        assert fast == pytest.approx(exact, rel=0.02)
        gains.append(fast / hit_rate(RunEngine(shape, EngineTiming()), seed, releases=False))
    assert sum(gains) / len(gains) > 1.01


def test_a_prompt_that_is_all_shared_computes_its_last_block_again() -> None:
    shape = EngineShape(num_blocks=100, block_size=BLOCK_SIZE, max_running=8, max_batched_tokens=512)
    for engine in (BlockEngine(shape, EngineTiming()), RunEngine(shape, EngineTiming())):
        shared = (SharedRun("group", 10),)
        turns = [SimTurn(key=f"p{i}", prompt_tokens=160, output_tokens=20, shared=shared) for i in range(3)]
        for turn in turns:
            engine.add(turn, 0.0)
        ended: list[SimTurn] = []
        while len(ended) < 3:
            ended += engine.advance()
        assert [turn.cached_tokens for turn in turns] == [0, 144, 144]
        assert engine.used_tokens == 0


def test_a_dropped_run_is_computed_again() -> None:
    shape = EngineShape(num_blocks=100, block_size=BLOCK_SIZE, max_running=8, max_batched_tokens=512)
    engine = RunEngine(shape, EngineTiming())

    def run(prompt_tokens: int) -> SimTurn:
        turn = SimTurn(key="p", prompt_tokens=prompt_tokens, output_tokens=1)
        engine.add(turn, 0.0)
        while not engine.advance():
            pass
        return turn

    run(160)
    assert run(200).cached_tokens == 160
    engine.drop("p")
    assert run(240).cached_tokens == 0
    engine.forget_cache()
    assert run(240).cached_tokens == 0
