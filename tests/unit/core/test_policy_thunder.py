from __future__ import annotations

import pytest

from thunder_rollout.core.config import SchedulerConfig, ThunderConfig
from thunder_rollout.core.decisions import Decision, Pause, Restore
from thunder_rollout.core.events import FinishReason, ProgramEnded, WeightsUpdated, WeightsUpdating
from thunder_rollout.core.harness import Harness


def thunder(*, max_wait_s: float = 600.0, headroom_tokens: int = 0, **changes: float) -> Harness:
    config = ThunderConfig(headroom_tokens=headroom_tokens, **changes)  # type: ignore[arg-type]
    return Harness(SchedulerConfig(policy="thunder", max_wait_s=max_wait_s, thunder=config))


def restored(decisions: list[Decision]) -> list[tuple[str, str]]:
    return [(decision.program, decision.backend) for decision in decisions if isinstance(decision, Restore)]


def paused(decisions: list[Decision]) -> list[str]:
    return [decision.program for decision in decisions if isinstance(decision, Pause)]


def run(shell: Harness, program: str, prompt_tokens: int) -> None:
    """A turn from its request on, still in flight; the program joined at once."""
    assert [name for name, _ in restored(shell.ask(program, prompt_tokens))] == [program]


def act(shell: Harness, program: str, prompt_tokens: int) -> None:
    run(shell, program, prompt_tokens)
    shell.end(program, 0)


# A new program joins


def test_a_new_program_joins_where_the_fewest_tokens_are() -> None:
    shell = thunder()
    shell.up("a", 1000)
    shell.up("b", 1000)
    assert restored(shell.ask("p", 300)) == [("p", "a")]
    assert restored(shell.ask("q", 100)) == [("q", "b")]
    assert restored(shell.ask("r", 100)) == [("r", "b")]


def test_a_new_program_waits_where_there_is_no_room() -> None:
    shell = thunder(headroom_tokens=100)
    shell.up("a", 1000)
    run(shell, "p", 600)
    assert shell.ask("q", 201) == []  # 600 + 100 + 201 + 100 > 1000
    shell.send(ProgramEnded(program="q"))
    assert restored(shell.ask("q", 200)) == [("q", "a")]


def test_a_new_program_waits_while_somebody_waits() -> None:
    shell = thunder()
    shell.up("a", 1000)
    run(shell, "p", 600)
    shell.ask("q", 900)
    assert shell.ask("r", 10) == []
    assert restored(shell.tick(5)) == [("r", "a")]


def test_an_active_program_goes_on_at_once_beyond_the_watermark() -> None:
    shell = thunder()
    shell.up("a", 1000)
    act(shell, "p", 400)
    run(shell, "q", 500)
    assert restored(shell.ask("p", 900)) == [("p", "a")]


# Pausing


def test_the_shortest_acting_program_is_paused_first_until_demand_fits() -> None:
    shell = thunder()
    shell.up("a", 1000)
    for name, tokens in (("big", 300), ("small", 100), ("middle", 200)):
        act(shell, name, tokens)
    run(shell, "busy", 400)
    shell.ask("busy", 600)
    assert paused(shell.tick(5)) == ["small", "middle"]
    assert shell.scheduler.snapshot().backends[0].demand_tokens == 900


def test_acting_before_reasoning_and_short_before_long() -> None:
    shell = thunder()
    shell.up("a", 1000)
    act(shell, "acting", 300)
    run(shell, "short", 200)
    run(shell, "long", 400)
    shell.ask("long", 900)
    decisions = shell.tick(5)
    assert paused(decisions) == ["acting"]  # at once; the 200 of `short` are needed as well
    assert shell.scheduler.snapshot().backends[0].num_marked == 1
    assert paused(shell.end("short", 10)) == ["short"]


def test_committed_releases_are_not_counted_twice() -> None:
    shell = thunder()
    shell.up("a", 1000)
    run(shell, "p", 300)
    run(shell, "q", 350)
    run(shell, "r", 350)
    shell.end("r", 200)
    shell.ask("r", 550)  # 1200 in all: `p` is enough
    for _ in range(3):
        assert shell.tick(5) == []
        assert shell.scheduler.snapshot().backends[0].num_marked == 1
    assert paused(shell.end("p")) == ["p"]


def test_a_mark_is_honoured_though_the_need_passed() -> None:
    shell = thunder()
    shell.up("a", 1000)
    run(shell, "p", 300)
    run(shell, "q", 700)
    shell.ask("q", 800)
    shell.tick(5)
    shell.send(ProgramEnded(program="q"))
    assert paused(shell.end("p")) == ["p"]


