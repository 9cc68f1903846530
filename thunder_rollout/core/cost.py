"""The paper's cost model as pure functions (ThunderAgent, arXiv 2602.13692, section 3 and eq. 7).

Cost is a space-time product: KV tokens held x seconds they are held.

    total = decode + prefill + recompute + unused + caching      (the last three are waste)

`CostMeter` adds up records of what happened; `CostShares` is the result. Nothing here knows the
scheduler's state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnCost:
    """What one turn did in its engine.

    `previous_context_tokens` is the program's context when its last turn ended (0 before the
    first): these tokens of the prompt had been computed before. Of the `prompt_tokens`,
    `cached_tokens` came from the cache and the rest was prefilled in `prefill_s`, as were `refill_tokens` more
    where the turn was cut and went on: of its prompt and its output so far, once again.
    """

    prompt_tokens: int
    cached_tokens: int
    previous_context_tokens: int
    output_tokens: int
    prefill_s: float
    decode_s: float
    refill_tokens: int = 0

    @property
    def prefilled_tokens(self) -> int:
        return max(0, self.prompt_tokens - self.cached_tokens) + self.refill_tokens

    @property
    def recomputed_tokens(self) -> int:
        """Prefilled although computed before: prompt - cached - new, and what was refilled."""
        return max(0, min(self.previous_context_tokens, self.prompt_tokens) - self.cached_tokens) + self.refill_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class CostShares:
    """The five terms, in KV token-seconds."""

    decode: float = 0.0
    prefill: float = 0.0
    recompute: float = 0.0
    unused: float = 0.0
    caching: float = 0.0

    @property
    def total(self) -> float:
        return self.decode + self.prefill + self.recompute + self.unused + self.caching

    @property
    def waste(self) -> float:
        return self.recompute + self.unused + self.caching

    def fractions(self) -> CostShares:
        """Each term as a share of the total (all 0 where nothing was spent)."""
        scale = 1.0 / self.total if self.total > 0 else 0.0
        return CostShares(
            decode=self.decode * scale,
            prefill=self.prefill * scale,
            recompute=self.recompute * scale,
            unused=self.unused * scale,
            caching=self.caching * scale,
        )


def decode_cost(turn: TurnCost) -> float:
    """Resident while decoding: the prompt, and the output growing evenly to its full length."""
    return (turn.prompt_tokens + turn.output_tokens / 2) * turn.decode_s


def prefill_cost(turn: TurnCost) -> float:
    """The prompt, held for the part of `prefill_s` that its new tokens took."""
    return turn.prompt_tokens * turn.prefill_s - recompute_cost(turn)


def recompute_cost(turn: TurnCost) -> float:
    """The prompt, held for the part of `prefill_s` that went into tokens computed before."""
    if turn.prefilled_tokens == 0:
        return 0.0
    return turn.prompt_tokens * turn.prefill_s * turn.recomputed_tokens / turn.prefilled_tokens


def caching_cost(context_tokens: int, held_s: float) -> float:
    """A context kept resident while its program acts."""
    return context_tokens * held_s


def unused_cost(capacity_tokens: int, wall_s: float, held_token_s: float) -> float:
    """Capacity that nobody held; 0 where the records overlap beyond the capacity."""
    return max(0.0, capacity_tokens * wall_s - held_token_s)


class CostMeter:
    """Adds turns and holds up; `shares` closes the account over a capacity and a wall time."""

    def __init__(self) -> None:
        self._decode = 0.0
        self._prefill = 0.0
        self._recompute = 0.0
        self._caching = 0.0

    def add_turn(self, turn: TurnCost) -> None:
        self._decode += decode_cost(turn)
        self._prefill += prefill_cost(turn)
        self._recompute += recompute_cost(turn)

    def add_hold(self, context_tokens: int, held_s: float) -> None:
        self._caching += caching_cost(context_tokens, held_s)

    def shares(self, capacity_tokens: int, wall_s: float) -> CostShares:
        """`capacity_tokens` is the sum over all backends, `wall_s` the time they were up."""
        held = self._decode + self._prefill + self._recompute + self._caching
        return CostShares(
            decode=self._decode,
            prefill=self._prefill,
            recompute=self._recompute,
            unused=unused_cost(capacity_tokens, wall_s, held),
            caching=self._caching,
        )


def decay(elapsed_s: float, *, base: float, unit_s: float) -> float:
    """f(t) = x^-t with t = elapsed_s / unit_s since the program began acting."""
    return float(base ** -(elapsed_s / unit_s))


def demand_tokens(reasoning_tokens: float, acting: Iterable[tuple[int, float]], *, base: float, unit_s: float) -> float:
    """Left side of eq. 7: sum(c over reasoning) + sum(c x f(t) over acting).

    `acting` gives (context tokens, seconds since it began acting) for each acting program.
    """
    return reasoning_tokens + sum(c * decay(t, base=base, unit_s=unit_s) for c, t in acting)


def s_pause(context_tokens: int, *, acting: bool) -> float:
    """S_pause = 1/c + [acting]; the highest is paused first: acting before reasoning, short first."""
    return 1.0 / max(1, context_tokens) + float(acting)


def s_restore(context_tokens: int, *, reasoning: bool) -> float:
    """S_restore = 1/c + [reasoning]; the highest is restored first: reasoning first, short first."""
    return 1.0 / max(1, context_tokens) + float(reasoning)
