"""The prefix tree against a naive model that keeps every block in sets."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thunder_rollout.core.prefix import PrefixTree
from thunder_rollout.errors import BadEvent

BACKENDS = ("a", "b")
CAPACITY_BLOCKS = 14
PROGRAMS = st.sampled_from(["p", "q", "r", "s"])
TOKENS = st.lists(st.integers(0, 2), max_size=9)


def hashes(tokens: list[int]) -> tuple[int, ...]:
    """Equal hash, equal prefix: each names the whole prefix up to it."""
    value, chain = 1, []
    for token in tokens:
        value = value * 3 + token
        chain.append(value)
    return tuple(chain)


class Naive:
    """Sets of hashes; a cache is a list of blocks, least recently used first."""

    def __init__(self) -> None:
        self.sequences: dict[str, tuple[int, ...]] = {}
        self.homes: dict[str, str | None] = {}
        self.caches: dict[str, list[int]] = {name: [] for name in BACKENDS}

    def unique(self, backend: str, without: str | None = None) -> set[int]:
        programs = [p for p, home in self.homes.items() if home == backend and p != without]
        return {block for p in programs for block in self.sequences[p]}

    def held(self, program: str, backend: str) -> int:
        sequence = self.sequences.get(program, ())
        return next((i for i, block in enumerate(sequence) if block not in self.caches[backend]), len(sequence))

    def hold(self, program: str, backend: str, num_blocks: int) -> None:
        used = self.sequences[program][:num_blocks]
        cache = self.caches[backend]
        self.caches[backend] = [block for block in cache if block not in used] + list(reversed(used))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), PROGRAMS, TOKENS),
        st.tuples(st.just("grow"), PROGRAMS, TOKENS),
        st.tuples(st.just("bind"), PROGRAMS, st.sampled_from([None, *BACKENDS])),
        st.tuples(st.just("hold"), PROGRAMS, st.tuples(st.sampled_from(BACKENDS), st.integers(0, 9))),
        st.tuples(st.just("remove"), PROGRAMS, st.none()),
        st.tuples(st.just("forget"), PROGRAMS, st.sampled_from(BACKENDS)),
    ),
    max_size=40,
)


def play(tree: PrefixTree, naive: Naive, what: str, program: str, how: object) -> None:
    known = program in naive.sequences
    if what in ("put", "grow"):
        old = naive.sequences.get(program, ())
        new = hashes(how) if what == "put" else old + tuple(hash((old, i)) % 2**63 for i, _ in enumerate(how))
        kept = sum(a == b for a, b in zip(old, new, strict=False))
        assert tree.put(program, new) == kept
        naive.sequences[program] = new
        naive.homes.setdefault(program, None)
    elif what == "forget":
        tree.forget_held(how)
        naive.caches[how] = []
    elif not known:
        assert program not in tree
    elif what == "bind":
        tree.bind(program, how)
        naive.homes[program] = how
    elif what == "hold":
        tree.hold(program, how[0], how[1])
        naive.hold(program, *how)
    else:
        tree.remove(program)
        del naive.sequences[program], naive.homes[program]


@settings(max_examples=400, deadline=None)
@given(steps=STEPS)
@example(steps=[("put", "p", [0, 0]), ("hold", "p", ("a", 1)), ("put", "p", []), ("put", "p", [0])])
def test_the_tree_counts_as_sets_of_blocks_do(steps: list[tuple[str, str, object]]) -> None:
    tree, naive = PrefixTree(), Naive()
    for name in BACKENDS:
        tree.add_backend(name, 10**6)
    for step in steps:
        play(tree, naive, *step)
        for name in BACKENDS:
            assert tree.unique_blocks(name) == len(naive.unique(name))
            for program, sequence in naive.sequences.items():
                assert tree.num_blocks(program) == len(sequence)
                assert tree.added_blocks(program, name) == len(set(sequence) - naive.unique(name))
                assert tree.held_blocks(program, name) == naive.held(program, name)
        for program, home in naive.homes.items():
            alone = set(naive.sequences[program]) - naive.unique(home, without=program) if home else ()
            assert tree.exclusive_blocks(program) == len(alone)
    for program in list(naive.sequences):
        tree.remove(program)
    for name in BACKENDS:
        assert tree.unique_blocks(name) == 0
        tree.remove_backend(name)
    assert not tree._root.children, "nothing is left of a program that nobody holds"


@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_holds_are_bounded_by_the_pool(steps: list[tuple[str, str, object]]) -> None:
    tree, naive = PrefixTree(), Naive()
    for name in BACKENDS:
        tree.add_backend(name, CAPACITY_BLOCKS)
    for step in steps:
        play(tree, naive, *step)
        for name, pool in tree._pools.items():
            held = [run.held[name] for run in pool.recent]
            assert pool.num_held == sum(held) <= CAPACITY_BLOCKS
            assert all(0 < count <= len(run.hashes) for count, run in zip(held, pool.recent, strict=True))
            for program in naive.sequences:
                assert tree.held_blocks(program, name) <= naive.held(program, name)


def test_the_least_recently_used_tail_is_evicted_first() -> None:
    tree = PrefixTree()
    tree.add_backend("a", 6)
    tree.put("p", (1, 2, 3, 4))
    tree.hold("p", "a")
    tree.put("q", (1, 2, 13, 14, 15))
    tree.hold("q", "a")
    assert tree.held_blocks("q", "a") == 5
    assert tree.held_blocks("p", "a") == 3, "the shared head was used again; of its own tail one block went"
    tree.add_backend("a", 4)
    assert (tree.held_blocks("p", "a"), tree.held_blocks("q", "a")) == (2, 4)


def test_a_shared_prefix_is_charged_once() -> None:
    tree = PrefixTree()
    tree.add_backend("a", 100)
    for number in range(8):
        tree.put(f"p{number}", (*range(1, 51), 100 + number))
        tree.bind(f"p{number}", "a")
    assert tree.unique_blocks("a") == 58
    assert tree.exclusive_blocks("p0") == 1
    assert set(tree.holders("p0")) == set()
    tree.hold("p0", "a")
    assert list(tree.holders("p0")) == ["a"]
    assert list(tree.holders("p1")) == ["a"]
    assert tree.held_blocks("p1", "a") == 50


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_hashes_that_are_no_hashes_are_refused(bad: int) -> None:
    tree = PrefixTree()
    with pytest.raises(BadEvent, match="block_hashes"):
        tree.put("p", (1, bad))
    assert "p" not in tree
