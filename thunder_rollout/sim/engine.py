"""The engine model of `engine.model` on runs of blocks, in jumps of many steps: same rules, same
step times, but its cost grows with turns, not with tokens.

Within a jump every step is alike but for the contexts, which grow by one token a decoding turn and by
one chunk for the turn being prefilled, so that the time of k steps is a parabola in k. A jump ends
with the first step in which something else may happen: a turn ends, a prefill ends, a turn joins,
memory runs out.

What it takes as given (the unit tests hold it against the block-exact model):
- `max_running` <= `max_batched_tokens`, so that every decoding turn is in every step and at most one
  turn, the youngest, is partly prefilled;
- what the host tier has of an admitted turn is loaded within the step, `load_token_s` a token (vLLM
  loads beside its steps: this is the careful side);
- a program's context only grows, and only one turn of it runs at a time.

Pure: no clock, no I/O, no randomness. Whoever owns it calls `advance` when `ends_at` has come.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from thunder_rollout.engine.model import EngineShape, EngineTiming
from thunder_rollout.sim.cache import Claim, RunCache, SharedRun
from thunder_rollout.sim.host_tier import HostTier
from thunder_rollout.sim.jump import Jump

NEVER = math.inf


@dataclass(slots=True, kw_only=True, eq=False)
class SimTurn:
    """One turn in an engine: what is asked, then what came of it.

    `key` names the program's own run of blocks; `shared` are the runs before it. Times are the
    caller's clock. `cached_tokens` are the hits when it was first admitted, `loaded_tokens` those of them
    that came from the host tier.
    """

    key: str
    prompt_tokens: int
    output_tokens: int
    shared: tuple[SharedRun, ...] = ()
    program: str = ""
    grant: int = 0
    added_at: float = 0.0
    admitted_at: float = NEVER
    first_token_at: float = NEVER
    cached_tokens: int = 0
    loaded_tokens: int = 0

    num_sampled: int = 0
    num_computed: int = 0
    claim: Claim | None = None
    ends_at_step: int = 0  # of the engine, while it decodes
    base: int = 0  # num_computed - the engine's steps, while it decodes

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.num_sampled


class SimEngine(Protocol):
    """What the simulator needs of an engine."""

    @property
    def ends_at(self) -> float:
        """When it must be advanced; infinite while it has nothing to do."""

    @property
    def used_tokens(self) -> int: ...

    @property
    def num_preemptions(self) -> int: ...

    def add(self, turn: SimTurn, now: float) -> None:
        """Queue a turn; `ends_at` may come sooner by this."""

    def advance(self) -> list[SimTurn]:
        """At `ends_at`: the turns that ended there; what follows begins."""

    def drop(self, key: str) -> None:
        """Forget the program's own run, unless a turn of it runs."""

    def release(self, key: str) -> None:
        """The program's own run goes first, unless a turn of it runs."""