def test_a_reasoning_program_between_turns_is_paused_at_once() -> None:
    shell = thunder()
    shell.up("a", 1000)
    run(shell, "p", 300)
    shell.end("p", 0, finish_reason=FinishReason.ABORT)
    run(shell, "q", 700)
    shell.ask("q", 800)
    assert paused(shell.tick(5)) == ["p"]


def test_headroom_counts_as_demand() -> None:
    shell = thunder(headroom_tokens=100)
    shell.up("a", 1000)
    act(shell, "p", 300)
    run(shell, "q", 500)
    assert paused(shell.tick(5)) == []
    shell.end("q", 1)
    assert shell.tick(0) == [Pause(program="p", backend="a")]


@pytest.mark.parametrize(("decay_when_pausing", "victims"), [(True, []), (False, ["p"])])
def test_equation_7_discounts_acting_programs_when_told_so(decay_when_pausing: bool, victims: list[str]) -> None:
    shell = thunder(decay_when_pausing=decay_when_pausing, decay_unit_s=5.0)
    shell.up("a", 1000)
    act(shell, "p", 400)
    run(shell, "q", 600)
    shell.ask("q", 700)
    assert paused(shell.tick(5)) == victims  # 700 + 400 / 2


def test_with_decay_a_pause_frees_only_what_still_counts() -> None:
    shell = thunder(decay_when_pausing=True, decay_unit_s=5.0)
    shell.up("a", 1000)
    act(shell, "p", 100)
    act(shell, "q", 300)
    run(shell, "r", 600)
    shell.ask("r", 880)
    assert paused(shell.tick(5)) == ["p", "q"]  # 880 + 50 + 150


def test_the_high_watermark_is_a_share_of_capacity() -> None:
    shell = thunder(high_watermark=0.5, low_watermark=0.5)
    shell.up("a", 1000)
    act(shell, "p", 200)
    run(shell, "q", 300)
    shell.ask("q", 301)
    assert paused(shell.tick(5)) == ["p"]


def test_nothing_is_paused_between_ticks() -> None:
    shell = thunder()
    shell.up("a", 1000)
    act(shell, "p", 400)
    run(shell, "q", 600)
    assert paused(shell.ask("q", 900)) == []


# Restoring


def waiting_room(shell: Harness) -> None:
    """`keeper` fills the one backend, so that whoever asks now waits for a tick."""
    shell.up("a", 1000)
    run(shell, "keeper", 999)


def test_returning_before_new_before_acting_each_short_first() -> None:
    shell = thunder()
    shell.up("a", 2000)
    for name, tokens in (("ret2", 120), ("ret1", 110), ("act2", 60), ("act1", 50)):
        act(shell, name, tokens)
    run(shell, "keeper", 900)
    shell.ask("keeper", 1999)
    assert paused(shell.tick(5)) == ["act1", "act2", "ret1", "ret2"]
    for name, tokens in (("new2", 40), ("ret2", 120), ("new1", 30), ("ret1", 110)):
        assert shell.ask(name, tokens) == []
    assert shell.scheduler.waiting_order() == ["ret1", "ret2", "new1", "new2", "act1", "act2"]
    snapshot = shell.scheduler.snapshot()
    assert (snapshot.num_waiting_returning, snapshot.num_waiting_new, snapshot.num_waiting_acting) == (2, 2, 2)
    assert (snapshot.num_waiting, snapshot.waiting_tokens, snapshot.pending_tokens) == (6, 410, 300)


def test_a_returning_program_waits_for_the_tick() -> None:
    shell = thunder()
    shell.up("a", 1000)
    act(shell, "p", 300)
    run(shell, "busy", 50)
    run(shell, "q", 600)
    shell.ask("q", 900)
    assert paused(shell.tick(5)) == ["p"]
    assert shell.ask("p", 310) == []
    assert shell.send(ProgramEnded(program="q")) == []
    assert restored(shell.tick(5)) == [("p", "a")]


def test_as_many_as_fit_are_chosen_then_placed_largest_first_where_most_room_is() -> None:
    shell = thunder()
    shell.up("a", 1000)
    shell.up("b", 1000)
    run(shell, "ka", 999)
    run(shell, "kb", 999)
    for name, tokens in (("n1", 100), ("n2", 300), ("n3", 500), ("n4", 900)):
        assert shell.ask(name, tokens) == []
    shell.ask("ka", 1)
    shell.ask("kb", 1)
    for keeper in ("ka", "kb"):
        shell.end(keeper, 0)
    # both keepers have a turn of 1 token left: 999 on each
    # of 1998 tokens n1 + n2 + n3 = 900 are chosen and n4 too (1800)
    assert restored(shell.tick(5)) == [("n4", "a"), ("n3", "b"), ("n2", "b"), ("n1", "b")]


