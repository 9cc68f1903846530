"""What an engine does with its turns, step by step: the one model of it, used by `FakeEngine` and
the simulator.

Continuous batching with chunked prefill and prefix caching, as vLLM's scheduler does it:
- a step gives every running turn its next tokens (one while decoding, up to the budget while
  prefilling), then admits waiting turns first come, first served, while budget, `max_running` and
  the pool allow; a turn is admitted only if all its tokens so far fit;
- the last token of a context is always computed, so a full hit stops one token short;
- where a running turn finds no block, the youngest running turn is preempted: it gives up all its
  blocks, goes to the head of the queue and is computed again (from the cache, if still there);
- a block can be hit from the moment its tokens are scheduled;
- what a released program alone has in the cache goes first (`engine.vllm_scheduler`).

Pure: no clock, no I/O, no randomness. `begin_step` says what runs and for how long, `end_step`
takes the tokens it yields.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from thunder_rollout.engine.block_pool import BlockPool, PoolStats
from thunder_rollout.engine.hashing import ROOT_HASH, block_hashes, chain_hash
from thunder_rollout.engine.sequences import MAX_EMPTY, Sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTiming:
    """Seconds of one step: `step_s`, plus each other term times its count in the step.

    The defaults are of the order of a 3.4M-parameter model on one CPU core.
    """

    step_s: float = 2e-3
    prefill_token_s: float = 6e-5
    decode_turn_s: float = 2e-4
    context_token_s: float = 2e-8  # per token of context that a scheduled turn attends to
    prefill_context_s: float = 0.0  # per prefilled token and token that it attends to


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    num_blocks: int
    block_size: int
    max_running: int
    max_batched_tokens: int
    enable_caching: bool = True

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """`sampled` are the requests that get their next token when the step ends."""

    took_s: float
    admitted: tuple[str, ...]
    sampled: tuple[str, ...]
    num_prefill_tokens: int
    num_decodes: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Turn:
    request_id: str
    program: str | None
    token_ids: list[int]  # the prompt, then what was sampled
    num_prompt: int
    hashes: list[int]  # of the full blocks of token_ids
    num_computed: int = 0
    cached_tokens: int | None = None  # hits when first admitted
    blocks: list[int] = field(default_factory=list)


class EngineModel:
    def __init__(self, shape: EngineShape, timing: EngineTiming) -> None:
        self.shape = shape
        self.timing = timing
        self._pool = BlockPool(shape.num_blocks, enable_caching=shape.enable_caching)
        self._sequences: Sequences[int] = Sequences()
        self._turns: dict[str, _Turn] = {}
        self._waiting: deque[_Turn] = deque()
        self._running: list[_Turn] = []
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def used_tokens(self) -> int:
        return self._pool.stats().num_held * self.shape.block_size

    def pool_stats(self) -> PoolStats:
        return self._pool.stats()

    def add(self, request_id: str, prompt_ids: list[int], program: str | None = None) -> None:
        """Queue a turn, of `program` if that may be released. It must fit the pool alone, prompt and
        output, or it waits for ever."""
        assert request_id not in self._turns
        assert prompt_ids
        turn = _Turn(
            request_id=request_id,
            program=program,
            token_ids=list(prompt_ids),
            num_prompt=len(prompt_ids),
            hashes=block_hashes(prompt_ids, self.shape.block_size),
        )
        self._turns[request_id] = turn
        self._waiting.append(turn)
        if program is not None:
            self._sequences.begin(program)
        if self._sequences.has_released:
            self._move_released()

    def remove(self, request_id: str) -> None:
        """The turn is over, finished or aborted; its blocks stay cached until they are needed."""
        turn = self._turns.pop(request_id)
        if turn in self._running:
            self._running.remove(turn)
            self._release(turn)
            if turn.program is not None:
                self._sequences.put(turn.program, turn.hashes)
        else:
            self._waiting.remove(turn)

    def release(self, program: str) -> None:
        """It gave its KV up: from the next turn that is added on, what it alone has in the cache goes first."""
        self._sequences.release(program)

    def _move_released(self) -> None:
        empty = self._pool.first_empty(MAX_EMPTY + 1)
        if len(empty) <= MAX_EMPTY:
            self._pool.demote(self._sequences.take_released(), behind=empty)

    def output_ids(self, request_id: str) -> list[int]:
        turn = self._turns[request_id]
        return turn.token_ids[turn.num_prompt :]

    def cached_tokens(self, request_id: str) -> int:
        """Of the prompt, when the turn was first admitted; 0 while it waits."""
        return self._turns[request_id].cached_tokens or 0

    def forget_cache(self) -> None:
        """Forget every cached block that no running turn holds."""
        self._pool.forget_free()

    def cached_hashes(self) -> Collection[int]:
        return self._pool.cached_hashes()

    def begin_step(self) -> Step | None:
        """Schedule the next step; None if there is nothing to do."""
        preemptions_before = self.num_preemptions
        work = self._schedule_running()
        num_old = len(work)
        if self.num_preemptions == preemptions_before:
            budget = self.shape.max_batched_tokens - sum(num_tokens for _, num_tokens in work)
            work += self._admit(budget)
        if not work:
            return None
        prefills = [(turn, n) for turn, n in work if n > 1 or len(turn.token_ids) == turn.num_prompt]
        num_decodes = len(work) - len(prefills)
        prefill_tokens = sum(num_tokens for _, num_tokens in prefills)
        context_tokens = sum(turn.num_computed for turn, _ in work)
        attended_tokens = sum(num_tokens * (turn.num_computed - num_tokens / 2) for turn, num_tokens in prefills)
        timing = self.timing
        return Step(
            took_s=timing.step_s
            + timing.prefill_token_s * prefill_tokens
            + timing.decode_turn_s * num_decodes
            + timing.context_token_s * context_tokens
            + timing.prefill_context_s * attended_tokens,
            admitted=tuple(turn.request_id for turn, _ in work[num_old:]),
            sampled=tuple(turn.request_id for turn, _ in work if turn.num_computed == len(turn.token_ids)),
            num_prefill_tokens=prefill_tokens,
            num_decodes=num_decodes,
        )

    def end_step(self, tokens: Mapping[str, int]) -> None:
        """The step is over and each request in `tokens` got its next token."""
        for request_id, token_id in tokens.items():
            turn = self._turns[request_id]
            turn.token_ids.append(token_id)
            block_size = self.shape.block_size
            if len(turn.token_ids) % block_size == 0:
                parent = turn.hashes[-1] if turn.hashes else ROOT_HASH
                turn.hashes.append(chain_hash(parent, turn.token_ids[-block_size:]))

    def _schedule_running(self) -> list[tuple[_Turn, int]]:
        """Each running turn with its number of tokens in this step."""
        work: list[tuple[_Turn, int]] = []
        budget = self.shape.max_batched_tokens
        index = 0
        while index < len(self._running) and budget > 0:
            turn = self._running[index]
            num_tokens = min(len(turn.token_ids) - turn.num_computed, budget)
            while not self._extend(turn, num_tokens):
                victim = self._running.pop()
                self._preempt(victim)
                if victim is turn:
                    return work
            work.append((turn, num_tokens))
            budget -= num_tokens
            index += 1
        return work

    def _admit(self, budget: int) -> list[tuple[_Turn, int]]:
        work: list[tuple[_Turn, int]] = []
        while self._waiting and budget > 0 and len(self._running) < self.shape.max_running:
            turn = self._waiting[0]
            block_size = self.shape.block_size
            num_total = len(turn.token_ids)
            hits = self._pool.match(turn.hashes[: (num_total - 1) // block_size])
            if not self._pool.fits(hits, _num_blocks(num_total, block_size) - len(hits)):
                break
            self._waiting.popleft()
            self._running.append(turn)
            self._pool.take(hits, 0)
            turn.blocks = hits
            turn.num_computed = len(hits) * block_size
            if turn.cached_tokens is None:
                turn.cached_tokens = turn.num_computed
            num_tokens = min(num_total - turn.num_computed, budget)
            extended = self._extend(turn, num_tokens)
            assert extended
            work.append((turn, num_tokens))
            budget -= num_tokens
        return work

    def _extend(self, turn: _Turn, num_tokens: int) -> bool:
        """Find blocks for the turn's next `num_tokens`; False if the pool is too full."""
        block_size = self.shape.block_size
        num_computed = turn.num_computed + num_tokens
        fresh = self._pool.take((), _num_blocks(num_computed, block_size) - len(turn.blocks))
        if fresh is None:
            return False
        turn.blocks += fresh
        for index in range(turn.num_computed // block_size, num_computed // block_size):
            self._pool.seal(turn.blocks[index], turn.hashes[index])
        turn.num_computed = num_computed
        return True

    def _preempt(self, turn: _Turn) -> None:
        self._release(turn)
        self._waiting.appendleft(turn)
        self.num_preemptions += 1

    def _release(self, turn: _Turn) -> None:
        self._pool.release(turn.blocks)
        turn.blocks = []
        turn.num_computed = 0


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
