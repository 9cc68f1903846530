from __future__ import annotations

from typing import Any

import pytest

from thunder_rollout.core.config import AdaptiveConfig, SchedulerConfig
from thunder_rollout.core.decisions import Decision, Pause, Restore
from thunder_rollout.core.events import (
    BackendUp,
    ProgramEnded,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnRequested,
    WeightsUpdated,
    WeightsUpdating,
)
from thunder_rollout.core.harness import Harness
from thunder_rollout.errors import BadEvent, ConfigError


def adaptive(*, capacity: dict[str, int] | None = None, **fields: Any) -> Harness:
    """No growth is expected before it was seen, so that room is what contexts leave."""
    config = AdaptiveConfig(
        **{"prior_growth": 0.0, "least_fill": 1.0, "admit_watermark": 0.9, "high_watermark": 1.0, **fields}
    )
    return Harness(SchedulerConfig(policy="adaptive", adaptive=config), **(capacity or {"a": 1000}))


def who(decisions: list[Decision]) -> list[str]:
    return [decision.program for decision in decisions if isinstance(decision, Restore)]


def where(decisions: list[Decision]) -> list[str]:
    return [decision.backend for decision in decisions if isinstance(decision, Restore)]


def blocks(first: int, num_blocks: int, *, shared: int = 0) -> tuple[int, ...]:
    """Hashes of a prompt whose first `shared` blocks every prompt has."""
    return (*range(1, shared + 1), *range(first, first + num_blocks - shared))


def demand(shell: Harness, backend: str = "a") -> float:
    ledger = shell.scheduler._policy._ledger  # type: ignore[attr-defined]
    return ledger.demand_tokens(ledger.backends[backend])


def test_room_is_given_by_the_event_that_makes_it() -> None:
    shell = adaptive()
    assert who(shell.ask("p", 600)) == ["p"]
    assert who(shell.ask("q", 400)) == []
    assert who(shell.send(ProgramEnded(program="p"))) == ["q"]


def test_room_that_comes_free_bit_by_bit_is_noticed() -> None:
    shell = adaptive()
    for name, tokens in (("p", 600), ("small", 100), ("tiny", 100)):
        assert who(shell.ask(name, tokens, task_kind=name)) == [name]
    assert who(shell.ask("q", 250)) == [], "150 tokens are missing"
    assert who(shell.send(ProgramEnded(program="small"))) == []
    assert who(shell.send(ProgramEnded(program="tiny"))) == ["q"]


def test_a_shared_prefix_is_charged_once() -> None:
    shell = adaptive()
    for number in range(4):
        hashes = blocks(100 * (number + 1), 30, shared=24)
        assert who(shell.ask(f"p{number}", 485, block_hashes=hashes)) == [f"p{number}"]
    assert demand(shell) == (24 + 4 * 6) * 16 + 4 * 5
    shell.send(ProgramEnded(program="p0"))
    assert demand(shell) == (24 + 3 * 6) * 16 + 3 * 5


def test_counts_take_over_where_hashes_stop() -> None:
    shell = adaptive()
    shell.ask("p", 320, block_hashes=blocks(1, 20))
    shell.ask("q", 320, block_hashes=blocks(1, 20))
    assert demand(shell) == 320
    shell.end("q")
    shell.ask("q", 330)
    assert demand(shell) == 650
    shell.end("q")
    shell.ask("q", 340, block_hashes=blocks(1, 21))
    assert demand(shell) == 340


def test_the_block_size_may_be_said() -> None:
    shell = adaptive()
    shell.send(BackendUp(backend="b", generation=1, capacity_tokens=100, max_running=8, block_size=24))
    shell.ask("p", 500, block_hashes=blocks(1, 20))
    assert demand(shell) == 500
    assert shell.scheduler._policy._ledger.programs["p"].private_tokens == 20  # type: ignore[attr-defined]
    with pytest.raises(BadEvent, match=r"BackendUp\.block_size=0"):
        shell.send(BackendUp(backend="c", generation=1, capacity_tokens=100, max_running=8, block_size=0))


def test_more_hashes_than_tokens_are_not_believed() -> None:
    shell = adaptive()
    shell.ask("p", 3, block_hashes=(1, 2, 3, 4))
    assert demand(shell) == 3
    shell.ask("q", 40, block_hashes=blocks(1, 2))
    assert demand(shell) == 43, "two blocks of 16 and 8 tokens"