def test_one_that_does_not_fit_in_total_is_skipped_and_one_that_does_not_fit_there_too() -> None:
    shell = thunder()
    shell.up("a", 1000)
    shell.up("b", 1000)
    run(shell, "ka", 999)
    run(shell, "kb", 999)
    for name, tokens in (("n1", 600), ("n2", 610), ("n3", 620)):
        assert shell.ask(name, tokens) == []
    shell.ask("ka", 1)
    shell.ask("kb", 1)
    shell.end("ka", 0)
    shell.end("kb", 0)
    # n1..n3 are 1830 of 1998: all chosen, n1 finds room on neither
    assert restored(shell.tick(5)) == [("n3", "a"), ("n2", "b")]
    assert shell.scheduler.waiting_order() == ["n1"]


def test_restoring_discounts_acting_programs() -> None:
    shell = thunder(decay_unit_s=5.0)
    shell.up("a", 1000)
    act(shell, "p", 800)
    run(shell, "q", 100)
    assert shell.ask("r", 300) == []
    # restored into 1000 - 100 - 800 / 2; then 1200 tokens are too many and `p` is paused
    decisions = shell.tick(5)
    assert restored(decisions) == [("r", "a")]
    assert paused(decisions) == ["p"]


def test_restoring_stops_at_the_low_watermark_and_never_passes_the_high_one() -> None:
    shell = thunder(low_watermark=0.5)
    waiting_room(shell)
    for name, tokens in (("n1", 200), ("n2", 250), ("n3", 300)):
        assert shell.ask(name, tokens) == []
    shell.ask("keeper", 1)
    shell.end("keeper", 0)
    # all 750 fit under the high watermark; 301 + 250 reach the low one
    assert restored(shell.tick(5)) == [("n3", "a"), ("n2", "a")]


def test_a_paused_acting_program_gets_its_place_without_a_turn() -> None:
    shell = thunder()
    shell.up("a", 1000)
    act(shell, "p", 300)
    run(shell, "q", 600)
    shell.ask("q", 900)
    assert paused(shell.tick(5)) == ["p"]
    shell.send(ProgramEnded(program="q"))
    assert shell.tick(5) == [Restore(program="p", backend="a", generation=1)]
    assert restored(shell.ask("p", 310)) == [("p", "a")]


def test_nobody_is_restored_where_weights_update() -> None:
    shell = thunder()
    waiting_room(shell)
    shell.ask("p", 100)
    shell.send(WeightsUpdating(backends=("a",)))
    shell.send(ProgramEnded(program="keeper"))
    assert shell.tick(5) == []
    assert restored(shell.send(WeightsUpdated(backends=("a",)))) == [("p", "a")]


# Starvation


def test_after_max_wait_nobody_younger_is_restored_on_the_backend_kept_for_the_oldest() -> None:
    shell = thunder(max_wait_s=20.0)
    waiting_room(shell)
    shell.ask("long", 900)
    shell.ask("keeper", 500)
    shell.end("keeper", 0)
    shell.now = 10.0
    shell.ask("short", 100)
    assert restored(shell.tick()) == [("short", "a")]
    shell.ask("short2", 100)
    assert shell.tick(11) == []
    assert shell.scheduler.waiting_order() == ["long", "short2"]
    shell.send(ProgramEnded(program="keeper"))
    assert restored(shell.tick()) == [("long", "a")]
    assert restored(shell.tick(5)) == []


def test_other_backends_go_on_while_one_is_kept() -> None:
    shell = thunder(max_wait_s=10.0)
    shell.up("a", 1000)
    shell.up("b", 300)
    run(shell, "ka", 900)
    run(shell, "kb", 299)
    shell.ask("long", 800)
    shell.ask("ka", 500)
    shell.end("ka", 0)
    shell.ask("kb", 100)
    shell.end("kb", 0)
    shell.ask("short", 150)
    decisions = shell.tick(11)
    assert restored(decisions) == [("short", "b")]


def test_overdue_programs_are_placed_in_the_order_of_their_age() -> None:
    shell = thunder(max_wait_s=10.0)
    waiting_room(shell)
    shell.ask("old", 600)
    shell.now = 1.0
    shell.ask("younger", 100)
    shell.ask("youngest", 350)
    shell.ask("keeper", 1)
    shell.end("keeper", 0)
    assert restored(shell.tick(20)) == [("old", "a"), ("younger", "a")]


def test_an_overdue_program_that_no_open_backend_holds_reserves_nothing() -> None:
    shell = thunder(max_wait_s=10.0)
    shell.up("a", 1000)
    shell.up("b", 300)
    run(shell, "ka", 900)
    run(shell, "kb", 299)
    shell.ask("long", 800)
    shell.send(WeightsUpdating(backends=("a",)))
    shell.ask("kb", 100)
    shell.end("kb", 0)
    shell.ask("short", 150)
    assert restored(shell.tick(11)) == [("short", "b")]
