"""vLLM's block events, from a publisher that speaks its wire format: translation, gaps, what can't be followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.hashing import block_hashes
from thunder_rollout.engine.kv_events import KvEvents
from thunder_rollout.engine.scratch import Scratch

SIZE = 4
IDS = list(range(100))
OURS = block_hashes(IDS, SIZE)


def name(index: int) -> bytes:
    """vLLM's name of the block `index` of `IDS`."""
    return b"vllm-%d" % index


def stored(first: int, end: int, **fields: Any) -> dict[str, Any]:
    given = {
        "type": "BlockStored",
        "block_hashes": [name(index) for index in range(first, end)],
        "parent_block_hash": name(first - 1) if first else None,
        "token_ids": IDS[first * SIZE : end * SIZE],
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * (end - first),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return given | fields


def removed(*indices: int, **fields: Any) -> dict[str, Any]:
    return {
        "type": "BlockRemoved",
        "block_hashes": [name(i) for i in indices],
        "medium": "GPU",
        "group_idx": 0,
    } | fields


CLEARED = {"type": "AllBlocksCleared"}


class Publisher:
    """Answers replay requests as vLLM does, from the batches it still has."""

    def __init__(self, endpoint: str) -> None:
        self.batches: dict[int, bytes] = {}
        self.num_dropped = 0  # of the next answer's last messages, its end included
        self.skipped: int | None = None  # in the next answer
        self._number = 0
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.bind(endpoint)

    def publish(self, *events: dict[str, Any]) -> None:
        self.batches[self._number] = msgspec.msgpack.encode([0.0, list(events), 0])
        self._number += 1

    async def serve(self) -> None:
        while True:
            client, _, start = await self._socket.recv_multipart()
            rows = [(n, b) for n, b in self.batches.items() if n >= int.from_bytes(start, "big") and n != self.skipped]
            self.skipped = None
            answer = [*((n.to_bytes(8, "big"), b) for n, b in rows), ((-1).to_bytes(8, "big", signed=True), b"")]
            answer, self.num_dropped = answer[: len(answer) - self.num_dropped], 0
            for number, payload in answer:
                await self._socket.send_multipart((client, b"", b"", number, payload))

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture
async def events() -> AsyncIterator[KvEvents]:
    scratch = Scratch()
    events = KvEvents(scratch.path)
    events.start(SIZE)
    yield events
    events.close()
    events.close()
    scratch.close()


@pytest.fixture
async def publisher(events: KvEvents) -> AsyncIterator[Publisher]:
    publisher = Publisher(events.replay_endpoint)
    serving = asyncio.create_task(publisher.serve())
    yield publisher
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    publisher.close()


async def told(events: KvEvents) -> tuple[list[int], list[int]]:
    """Stored and removed, as indices into IDS' blocks."""
    changes = await events.changes(whole=False)
    assert changes is not None
    return sorted(map(OURS.index, changes.stored)), sorted(map(OURS.index, changes.removed))


async def test_blocks_are_told_by_our_hashes(events: KvEvents, publisher: Publisher) -> None:
    publisher.publish(stored(0, 3))
    publisher.publish(stored(3, 5), removed(2))
    assert await events.changes(whole=False) == CacheChanges(
        stored=tuple(sorted(OURS[i] for i in (0, 1, 3, 4))), removed=(), whole=True
    )
    publisher.publish(removed(4), stored(4, 6))
    assert await told(events) == ([5], [])
    assert await told(events) == ([], [])


async def test_a_block_is_there_until_its_last_copy_is_gone(events: KvEvents, publisher: Publisher) -> None:
    publisher.publish(stored(0, 2), stored(0, 2))
    assert await told(events) == ([0, 1], [])
    publisher.publish(removed(1))
    assert await told(events) == ([], [])
    publisher.publish(removed(1))
    assert await told(events) == ([], [1])


async def test_a_reset_is_known_before_it_is_published(events: KvEvents, publisher: Publisher) -> None:
    publisher.publish(stored(0, 2))
    await events.changes(whole=False)
    publisher.publish(stored(2, 4))
    events.note_cleared()
    assert await told(events) == ([], [0, 1])
    publisher.publish(CLEARED, stored(0, 1))
    assert await told(events) == ([0], [])


async def test_events_that_the_buffer_lost_leave_the_cache_unknown_until_it_is_cleared(
    events: KvEvents, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    publisher.publish(stored(0, 2))
    await events.changes(whole=False)
    for _ in range(3):
        publisher.publish(stored(2, 3))
    del publisher.batches[1]
    assert await events.changes(whole=False) is None
    assert "1 to 1 are lost" in caplog.text
    publisher.publish(removed(7), stored(9, 10))
    assert await events.changes(whole=True) is None
    events.note_cleared()
    assert await events.changes(whole=False) is None
    publisher.publish(CLEARED, stored(0, 1))
    assert await events.changes(whole=False) == CacheChanges(stored=(OURS[0],), removed=(), whole=True)


async def test_an_answer_that_was_cut_is_asked_for_again(
    events: KvEvents, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thunder_rollout.engine.kv_events._ANSWER_TIMEOUT_S", 0.2)
    for index in range(4):
        publisher.publish(stored(index, index + 1))
    publisher.num_dropped = 3
    assert await told(events) == ([0, 1], [])
    assert await told(events) == ([2, 3], [])
    publisher.publish(stored(4, 5))
    reading = asyncio.create_task(events.changes(whole=False))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert await told(events) == ([4], [])


async def test_a_gap_within_an_answer_is_asked_for_again(events: KvEvents, publisher: Publisher) -> None:
    for index in range(4):
        publisher.publish(stored(index, index + 1))
    publisher.skipped = 2
    assert await told(events) == ([0, 1, 2, 3], [])


async def test_other_tiers_are_left_out(events: KvEvents, publisher: Publisher) -> None:
    publisher.publish(stored(0, 2), stored(0, 2, medium="CPU"), removed(0, 5, medium="CPU"))
    assert await told(events) == ([0, 1], [])


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (stored(0, 1, lora_name="adapter"), "LoRA"),
        (stored(0, 1, extra_keys=[["salt"]]), "a salt"),
        (stored(0, 1, group_idx=1), "group 1"),
        (stored(0, 1, kv_cache_spec_kind="sliding_window"), "sliding_window"),
        (stored(0, 1, block_size=2), "2 tokens"),
        (stored(0, 2, block_hashes=[name(0)]), "tokens"),
        (stored(1, 2), "parent"),
        (removed(0), "never stored"),
        ({"type": "BlocksMoved"}, "BlocksMoved"),
    ],
)
async def test_what_cannot_be_followed_ends_it_with_one_warning(
    events: KvEvents, publisher: Publisher, caplog: pytest.LogCaptureFixture, event: dict[str, Any], why: str
) -> None:
    publisher.publish(event)
    assert await events.changes(whole=False) is None
    publisher.publish(stored(0, 1))
    assert await events.changes(whole=False) is None
    (record,) = caplog.records
    assert why in record.getMessage()


async def test_an_engine_that_serves_no_more_tells_nothing_new(
    events: KvEvents, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("thunder_rollout.engine.kv_events._ANSWER_TIMEOUT_S", 0.05)
    assert await told(events) == ([], [])
    assert "did not tell" in caplog.text