def test_hashes_that_are_no_hashes_change_nothing() -> None:
    shell = adaptive()
    with pytest.raises(BadEvent, match="block_hashes"):
        shell.send(TurnRequested(program="p", request="r", prompt_tokens=40, block_hashes=(-1, 2)))
    assert shell.scheduler.snapshot().num_programs == 0


def test_output_that_is_expected_is_reserved_while_the_turn_runs() -> None:
    shell = adaptive()
    shell.send(TurnRequested(program="p", request="r", prompt_tokens=100, expected_output_tokens=300))
    assert demand(shell) == 400
    shell.end("p", 300)
    assert demand(shell) == 400
    shell.ask("p", 410)
    assert demand(shell) == 410 + 300, "what its last turns produced is expected again"


def test_growth_to_come_is_reserved_for_new_programs() -> None:
    shell = adaptive(prior_growth=0.5)
    assert who(shell.ask("p", 400)) == ["p"]
    assert who(shell.ask("q", 360)) == [], "400 + 360 fit, but with half as much again they do not"
    assert who(shell.ask("r", 190)) == ["r"]


def ended_at(shell: Harness, tokens: int) -> None:
    """A program lived and ended with so many tokens."""
    shell.ask("before", tokens)
    shell.end("before")
    shell.send(ProgramEnded(program="before"))


def test_the_peak_to_come_decides_where_growth_is_known() -> None:
    growing, grown = adaptive(), adaptive()
    ended_at(growing, 700)
    for shell, admitted in ((growing, []), (grown, ["q"])):
        shell.ask("p", 400)
        assert who(shell.ask("q", 400)) == admitted, "together 800, but both to grow to 700"


def test_a_shared_prefix_counts_once_in_the_peak_to_come() -> None:
    shell = adaptive()
    shell.ask("p", 640, block_hashes=tuple(range(40)))
    assert who(shell.ask("q", 640, block_hashes=tuple(range(40)))) == ["q"]
    assert who(shell.ask("r", 640, block_hashes=tuple(range(1000, 1040)))) == []


@pytest.mark.parametrize(("crowding", "tool_s", "gain"), [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 3.0, 0.75)])
def test_one_more_program_gains_what_the_turns_and_tools_leave(crowding: float, tool_s: float, gain: float) -> None:
    """d ln X / d ln n of X = n / (Z + D): with turns of 1 s that crowd each other out, tools of 3 s leave 3/4."""
    shell = adaptive()
    ledger = shell.scheduler._policy._ledger
    account = ledger.backends["a"]
    assert ledger.gain(account) == 0.0, "careful before anything was seen"
    account.mean_turn_s, ledger.return_times.recent_s = 1.0, tool_s
    ledger.model(account)._crowding = crowding
    assert ledger.gain(account) == pytest.approx(gain)


def test_running_sequences_are_a_second_capacity() -> None:
    shell = adaptive(capacity={"a": 10_000})
    assert [len(who(shell.ask(f"p{number}", 10))) for number in range(9)] == [1] * 8 + [0]
    assert who(shell.end("p0")) == ["p8"]


def test_the_queue_is_in_order_of_arrival_not_of_length() -> None:
    shell = adaptive()
    shell.ask("keeper", 800)
    for second, (name, tokens) in enumerate({"long": 850, "short": 300}.items()):
        shell.now = float(second)
        shell.ask(name, tokens)
    shell.tick(10.0)
    assert who(shell.send(ProgramEnded(program="keeper"))) == ["long"]


def test_a_program_that_comes_back_under_a_new_name_is_as_old_as_its_shell_says() -> None:
    shell = adaptive()
    shell.now = 10.0
    shell.ask("keeper", 800)
    shell.ask("other", 600)
    shell.now = 20.0
    shell.ask("again", 600, age_s=15.0)
    assert shell.scheduler.waiting_order() == ["again", "other"]


def test_a_backend_is_kept_for_who_waits_too_long() -> None:
    shell = adaptive(patience_s=5.0)
    shell.ask("keeper", 500, task_kind="keeper")
    assert who(shell.ask("long", 850, task_kind="long")) == []
    assert who(shell.ask("early", 100)) == ["early"], "within the patience of the first"
    shell.now = 6.0
    assert who(shell.ask("late", 100)) == []
    assert shell.scheduler.waiting_order() == ["long", "late"]
    assert who(shell.send(ProgramEnded(program="long"))) == ["late"], "what was kept is given back"


