"""vLLM's block events, read by asking: which blocks does the engine's prefix cache hold?

vLLM numbers the batches of its events and keeps the newest for replay (`ZmqEventPublisher`). Each
`read` asks for all batches since the last one, so there is nothing to subscribe to, nothing to drop
and one way to find a gap: the first batch that comes is not the next one. Then the buffer has lost
events, and nothing is known until the cache is cleared, as every weight update does: vLLM has no way to
ask for all it holds. Meanwhile the scheduler hears of usage alone, and tells no drift.

The engine names a block by a hash of its own; it is translated, through the token ids that come with
it, to `engine.hashing`'s. Two blocks of one content are one hash, resident until both are gone.
vLLM publishes with its steps: that an idle engine cleared its cache it says at the next turn only,
so whoever clears it also calls `note_cleared`.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from thunder_rollout.engine.cache_report import CacheChanges, CacheReport
from thunder_rollout.engine.hashing import ROOT_HASH, chain_hash

logger = logging.getLogger(__name__)

BUFFER_STEPS = 20_000  # batches (steps that changed the cache) that vLLM keeps: minutes of them
_ANSWER_TIMEOUT_S = 2.0  # vLLM looks for requests every 0.1 s at least
_END = -1
_MEDIUM = "GPU"  # what vLLM calls the pool it computes in, on CPUs too
_FOLLOWED_KINDS = (None, "full_attention", "mla_attention")

_Hash = bytes | int


class BlockStored(msgspec.Struct, tag=True):
    """As in `vllm.distributed.kv_events`, whose names these are."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    block_hashes: list[_Hash]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Unfollowable(Exception):
    """An event that says what this project can't follow; the text says which."""


class ResidentBlocks:
    """The engine's blocks by our hashes, from its events in order."""

    def __init__(self, block_size: int) -> None:
        self.complete = True  # False: events were lost since the cache was last cleared
        self._block_size = block_size
        self._ours: dict[_Hash, int] = {}
        self._copies: dict[_Hash, int] = {}
        self._num_clears_due = 0  # told by `note_cleared` and not yet by an event

    def hashes(self) -> list[int]:
        return list(self._ours.values())

    def lost(self) -> None:
        self._clear()
        self.complete = False
        self._num_clears_due = 0

    def note_cleared(self) -> None:
        """What events tell from now to the next `AllBlocksCleared` is older than this."""
        if self.complete:
            self._clear()
            self._num_clears_due += 1

    def apply(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        """Raises `Unfollowable`."""
        if isinstance(event, AllBlocksCleared):
            self._clear()
            self.complete = True
            self._num_clears_due = max(0, self._num_clears_due - 1)
        elif self._num_clears_due or not self.complete or event.medium not in (None, _MEDIUM):
            return
        elif isinstance(event, BlockStored):
            self._store(event)
        else:
            for block_hash in event.block_hashes:
                self._remove(block_hash)

    def _store(self, event: BlockStored) -> None:
        size = self._block_size
        if event.block_size != size or len(event.token_ids) != size * len(event.block_hashes):
            raise Unfollowable(f"a block of {event.block_size} tokens where the engine's have {size}")
        if event.group_idx or event.kv_cache_spec_kind not in _FOLLOWED_KINDS:
            raise Unfollowable(f"a cache of kind {event.kv_cache_spec_kind}, group {event.group_idx}")
        if event.lora_name is not None or any(event.extra_keys or ()):
            raise Unfollowable("a block that is not named by its tokens alone (LoRA, images, a salt)")
        parent = ROOT_HASH if event.parent_block_hash is None else self._ours.get(event.parent_block_hash)
        if parent is None:
            raise Unfollowable("a block whose parent was never stored")
        for index, block_hash in enumerate(event.block_hashes):
            parent = chain_hash(parent, event.token_ids[index * size : (index + 1) * size])
            self._ours[block_hash] = parent
            self._copies[block_hash] = self._copies.get(block_hash, 0) + 1

    def _remove(self, block_hash: _Hash) -> None:
        num_copies = self._copies.pop(block_hash, 0)
        if num_copies > 1:
            self._copies[block_hash] = num_copies - 1
        elif num_copies == 0:
            raise Unfollowable("the removal of a block that was never stored")
        else:
            del self._ours[block_hash]

    def _clear(self) -> None:
        self._ours.clear()
        self._copies.clear()


class KvEvents:
    """One engine's events; `endpoint` and `replay_endpoint` are for vLLM's `KVEventsConfig`, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder / 'events'}"
        self.replay_endpoint = f"ipc://{folder / 'replay'}"
        self._decoder = msgspec.msgpack.Decoder(_Batch)
        self._report = CacheReport()
        self._reading = asyncio.Lock()
        self._blocks: ResidentBlocks | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._is_answering = False  # a request was sent and its answer is not at its end
        self._next = 0  # the number of the first batch that was not read

    def start(self, block_size: int) -> None:
        """The engine serves, in blocks of `block_size` tokens."""
        self._blocks = ResidentBlocks(block_size)

    async def changes(self, *, whole: bool) -> CacheChanges | None:
        """None while nothing is known: after a loss, and for good once an event can't be followed."""
        async with self._reading:
            if self._blocks is None:
                return None
            try:
                await self._read(self._blocks)
            except (Unfollowable, msgspec.MsgspecError) as error:
                logger.warning("KV events are off for this engine, usage alone is known: %s", error)
                self._blocks = None
                self._disconnect()
                return None
            if not self._blocks.complete:
                self._report.void()
                return None
            return self._report.changes(self._blocks.hashes(), whole=whole)

    def note_cleared(self) -> None:
        if self._blocks is not None:
            self._blocks.note_cleared()

    def close(self) -> None:
        """Idempotent."""
        self._disconnect()

    async def _read(self, blocks: ResidentBlocks) -> None:
        """As far as the engine answers in time; the next call goes on from there."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                while not await self._read_once(blocks):
                    pass
        except TimeoutError:
            logger.warning("the engine did not tell its KV events within %.0f s", _ANSWER_TIMEOUT_S)
        finally:
            if self._is_answering:  # the rest would be taken for the next answer
                self._disconnect()

    async def _read_once(self, blocks: ResidentBlocks) -> bool:
        """Whether everything came; a full pipe drops what comes after, which is then asked for again."""
        socket = self._connect()
        self._is_answering = True
        await socket.send_multipart((b"", self._next.to_bytes(8, "big")))
        is_first = is_whole = True
        while True:
            _, _, number_bytes, payload = await socket.recv_multipart()
            number = int.from_bytes(number_bytes, "big", signed=True)
            if number == _END:
                self._is_answering = False
                return is_whole
            if number != self._next and not is_first:
                is_whole = False
                continue
            if number != self._next:
                logger.warning("KV events %d to %d are lost; unknown until cleared", self._next, number - 1)
                blocks.lost()
            is_first = False
            self._next = number + 1
            for event in self._decoder.decode(payload).events:
                blocks.apply(event)

    def _connect(self) -> zmq.asyncio.Socket:
        if self._socket is None:
            self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
            self._socket.set_hwm(0)
            self._socket.connect(self.replay_endpoint)
        return self._socket

    def _disconnect(self) -> None:
        self._is_answering = False
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
