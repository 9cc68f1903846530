"""Which program a request is of: all that verl tells is a name and a prompt.

Requests of one name are turns of one program while their prompts have the same head: prompts grow, and
may shrink or fork in between. A name that comes back with another head, or with just its first prompt
after it had gone on from it, is another program (names may repeat across training steps); the one before
is over. Samples of one prompt that began under the same weights are a group.

What a turn produced is not told: it is estimated from how much prompts grew so far, and exact again with
the program's next request.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from thunder_rollout.core.events import TurnRequested
from thunder_rollout.engine.hashing import ROOT_HASH, BlockHasher, chain_hash

VALIDATION = "validation"  # kind of task of validation traffic
VALIDATION_PREFIX = "validation#"  # of the names that callers who know (`thunder_swe`) give to such programs
HEAD_TOKENS = 64  # of a program's first prompt, by which it is known again
HASHER_IDLE_S = 60.0  # an idle program's prompt is not kept for longer; hashing it anew costs milliseconds
MAX_PUT_AWAY = 100_000  # programs whose arrival is remembered
_MEAN_TURNS = 50  # the running mean of growth forgets at this pace


@dataclass(slots=True)
class ProgramRecord:
    """What the router keeps of a program; `name` is the scheduler's, used once."""

    name: str
    request_id: str
    kind: str | None
    group: str | None
    head: list[int]
    first_tokens: int
    first_hash: int
    arrived_s: float
    prompt_tokens: int = 0
    num_open: int = 0  # requests that wait and turns in flight
    was_cut: bool = False  # its last turn was
    is_over: bool = False  # its caller said so, or its name is another program's now
    idle_since_s: float = 0.0
    hasher: BlockHasher | None = None
    ending: set[asyncio.Task[None]] = field(default_factory=set)  # turns whose end is being looked into
    num_requests: itertools.count[int] = field(default_factory=itertools.count)

    async def settled(self) -> None:
        """Until the ends that were told are taken in."""
        while self.ending:
            await asyncio.wait(set(self.ending))


@dataclass(frozen=True, slots=True, kw_only=True)
class _PutAway:
    """What is kept of a program that was idle for long."""

    head_tokens: int
    head_hash: int
    arrived_s: float

    def is_of(self, prompt_ids: list[int]) -> bool:
        return chain_hash(ROOT_HASH, prompt_ids[: self.head_tokens]) == self.head_hash