def test_a_nearly_complete_group_goes_first() -> None:
    shell = adaptive(group_weight_s=60.0)
    for name in ("g1", "g2"):
        shell.ask(name, 400, group="g")
    shell.now = 1.0
    shell.ask("other", 500)
    shell.now = 2.0
    shell.ask("g3", 500, group="g")
    assert shell.scheduler.waiting_order() == ["other", "g3"]
    assert who(shell.send(ProgramEnded(program="g1"))) == ["g3"]


def test_a_paused_program_goes_back_to_where_its_prefix_is() -> None:
    shell = adaptive(capacity={"a": 2000, "b": 2000}, load_weight=0.0)
    shell.ask("p", 800, block_hashes=blocks(1000, 50))
    shell.ask("q", 1000)
    assert shell.scheduler._state.programs["p"].backend == "a"
    shell.end("p", 10)
    shell.send(ToolStarted(program="p", tool="web"))
    shell.now = 3.0
    ledger = shell.scheduler._policy._ledger  # type: ignore[attr-defined]
    shell.scheduler._release(shell.scheduler._state.programs["p"])
    (decision,) = shell.ask("p", 820, block_hashes=blocks(1000, 51))
    assert isinstance(decision, Restore)
    assert decision.backend == "a"
    assert ledger.programs["p"].runs[decision.grant or 0].uncached_tokens == 820 - 50 * 16


def test_samples_of_one_prompt_go_where_it_is() -> None:
    shell = adaptive(capacity={"a": 8000, "b": 8000}, load_weight=0.1)
    assert where(shell.ask("x", 160, block_hashes=blocks(5000, 10))) == ["a"]
    assert where(shell.ask("p", 3200, block_hashes=blocks(1, 200))) == ["b"]
    assert where(shell.ask("q", 3210, block_hashes=blocks(1, 200))) == ["b"]


def test_overflow_gives_up_the_least_waste_and_counts_what_is_marked_once() -> None:
    shell = adaptive()
    for name, tokens in {"p": 300, "q": 300, "r": 200}.items():
        shell.ask(name, tokens)
    shell.end("r", 10)
    shell.send(ToolStarted(program="r", tool="web"))
    assert shell.end("p", 250) == [Pause(program="r", backend="a")], "away for long, and the shortest"
    shell.ask("p", 560)
    assert [p.program_id for p in shell.scheduler._state.programs.values() if p.marked] == []
    shell.ask("p", 720)
    marked = [p.program_id for p in shell.scheduler._state.programs.values() if p.marked]
    assert len(marked) == 1
    assert shell.tick(5.0) == [], "what is marked is not made up for again"


def test_an_acting_program_is_held_while_that_is_cheaper() -> None:
    def play(recompute_token_s: float) -> list[str]:
        shell = adaptive(prior_prefill_token_s=recompute_token_s, decay_unit_s=10.0)
        shell.ask("p", 500)
        shell.ask("keeper", 100)
        shell.end("p")
        return who(shell.ask("q", 600))

    assert play(1.0) == [], "500 s of prefill: wait for it"
    assert play(1e-6) == ["q"], "half a millisecond of prefill: not worth its place"


def test_learned_tool_times_decide_who_is_held() -> None:
    shell = adaptive(prior_prefill_token_s=1e-2, capacity={"a": 1000})
    for _ in range(30):
        shell.ask("p", 300)
        shell.now += 3.0
        shell.end("p", 1)
        shell.send(ToolStarted(program="p", tool="quick"))
        shell.now += 0.01
        shell.send(ToolEnded(program="p"))
    shell.ask("p", 300)
    shell.ask("keeper", 100)
    shell.end("p", 1)
    shell.send(ToolStarted(program="p", tool="quick"))
    assert shell.ask("q", 700) == []


def test_a_program_that_left_without_a_word_is_noticed_by_how_long_it_is_away() -> None:
    """While it may be at a tool as short as those before, holding it pays; nobody announces its end."""
    shell = adaptive(prior_prefill_token_s=1e-2, silent_ends=True)
    for _ in range(30):
        shell.ask("p", 300)
        shell.now += 3.0
        shell.end("p", 1)
        shell.now += 0.5
    shell.ask("p", 300)
    shell.ask("keeper", 100)
    shell.end("p", 1)
    assert shell.ask("q", 700) == []
    assert shell.tick(0.5) == []
    assert [who(shell.tick(5.0)) for _ in range(6)].count(["q"]) == 1
    assert shell.scheduler._state.programs["p"].backend is None
    shell.end("q", 1)
    shell.send(ProgramEnded(program="q"))
    assert who(shell.ask("p", 320)) == ["p"], "and back it is"