class RunEngine:
    """See the module; it honours `SimEngine`."""

    def __init__(
        self, shape: EngineShape, timing: EngineTiming, host: HostTier | None = None, *, load_token_s: float = 0.0
    ) -> None:
        assert shape.max_running <= shape.max_batched_tokens
        self.shape = shape
        self.timing = timing
        self.num_preemptions = 0
        self.ends_at = NEVER
        self._cache = RunCache(shape.num_blocks, enable_caching=shape.enable_caching)
        self._host = host
        self._load_token_s = load_token_s
        self._load_s = 0.0  # of the next step
        self._waiting: deque[SimTurn] = deque()
        self._decoding: dict[int, SimTurn] = {}  # by id(turn), oldest first
        self._prefilling: SimTurn | None = None
        self._jump: Jump | None = None
        self._num_steps = 0
        self._sum_base = 0
        self._crossings = [0] * shape.block_size  # decoding turns by the step (mod block size) that starts a block
        self._endings: list[tuple[int, int, SimTurn]] = []
        self._num_endings = 0

    @property
    def used_tokens(self) -> int:
        return self._cache.num_held * self.shape.block_size

    @property
    def num_running(self) -> int:
        return len(self._decoding) + (self._prefilling is not None)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, turn: SimTurn, now: float) -> None:
        """Queue a turn. It must fit the pool alone, prompt and output, or it waits for ever."""
        turn.added_at = now
        self._waiting.append(turn)
        if self._jump is None:
            self._jump = Jump(now, 0)
            self.ends_at = now
        elif self._jump.may_stop and len(self._waiting) == 1:
            self._jump.stop_by(now)
            self.ends_at = self._jump.began_at + self._jump.time_of(self._jump.num_steps)

    def advance(self) -> list[SimTurn]:
        now = self.ends_at
        ended = self._end_jump(now)
        self._begin_jump(now)
        return ended

    def drop(self, key: str) -> None:
        self._cache.drop(key)

    def release(self, key: str) -> None:
        self._cache.demote(key)

    def forget_cache(self) -> None:
        self._cache.clear()

    # The end of a jump

    def _end_jump(self, now: float) -> list[SimTurn]:
        jump = self._jump
        assert jump is not None
        self._jump = None
        self.ends_at = NEVER
        if jump.num_steps > jump.num_paid:
            self._grow(self._num_blocks_for(self._num_steps + jump.num_paid, jump.num_steps - jump.num_paid))
        self._num_steps += jump.num_steps
        ended = self._end_decoding()
        for turn in jump.joining:
            turn.num_sampled += 1
            if turn.first_token_at == NEVER:
                turn.first_token_at = now
            if turn.num_sampled == turn.output_tokens:
                self._release(turn)
                ended.append(turn)
            else:
                self._start_decoding(turn)
        return ended

    def _end_decoding(self) -> list[SimTurn]:
        ended = []
        while self._endings and self._endings[0][0] <= self._num_steps:
            step, _, turn = heapq.heappop(self._endings)
            if turn.ends_at_step == step and id(turn) in self._decoding:
                self._stop_decoding(turn)
                self._release(turn)
                ended.append(turn)
        return ended

    def _start_decoding(self, turn: SimTurn) -> None:
        turn.base = turn.num_computed - self._num_steps
        turn.ends_at_step = self._num_steps + turn.output_tokens - turn.num_sampled
        self._decoding[id(turn)] = turn
        self._sum_base += turn.base
        self._crossings[(1 - turn.base) % self.shape.block_size] += 1
        self._num_endings += 1
        heapq.heappush(self._endings, (turn.ends_at_step, self._num_endings, turn))

    def _stop_decoding(self, turn: SimTurn) -> None:
        """Ended or preempted: settle its counts."""
        del self._decoding[id(turn)]
        self._sum_base -= turn.base
        self._crossings[(1 - turn.base) % self.shape.block_size] -= 1
        turn.num_sampled = turn.output_tokens - (turn.ends_at_step - self._num_steps)
        turn.num_computed = turn.base + self._num_steps
        assert turn.claim is not None
        turn.claim.num_own = _num_blocks(turn.num_computed, self.shape.block_size) - turn.claim.num_shared

    def _release(self, turn: SimTurn) -> None:
        assert turn.claim is not None
        num_full = turn.num_computed // self.shape.block_size
        self._cache.release(turn.claim, num_full)
        if self._host is not None:
            self._host.store(turn.shared, turn.key, num_full)
        turn.claim = None

    # The beginning of the next

    def _begin_jump(self, now: float) -> None:
        was_cut = self._make_room()
        num_decoding = len(self._decoding)
        jump = Jump(now, 1, num_paid=1)
        self._grow(self._num_blocks_for(self._num_steps, 1))
        budget = self.shape.max_batched_tokens - num_decoding
        self._load_s = 0.0
        work: list[tuple[SimTurn, int]] = []
        if self._prefilling is not None:
            turn = self._prefilling
            num_tokens = min(turn.num_tokens - turn.num_computed, budget)
            if self._extend(turn, num_tokens):
                work.append((turn, num_tokens))
                budget -= num_tokens
            else:
                self._preempt(turn)
                was_cut = True
        if not was_cut:
            work += self._admit(budget, now)
        if not num_decoding and not work:
            return
        for turn, _ in work:
            if turn.num_computed == turn.num_tokens:
                jump.joining.append(turn)
        self._prefilling = work[-1][0] if len(jump.joining) < len(work) else None
        self._time(jump, num_decoding, work)
        jump.first_s += self._load_s
        if not was_cut and not self._load_s:
            self._lengthen(jump, num_decoding, work)
        jump.may_stop = not work and jump.num_steps > 1
        self._jump = jump
        self.ends_at = now + jump.time_of(jump.num_steps)

    def _make_room(self) -> bool:
        """Preempt the youngest until the next token of every decoding turn has a place."""
        was_cut = False
        while self._decoding and self._num_blocks_for(self._num_steps, 1) > self._cache.num_free:
            self._preempt(self._prefilling if self._prefilling is not None else next(reversed(self._decoding.values())))
            was_cut = True
        return was_cut

    def _preempt(self, turn: SimTurn) -> None:
        if turn is self._prefilling:
            self._prefilling = None
        else:
            self._stop_decoding(turn)
        self._release(turn)
        turn.num_computed = 0
        self._waiting.appendleft(turn)
        self.num_preemptions += 1

    def _admit(self, budget: int, now: float) -> list[tuple[SimTurn, int]]:
        work: list[tuple[SimTurn, int]] = []
        num_running = self.num_running
        block_size = self.shape.block_size
        while self._waiting and budget > 0 and num_running + len(work) < self.shape.max_running:
            turn = self._waiting[0]
            limit = (turn.num_tokens - 1) // block_size
            hits, unheld = self._cache.match(turn.shared, turn.key, limit)
            if _num_blocks(turn.num_tokens, block_size) - hits + unheld > self._cache.num_free:
                break
            self._waiting.popleft()
            turn.claim, hits = self._cache.claim(turn.shared, turn.key, limit)
            turn.num_computed = hits * block_size
            loaded_tokens = self._load(turn, hits, limit)
            if turn.admitted_at == NEVER:
                turn.admitted_at = now
                turn.cached_tokens = turn.num_computed
                turn.loaded_tokens = loaded_tokens
            num_tokens = min(turn.num_tokens - turn.num_computed, budget)
            extended = self._extend(turn, num_tokens)
            assert extended
            work.append((turn, num_tokens))
            budget -= num_tokens
        return work

    def _load(self, turn: SimTurn, hits: int, limit: int) -> int:
        """Bring what the host tier has behind the turn's hits; returns how many tokens."""
        if self._host is None:
            return 0
        num_tokens = self._host.match(turn.shared, turn.key, hits, limit) * self.shape.block_size
        extended = self._extend(turn, num_tokens)
        assert extended
        self._load_s += num_tokens * self._load_token_s
        return num_tokens

    def _extend(self, turn: SimTurn, num_tokens: int) -> bool:
        assert turn.claim is not None
        num_computed = turn.num_computed + num_tokens
        missing = _num_blocks(num_computed, self.shape.block_size) - turn.claim.num_blocks
        if missing > 0 and not self._cache.take(turn.claim, missing):
            return False
        turn.num_computed = num_computed
        if num_computed == turn.num_tokens:
            self._cache.publish(turn.claim)
        return True

    def _time(self, jump: Jump, num_decoding: int, work: list[tuple[SimTurn, int]]) -> None:
        """The first step's time and how it grows from step to step."""
        timing = self.timing
        contexts = self._sum_base + num_decoding * (self._num_steps + 1) + sum(turn.num_computed for turn, _ in work)
        tokens = sum(num_tokens for _, num_tokens in work)
        attended = sum(num_tokens * (turn.num_computed - num_tokens / 2) for turn, num_tokens in work)
        jump.first_s = (
            timing.step_s
            + timing.prefill_token_s * tokens
            + timing.decode_turn_s * num_decoding
            + timing.context_token_s * contexts
            + timing.prefill_context_s * attended
        )
        jump.growth_s = timing.context_token_s * (num_decoding + tokens) + timing.prefill_context_s * tokens * tokens

    def _lengthen(self, jump: Jump, num_decoding: int, work: list[tuple[SimTurn, int]]) -> None:
        """Add the steps after the first that are like it."""
        if jump.joining or len(work) > 1:
            return
        longest = self._next_ending() - self._num_steps if num_decoding else NEVER
        chunk = 0
        turn: SimTurn | None = None
        if work:
            turn, chunk = work[0]
            if chunk < self.shape.max_batched_tokens - num_decoding:
                return
            longest = min(longest, 1 + (turn.num_tokens - turn.num_computed - 1) // chunk)
        jump.num_steps = self._fitting(int(longest), turn, chunk)
        extra = jump.num_steps - 1
        if turn is not None and extra:
            self._grow(self._num_blocks_for(self._num_steps + 1, extra))
            jump.num_paid = jump.num_steps
            extended = self._extend(turn, extra * chunk)
            assert extended

    def _fitting(self, longest: int, turn: SimTurn | None, chunk: int) -> int:
        """How many steps, the first included, the free blocks last for; at most `longest`."""
        low, high = 1, longest
        if self._need(high, turn, chunk) <= self._cache.num_free:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if self._need(middle, turn, chunk) <= self._cache.num_free:
                low = middle
            else:
                high = middle
        return low

    def _need(self, num_steps: int, turn: SimTurn | None, chunk: int) -> int:
        need = self._num_blocks_for(self._num_steps + 1, num_steps - 1)
        if turn is not None and turn.claim is not None:
            num_computed = turn.num_computed + (num_steps - 1) * chunk
            need += _num_blocks(num_computed, self.shape.block_size) - turn.claim.num_blocks
        return need

    def _next_ending(self) -> int:
        while True:
            step, _, turn = self._endings[0]
            if turn.ends_at_step == step and id(turn) in self._decoding:
                return step
            heapq.heappop(self._endings)

    # Blocks of the decoding turns

    def _num_blocks_for(self, after_step: int, num_steps: int) -> int:
        """Blocks that the decoding turns start in the `num_steps` steps after `after_step`."""
        size = self.shape.block_size
        rounds, rest = divmod(num_steps, size)
        need = rounds * len(self._decoding)
        if rest:
            first = (after_step + 1) % size
            need += sum(self._crossings[first : first + rest])
            if first + rest > size:
                need += sum(self._crossings[: first + rest - size])
        return need

    def _grow(self, num_blocks: int) -> None:
        """The decoding turns start so many blocks; each is put to its turn's account when it stops."""
        self._cache.hold_more(num_blocks)


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
