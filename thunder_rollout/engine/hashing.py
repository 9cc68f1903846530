"""Hashes of KV blocks: equal hash, equal prefix.

A block's hash covers its own token ids and its parent's hash, so it names the whole prefix up to
and including the block. Only full blocks have one. Hashes are unsigned 64-bit ints, the same in
every process and on every run.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

ROOT_HASH = 0  # the parent of a sequence's first block
_BYTES_PER_TOKEN = array("I").itemsize
_HASH_BYTES = 8


def chain_hash(parent: int, token_ids: Sequence[int]) -> int:
    """Hash of one full block of `token_ids` after the block whose hash is `parent`."""
    return _chain(parent, array("I", token_ids).tobytes())


def block_hashes(token_ids: Sequence[int], block_size: int) -> list[int]:
    """Hashes of the full blocks of `token_ids`, first to last."""
    return BlockHasher(block_size).hashes(token_ids)


class BlockHasher:
    """Hashes one sequence as it grows, each block once.

    The sequence may also shrink or fork: what it no longer shares with the last call is hashed anew.
    """

    def __init__(self, block_size: int) -> None:
        assert block_size > 0
        self._block_bytes = block_size * _BYTES_PER_TOKEN
        self._data = b""
        self._hashes: list[int] = []

    def hashes(self, token_ids: Sequence[int]) -> list[int]:
        """Hashes of the full blocks of `token_ids`; a new list each time."""
        data = array("I", token_ids).tobytes()
        kept = self._num_shared_blocks(data)
        hashes = self._hashes[:kept]
        parent = hashes[-1] if hashes else ROOT_HASH
        for start in range(kept * self._block_bytes, len(data) - self._block_bytes + 1, self._block_bytes):
            parent = _chain(parent, data[start : start + self._block_bytes])
            hashes.append(parent)
        self._data, self._hashes = data, hashes
        return hashes.copy()

    def _num_shared_blocks(self, data: bytes) -> int:
        """Leading full blocks that `data` and the last call's have in common, by bisection."""
        low, high = 0, min(len(self._hashes), len(data) // self._block_bytes)
        while low < high:
            middle = (low + high + 1) // 2
            start, end = low * self._block_bytes, middle * self._block_bytes
            if self._data[start:end] == data[start:end]:
                low = middle
            else:
                high = middle - 1
        return low


def _chain(parent: int, block: bytes) -> int:
    digest = hashlib.blake2b(parent.to_bytes(_HASH_BYTES, "little") + block, digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "little")
