"""Belief about caches against what engines report of them: what is corrected, what is left alone, what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.events import BackendStats, BackendUp
from thunder_rollout.core.harness import Harness, replay
from thunder_rollout.core.policies.adaptive.ledger import Ledger
from thunder_rollout.core.policies.adaptive.policy import AdaptivePolicy
from thunder_rollout.core.prefix import PrefixTree

BLOCK = 10


def tree_of(max_blocks: int, **programs: tuple[int, ...]) -> PrefixTree:
    """A backend `a` that was told it holds nothing, then used the programs in order."""
    tree = PrefixTree()
    tree.add_backend("a", max_blocks)
    assert tree.report("a", (), whole=True) == 0
    for name, hashes in programs.items():
        tree.put(name, hashes)
        tree.hold(name, "a")
    return tree


def test_what_is_believed_and_not_there_is_counted_and_given_up() -> None:
    tree = tree_of(100, p=(1, 2, 3, 4), q=(1, 2, 13, 14))
    assert tree.report("a", (1, 2, 3, 13, 14)) == 1
    assert (tree.held_blocks("p", "a"), tree.held_blocks("q", "a")) == (3, 4)
    assert tree.report("a", (), (3, 13, 14)) == 3
    assert (tree.held_blocks("p", "a"), tree.held_blocks("q", "a")) == (2, 2)
    assert tree.report("a", ()) == 0


def test_what_was_believed_gone_and_is_there_is_counted_and_found_again() -> None:
    tree = tree_of(4, p=(1, 2, 3), q=(11, 12, 13))
    assert tree.held_blocks("p", "a") == 1
    assert tree.report("a", (1, 2, 11, 12, 13)) == 1
    assert tree.held_blocks("p", "a") == 1, "the pool has no room for more: it goes next"
    tree.add_backend("a", 6)
    assert tree.report("a", ()) == 1
    assert tree.held_blocks("p", "a") == 2


def test_what_is_found_again_is_the_first_to_go() -> None:
    tree = tree_of(9, p=(1, 2, 3), q=(11, 12, 13), r=(21, 22, 23), s=(31, 32, 33), t=(41, 42, 43))
    assert [tree.held_blocks(name, "a") for name in "pqrst"] == [0, 0, 3, 3, 3]
    tree.add_backend("a", 15)
    everything = tuple(ten + one for ten in (0, 10, 20, 30, 40) for one in (1, 2, 3))
    assert tree.report("a", everything) == 6
    assert [tree.held_blocks(name, "a") for name in "pqrst"] == [3, 3, 3, 3, 3]
    tree.add_backend("a", 11)
    assert [tree.held_blocks(name, "a") for name in "pqrst"] == [0, 2, 3, 3, 3]


def test_blocks_that_nobody_names_leave_less_room() -> None:
    tree = tree_of(8, p=(1, 2, 3), q=(11, 12, 13))
    assert tree.report("a", (1, 2, 3, 11, 12, 13, 91, 92)) == 0
    tree.put("r", (21,))
    tree.hold("r", "a")
    assert tree.held_blocks("p", "a") == 2


def test_a_turn_in_flight_is_left_alone_and_so_is_what_goes_for_it() -> None:
    tree = tree_of(6, p=(1, 2, 3), q=(11, 12, 13))
    assert tree.report("a", (1, 2, 3, 11, 12, 13)) == 0
    tree.put("r", (21, 22))
    tree.start_turn("r", "a")
    assert tree.report("a", (21,), (3,)) == 0, "a block is still to be written, and another one still to go"
    assert (tree.held_blocks("r", "a"), tree.held_blocks("p", "a")) == (2, 0)
    tree.end_turn("r", "a")
    assert tree.report("a", (), late=("r",)) == 1, "its output needed no block after all"
    assert tree.report("a", ()) == 2


def test_a_turn_in_flight_is_to_write_no_more_than_it_lacked() -> None:
    tree = tree_of(9, p=(1, 2, 3))
    assert tree.report("a", (1, 2, 3)) == 0
    tree.put("p", (1, 2, 3, 4))
    tree.start_turn("p", "a")
    assert tree.report("a", ()) == 0
    assert tree.report("a", (), (2, 3)) == 2, "gone before it was scheduled"
    tree.end_turn("p", "a")
    assert tree.report("a", (2, 3, 4), late=("p",)) == 0
    assert tree.report("a", ()) == 0
    tree.start_turn("p", "a")
    assert tree.report("a", (), (4,)) == 1, "it lacked nothing"
    tree.end_turn("p", "a")
    assert tree.report("a", (4,)) == 0
    assert not tree._pools["a"].writing


def test_without_news_nothing_is_kept_of_turns_that_are_over() -> None:
    tree = PrefixTree()
    tree.add_backend("a", 10)
    tree.put("p", (1, 2))
    for _ in range(2):
        tree.start_turn("p", "a")
    for _ in range(2):
        assert tree._pools["a"].writing == {"p": 2}
        tree.end_turn("p", "a")
    assert not tree._pools["a"].writing
    assert not tree._pools["a"].running


def test_a_turn_in_flight_is_the_last_to_go() -> None:
    tree = tree_of(6, p=(1, 2, 3))
    tree.start_turn("p", "a")
    tree.put("q", (11, 12, 13))
    tree.hold("q", "a")
    tree.put("r", (21, 22))
    tree.hold("r", "a")
    assert [tree.held_blocks(name, "a") for name in "pqr"] == [3, 1, 2]
    tree.put("s", (31, 32, 33, 34))
    tree.hold("s", "a")
    assert [tree.held_blocks(name, "a") for name in "pqrs"] == [3, 0, 0, 3]


def test_changes_that_follow_on_nothing_known_are_nothing() -> None:
    tree = PrefixTree()
    tree.add_backend("a", 10)
    tree.put("p", (1, 2))
    tree.hold("p", "a")
    assert tree.report("a", (1,)) is None
    assert tree.report("a", (1,), whole=True) == 1
    assert tree.report("a", None) is None
    assert tree.report("a", (), (1,)) is None
    assert tree.held_blocks("p", "a") == 1


def test_what_only_news_could_find_again_is_let_go_with_the_news() -> None:
    tree = tree_of(3, p=(1, 2, 3), q=(11, 12, 13))
    tree.remove("p")
    assert len(tree._root.children) == 2
    assert tree.report("a", None) is None
    assert len(tree._root.children) == 1
    tree.remove("q")
    tree.remove_backend("a")
    assert not tree._root.children


def test_a_turn_that_was_dropped_is_found_again_after_it() -> None:
    tree = tree_of(3, p=(1, 2, 3))
    tree.start_turn("p", "a")
    tree.put("q", (11, 12))
    tree.start_turn("q", "a")
    assert tree.held_blocks("p", "a") == 1, "more was granted than there is room for"
    assert tree.report("a", (1, 2, 3)) == 0
    tree.end_turn("p", "a")
    tree.end_turn("q", "a")
    assert tree.report("a", ()) == 2 + 2
    assert (tree.held_blocks("p", "a"), tree.held_blocks("q", "a")) == (3, 0)


def test_programs_that_ended_are_kept_until_the_engine_gave_them_up() -> None:
    tree = tree_of(3, p=(1, 2, 3), q=(11, 12, 13))
    tree.remove("p")
    assert tree.report("a", (1, 2, 3)) == 3 + 3
    tree.put("again", (1, 2, 3, 4))
    assert tree.held_blocks("again", "a") == 3
    tree.remove("q")
    tree.remove("again")
    assert tree.report("a", (), (1, 2, 3)) == 3
    assert not tree._root.children, "nothing is left"


def test_a_run_that_was_dropped_is_found_again_in_both_its_parts() -> None:
    tree = tree_of(4, p=(1, 2, 3, 4), q=(11, 12))
    assert tree.held_blocks("p", "a") == 2
    tree.put("fork", (1, 23))
    tree.add_backend("a", 6)
    assert tree.report("a", (1, 2, 3, 4, 11, 12)) == 2
    assert (tree.held_blocks("p", "a"), tree.held_blocks("fork", "a")) == (4, 1)


def releasing(max_blocks: int, **programs: tuple[int, ...]) -> PrefixTree:
    """As `tree_of`, of an engine that releases and on which the programs are."""
    tree = PrefixTree()
    tree.add_backend("a", max_blocks, releases=True)
    assert tree.report("a", (), whole=True) == 0
    for name, hashes in programs.items():
        tree.put(name, hashes)
        tree.bind(name, "a")
        run_turn(tree, name)
    return tree


def run_turn(tree: PrefixTree, program: str) -> None:
    tree.start_turn(program, "a")
    tree.end_turn(program, "a")


def test_what_only_a_program_that_left_had_goes_first_from_the_next_turn_on() -> None:
    tree = releasing(10, p=(1, 2, 3), q=(1, 12, 13), r=(1, 22, 23))
    tree.bind("r", None)
    tree.bind("q", None)
    tree.put("s", (31, 32, 33, 34))
    tree.bind("s", "a")
    run_turn(tree, "s")
    assert [tree.held_blocks(name, "a") for name in "pqrs"] == [3, 2, 3, 4], "the last to leave loses its tail"
    tree.hold("q", "a", 3)
    assert [tree.held_blocks(name, "a") for name in "pqrs"] == [3, 2, 3, 4], "its late news changes no order"
    tree.put("s", (31, 32, 33, 34, 35, 36))
    run_turn(tree, "s")
    assert [tree.held_blocks(name, "a") for name in "pqrs"] == [3, 1, 2, 6], (
        "then the one before; never what others have"
    )


def test_a_program_that_is_back_before_the_next_turn_has_not_left() -> None:
    tree = releasing(6, p=(1, 2, 3), q=(11, 12, 13))
    tree.bind("q", None)
    tree.bind("q", "a")
    tree.put("r", (21,))
    tree.bind("r", "a")
    run_turn(tree, "r")
    assert [tree.held_blocks(name, "a") for name in "pqr"] == [2, 3, 1]


def test_who_left_a_cache_that_is_void_since_means_nothing() -> None:
    tree = releasing(6, p=(1, 2, 3), q=(11, 12, 13))
    tree.bind("q", None)
    tree.forget_held("a")
    tree.hold("q", "a")
    run_turn(tree, "p")
    assert [tree.held_blocks(name, "a") for name in "pq"] == [3, 3]
    tree.put("r", (21,))
    tree.bind("r", "a")
    run_turn(tree, "r")
    assert [tree.held_blocks(name, "a") for name in "pqr"] == [3, 2, 1], "it is there for a program that is not"


def test_which_of_the_blocks_that_nobody_has_are_left_does_not_count_but_how_many() -> None:
    tree = tree_of(6, p=(1, 2, 3), q=(11, 12, 13))
    tree.remove("p")
    tree.remove("q")
    tree.put("r", (21, 22))
    tree.hold("r", "a")
    assert tree.report("a", (1, 2, 3, 11, 21, 22)) == 0, "believed: one of p, three of q"
    assert tree.report("a", (), (2, 3)) == 2


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.sampled_from("pqrs"), st.integers(1, 8)),
        st.tuples(st.just("end"), st.sampled_from("pqrs"), st.none()),
        st.tuples(st.just("remove"), st.sampled_from("pqrs"), st.none()),
        st.tuples(st.just("bind"), st.sampled_from("pqrs"), st.sampled_from(["a", None])),
        st.tuples(st.just("report"), st.sets(st.integers(0, 5)), st.booleans()),
        st.tuples(st.just("forget"), st.none(), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, releases=st.booleans())
def test_after_a_report_belief_is_what_the_engine_holds(
    steps: list[tuple[str, object, object]], releases: bool
) -> None:
    """Programs share their first two blocks; the engine holds any prefixes it likes."""
    tree = PrefixTree()
    tree.add_backend("a", 12, releases=releases)
    sequences: dict[str, tuple[int, ...]] = {}
    resident: set[int] = set()
    for what, who, how in steps:
        if what == "turn" and who not in tree._pools["a"].running:
            sequences[who] = tuple(block if block < 2 else 100 * ord(who) + block for block in range(how))
            tree.put(who, sequences[who])
            tree.start_turn(who, "a")
        elif what == "end" and who in tree._pools["a"].running:
            tree.end_turn(who, "a")
        elif what == "bind" and who in sequences and who not in tree._pools["a"].running:
            tree.bind(who, how)
        elif what == "remove" and who in sequences and who not in tree._pools["a"].running:
            tree.remove(who)
            del sequences[who]
        elif what == "forget":
            tree.forget_held("a")
        elif what == "report":
            before, resident = resident, {b for i in who for name in sequences for b in sequences[name][: i + 1]}
            known = tree._pools["a"].resident is not None
            if how or not known:
                drift = tree.report("a", resident, whole=True)
            else:
                drift = tree.report("a", resident - before, before - resident)
            assert drift is not None
            assert drift >= 0
            for name, sequence in sequences.items():
                if name not in tree._pools["a"].running:
                    really = next((i for i, block in enumerate(sequence) if block not in resident), len(sequence))
                    assert tree.held_blocks(name, "a") <= really or tree._pools["a"].running
            assert tree.report("a", ()) == 0 or tree._pools["a"].running or tree._pools["a"].num_over == 0
        pool = tree._pools["a"]
        assert pool.num_held == sum(run.held["a"] for run in pool.recent) <= 12
        assert all(0 < run.held["a"] <= len(run.hashes) for run in pool.recent)


# The scheduler


def ledger_of(shell: Harness) -> Ledger:
    policy = shell.scheduler._policy
    assert isinstance(policy, AdaptivePolicy)
    return policy._ledger


@pytest.fixture
def shell() -> Harness:
    shell = Harness(SchedulerConfig(policy="adaptive"))
    for name in ("a", "b"):
        shell.send(BackendUp(backend=name, generation=1, capacity_tokens=1000, max_running=8, block_size=BLOCK))
    return shell


def tell(shell: Harness, stored: tuple[int, ...] | None, removed: tuple[int, ...] = (), **fields: object) -> int | None:
    given = {"backend": "a", "generation": 1, "whole": False, **fields}
    shell.send(BackendStats(stored=stored, removed=removed, **given))
    return next(b.drift_tokens for b in shell.scheduler.snapshot().backends if b.backend == given["backend"])


def turn(shell: Harness, program: str, hashes: tuple[int, ...]) -> None:
    shell.ask(program, BLOCK * len(hashes), block_hashes=hashes)
    shell.now += 1.0
    shell.end(program, 0)


def test_drift_is_counted_in_tokens_and_unknown_without_news(shell: Harness) -> None:
    turn(shell, "p", (1, 2, 3))
    shell.now += 5.0
    assert tell(shell, None) is None
    assert tell(shell, (1, 2), whole=True) == BLOCK
    assert tell(shell, ()) == 0
    assert tell(shell, None) is None
    assert shell.scheduler.snapshot().backends[1].drift_tokens is None, "the other one said nothing"


def test_news_that_may_be_older_than_a_turn_changes_nothing_of_it(shell: Harness) -> None:
    assert tell(shell, (), whole=True) == 0
    shell.ask("p", 30, block_hashes=(1, 2, 3))
    assert tell(shell, ()) == 0, "in flight"
    shell.end("p", 0)
    assert tell(shell, ()) == 0, "just over"
    account = ledger_of(shell).backends["a"]
    assert ledger_of(shell).resident_tokens("p", account) == 30
    shell.now += 1.0
    assert tell(shell, ()) == 30
    assert ledger_of(shell).resident_tokens("p", account) == 0


def test_a_program_whose_cache_is_gone_goes_wherever_it_costs_least(shell: Harness) -> None:
    turn(shell, "p", (1, 2, 3))
    shell.now += 5.0
    ledger = ledger_of(shell)
    program = shell.scheduler._state.programs["p"]
    before_s = ledger.prefill_s(program, ledger.backends["a"])
    assert tell(shell, (), whole=True) == 30
    assert ledger.prefill_s(program, ledger.backends["a"]) > before_s


def test_a_restarted_engine_starts_from_nothing_known(shell: Harness) -> None:
    turn(shell, "p", (1, 2, 3))
    shell.now += 5.0
    assert tell(shell, (1, 2, 3), whole=True) == 0
    shell.send(BackendUp(backend="a", generation=2, capacity_tokens=1000, max_running=8, block_size=BLOCK))
    assert tell(shell, (9,)) is None, "news of the old one"
    assert tell(shell, (9,), generation=2) is None, "what it follows on was never told"
    assert tell(shell, (9,), generation=2, whole=True) == 0
    shell.down("a", generation=2)
    shell.send(BackendStats(backend="a", generation=2, stored=(9,), whole=True))


def test_recorded_news_replays_to_the_same_decisions(shell: Harness) -> None:
    for number in range(12):
        program = f"p{number % 5}"
        turn(shell, program, tuple(range(100 * (number % 5), 100 * (number % 5) + 20 + number)))
        tell(shell, tuple(range(100 * (number % 5), 100 * (number % 5) + number)), (), whole=number % 3 == 0)
    assert replay(shell.config, shell.log) == shell.decisions