def test_who_may_be_gone_gives_its_place_up_though_nobody_waits() -> None:
    shell = adaptive(silent_ends=True)
    shell.ask("p", 300)
    shell.end("p", 1)
    ticks = [shell.tick(1.0) for _ in range(30)]
    assert [Pause(program="p", backend="a")] in ticks
    assert where(shell.ask("p", 320)) == ["a"], "and has it again when it comes"


def test_an_announced_duration_is_believed_until_it_is_over() -> None:
    shell = adaptive()
    shell.ask("p", 300)
    shell.end("p", 1)
    shell.send(ToolStarted(program="p", tool="web", expected_s=30.0))
    ledger = shell.scheduler._policy._ledger  # type: ignore[attr-defined]
    shell.tick(10.0)
    assert ledger.absence_s("p") == 20.0
    shell.tick(21.0)
    assert ledger.absence_s("p") == pytest.approx(1.44, abs=0.1)


def test_caches_are_void_after_an_update_and_everybody_may_move() -> None:
    shell = adaptive(capacity={"a": 1000, "b": 1000}, max_refill_share=0.5)
    for name in ("p", "q"):
        shell.ask(name, 300, block_hashes=blocks(1000, 18))
    assert {program.backend for program in shell.scheduler._state.programs.values()} == {"a"}
    shell.end("p", 10)
    decisions = shell.send(WeightsUpdating(backends=("a", "b")))
    assert decisions == [Pause(program="p", backend="a")]
    assert shell.end("q", 10) == [Pause(program="q", backend="a")], "what runs is let run, then gives its place up"
    assert shell.ask("p", 320, block_hashes=blocks(1000, 20)) == []
    assert shell.ask("q", 320, block_hashes=blocks(1000, 20)) == []
    decisions = shell.send(WeightsUpdated(backends=("a", "b")))
    assert sorted(where(decisions)) == ["a", "b"]
    ledger = shell.scheduler._policy._ledger  # type: ignore[attr-defined]
    assert {run.uncached_tokens for program in ledger.programs.values() for run in program.runs.values()} == {320}


def test_without_rebalancing_programs_keep_their_places() -> None:
    shell = adaptive(rebalance_on_update=False)
    shell.ask("p", 300)
    shell.end("p", 10)
    assert shell.send(WeightsUpdating(backends=("a",))) == []


def test_recomputation_is_bounded() -> None:
    shell = adaptive(capacity={"a": 10_000}, max_refill_share=0.1, rebalance_on_update=True)
    for number in range(5):
        shell.ask(f"p{number}", 600)
        shell.end(f"p{number}", 10)
    shell.send(WeightsUpdating(backends=("a",)))
    for number in range(5):
        shell.ask(f"p{number}", 620)
    assert who(shell.send(WeightsUpdated(backends=("a",)))) == ["p0"], "600 tokens of refill, and 1000 are allowed"
    assert who(shell.end("p0", 10)) == ["p1"]


def test_a_backend_that_comes_back_has_an_empty_cache() -> None:
    shell = adaptive(capacity={"a": 2000})
    shell.ask("p", 320, block_hashes=blocks(1, 20))
    shell.end("p", 1)
    shell.down("a")
    shell.ask("p", 321, block_hashes=blocks(1, 20))
    (decision,) = shell.up("a", 2000, generation=2)
    assert isinstance(decision, Restore)
    ledger = shell.scheduler._policy._ledger  # type: ignore[attr-defined]
    assert ledger.programs["p"].runs[decision.grant or 0].uncached_tokens == 321


def test_cut_turns_teach_nothing() -> None:
    shell = adaptive()
    shell.ask("p", 300)
    shell.end("p", 10, finish_reason="abort")  # type: ignore[arg-type]
    ledger = shell.scheduler._policy._ledger  # type: ignore[attr-defined]
    assert ledger.programs["p"].last_backend is None
    shell.ask("p", 300)
    grant = next(iter(shell.grants))
    shell.send(TurnEnded(program="p", grant=grant, output_tokens=7, cached_tokens=100))
    assert ledger.backends["a"].odometer_tokens == 207


@pytest.mark.parametrize(
    ("field", "value"),
    [("admit_watermark", 1.5), ("decay_base", 1.0), ("lookahead", 0), ("patience_s", -1.0), ("forgetting", 0.0)],
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"scheduler\.adaptive\.{field}"):
        AdaptiveConfig(**{field: value})
