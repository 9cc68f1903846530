from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from thunder_rollout.engine.hashing import ROOT_HASH, BlockHasher, block_hashes, chain_hash

token_ids = st.lists(st.integers(0, 3), max_size=40)


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(block_hashes(range(length), 4)) for length in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_hash_names_the_whole_prefix() -> None:
    one, other = block_hashes([1, 2, 3, 4], 2), block_hashes([9, 2, 3, 4], 2)
    assert one[1] != other[1]
    assert one == [chain_hash(ROOT_HASH, [1, 2]), chain_hash(chain_hash(ROOT_HASH, [1, 2]), [3, 4])]


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    assert block_hashes([1, 2, 3, 4], 2) == [18389742664249816232, 11220972698411055348]
    code = "from thunder_rollout.engine.hashing import *; print(*block_hashes([1, 2, 3, 4], 2))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in out.split()] == block_hashes([1, 2, 3, 4], 2)


@given(st.lists(token_ids, max_size=6), st.integers(1, 5))
def test_hashing_as_it_grows_shrinks_and_forks_is_hashing_afresh(histories: list[list[int]], block_size: int) -> None:
    hasher = BlockHasher(block_size)
    for history in histories:
        assert hasher.hashes(history) == BlockHasher(block_size).hashes(history)


def test_the_hashers_own_list_is_not_handed_out() -> None:
    hasher = BlockHasher(1)
    hasher.hashes([1, 2]).clear()
    assert hasher.hashes([1, 2, 3]) == block_hashes([1, 2, 3], 1)
