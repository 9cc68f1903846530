"""After an update everything has to be computed again: in order, on the emptiest backends, and never too
much at once."""

from __future__ import annotations

from collections import Counter

from thunder_rollout.core.config import AdaptiveConfig, SchedulerConfig
from thunder_rollout.core.decisions import Decision, Restore
from thunder_rollout.core.events import FinishReason, TurnEnded, WeightsUpdated, WeightsUpdating
from thunder_rollout.core.harness import Harness

CAPACITY = 10_000
SHARE = 0.3


def shell_with(num_programs: int, tokens: int, *, cut: bool) -> Harness:
    """So many programs ran on two backends (or were cut in their first turn), and wait behind the gate."""
    config = SchedulerConfig(
        policy="adaptive", adaptive=AdaptiveConfig(max_refill_share=SHARE, prior_growth=0.0, least_fill=1.0)
    )
    shell = Harness(config, a=CAPACITY, b=CAPACITY)
    names = [f"p{number}" for number in range(num_programs)]
    for name in names:
        shell.now += 0.01
        shell.ask(name, tokens)
        if not cut:
            shell.end(name, 10)
    assert len(shell.grants) == (num_programs if cut else 0)
    shell.send(WeightsUpdating(backends=("a", "b")))
    for name in names:
        shell.now += 0.01
        if cut:
            shell.end(name, 10, finish_reason=FinishReason.ABORT)
        assert shell.ask(name, tokens + 10) == []
    return shell


def restored(decisions: list[Decision]) -> list[Restore]:
    return [decision for decision in decisions if isinstance(decision, Restore)]


def refill_tokens(shell: Harness) -> Counter[str]:
    """Tokens in flight on each backend; after an update all of them are computed again."""
    refill: Counter[str] = Counter()
    for backend in shell.scheduler._state.backends.values():
        for grant, program in backend.grants.items():
            refill[backend.name] += shell.scheduler._state.programs[program].turns[grant].prompt_tokens
    return refill


def check_bounded_until_all_ran(shell: Harness, names: list[str]) -> None:
    decisions = shell.send(WeightsUpdated(backends=("a", "b"), version="1"))
    order = [decision.program for decision in restored(decisions)]
    assert {decision.backend for decision in restored(decisions)} == {"a", "b"}
    while shell.grants:
        assert max(refill_tokens(shell).values()) <= SHARE * CAPACITY
        grant, (program, _) = next(iter(shell.grants.items()))
        shell.now += 0.1
        ended = TurnEnded(program=program, grant=grant, output_tokens=10, cached_tokens=0)
        order += [decision.program for decision in restored(shell.send(ended))]
    assert order == names, "the same order as before, and everybody"


def test_programs_are_computed_again_in_order_and_never_too_much_at_once() -> None:
    names = [f"p{number}" for number in range(16)]
    check_bounded_until_all_ran(shell_with(len(names), 900, cut=False), names)


def test_turns_that_were_cut_before_they_ever_finished_count_too() -> None:
    names = [f"p{number}" for number in range(14)]
    check_bounded_until_all_ran(shell_with(len(names), 900, cut=True), names)