class Programs:
    """`block_size` None: nobody looks at hashes."""

    def __init__(self, *, block_size: int | None = None) -> None:
        self.block_size = block_size
        self.placeholder_ids: frozenset[int] = frozenset()
        self._current: dict[str, ProgramRecord] = {}  # by request id
        self._idle: OrderedDict[str, ProgramRecord] = OrderedDict()  # by name, longest idle first
        self._put_away: OrderedDict[str, _PutAway] = OrderedDict()  # by request id, longest ago first
        self._numbers = itertools.count()
        self._growth: defaultdict[str | None, _Mean] = defaultdict(_Mean)

    def __len__(self) -> int:
        """Programs whose name may come back."""
        return len(self._current)

    def current(self, request_id: str) -> ProgramRecord | None:
        return self._current.get(request_id)

    def recognise(
        self,
        request_id: str,
        prompt_ids: list[int],
        *,
        is_validation: bool = False,
        version: Any = None,
        now: float = 0.0,
    ) -> tuple[ProgramRecord, ProgramRecord | None]:
        """The request's program, and the one that is over with it, if any. Counts as open from now on."""
        record, before = self._current.get(request_id), None
        if record is not None and not _is_of(record, prompt_ids):
            self._idle.pop(record.name, None)
            record.is_over, before, record = True, record, None
        if record is None:
            record = self._open(request_id, prompt_ids, VALIDATION if is_validation else None, version, now)
        elif not record.was_cut and not record.num_open:
            self._growth[record.kind].add(len(prompt_ids) - record.prompt_tokens)
        record.prompt_tokens = len(prompt_ids)
        record.num_open += 1
        self._idle.pop(record.name, None)
        return record, before

    def request(self, record: ProgramRecord, prompt_ids: list[int], *, now: float = 0.0) -> TurnRequested:
        hashes: tuple[int, ...] | None = None
        if self.block_size is not None and self.placeholder_ids.isdisjoint(prompt_ids):
            record.hasher = record.hasher or BlockHasher(self.block_size)
            hashes = tuple(record.hasher.hashes(prompt_ids))
        return TurnRequested(
            program=record.name,
            request=f"{record.name}/{next(record.num_requests)}",
            prompt_tokens=len(prompt_ids),
            block_hashes=hashes,
            group=record.group,
            task_kind=record.kind,
            age_s=max(0.0, now - record.arrived_s),
        )

    def expected_growth(self, record: ProgramRecord, max_tokens: int | None) -> int:
        """By how much its context is expected to grow in a turn that may produce `max_tokens`."""
        tokens = max(0, round(self._growth[record.kind].value))
        return tokens if max_tokens is None else min(tokens, max_tokens)

    def closed(self, record: ProgramRecord, now: float) -> None:
        """One of its requests is no longer open."""
        record.num_open -= 1
        if not record.num_open and not record.is_over:
            record.idle_since_s = now
            self._idle[record.name] = record

    def forget(self, record: ProgramRecord) -> None:
        record.is_over = True
        self._idle.pop(record.name, None)
        if self._current.get(record.request_id) is record:
            del self._current[record.request_id]

    def put_away(self, record: ProgramRecord) -> None:
        """Forget it but for when it came: if its name comes back with its head, it is as old as it was."""
        self.forget(record)
        self._put_away[record.request_id] = _PutAway(
            head_tokens=len(record.head), head_hash=chain_hash(ROOT_HASH, record.head), arrived_s=record.arrived_s
        )
        if len(self._put_away) > MAX_PUT_AWAY:
            self._put_away.popitem(last=False)

    def idle_for(self, after_s: float, now: float) -> list[ProgramRecord]:
        """Programs with nothing open for so long; those idle for a while give their hashers up."""
        for record in self._idle.values():
            if now - record.idle_since_s < HASHER_IDLE_S:
                break
            record.hasher = None
        is_long = lambda record: now - record.idle_since_s >= after_s
        return list(itertools.takewhile(is_long, self._idle.values()))

    def _open(
        self, request_id: str, prompt_ids: list[int], kind: str | None, version: Any, now: float
    ) -> ProgramRecord:
        before = self._put_away.pop(request_id, None)
        first_hash = chain_hash(ROOT_HASH, prompt_ids)
        is_text = self.placeholder_ids.isdisjoint(prompt_ids)  # equal ids of images do not mean equal images
        record = self._current[request_id] = ProgramRecord(
            name=f"{request_id}@{next(self._numbers)}",
            request_id=request_id,
            kind=kind,
            group=f"{kind or ''}{version}:{first_hash:016x}" if is_text else None,
            head=prompt_ids[:HEAD_TOKENS],
            first_tokens=len(prompt_ids),
            first_hash=first_hash,
            arrived_s=before.arrived_s if before is not None and before.is_of(prompt_ids) else now,
        )
        return record


class _Mean:
    def __init__(self) -> None:
        self.value = 0.0
        self._num = 0

    def add(self, tokens: int) -> None:
        self._num += 1
        self.value += (tokens - self.value) / min(self._num, _MEAN_TURNS)


def _is_of(record: ProgramRecord, prompt_ids: Sequence[int]) -> bool:
    if list(prompt_ids[: len(record.head)]) != record.head:
        return False
    if record.num_open or record.was_cut or len(prompt_ids) != record.first_tokens:
        return True
    return chain_hash(ROOT_HASH, prompt_ids) != record.first_hash
