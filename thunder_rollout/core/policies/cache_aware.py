"""`cache_aware`: the backend that was sent the longest prefix of the prompt, unless load is
unbalanced. What SGLang's router does.

Per request: if the backends' turns in flight differ by more than `balance_abs_threshold` and the
busiest has more than `balance_rel_threshold` times the idlest's, the idlest takes it; else, if
more than `cache_threshold` of the prompt's blocks were sent to some backend before, the best match
does; else the backend with the smallest index. A prompt without block hashes goes to the idlest.

The index is approximate: it knows what was sent, not what the engine evicted. Each backend's is
bounded by `max_tree_tokens`; the prefixes used longest ago are forgotten, deepest block first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from thunder_rollout.core.config import CacheAwareConfig
from thunder_rollout.core.events import BackendDown, BackendUp, Event, TurnRequested, WeightsUpdated
from thunder_rollout.core.policies.base import (
    BackendView,
    LeastInFlight,
    Placement,
    PolicyBase,
    ProgramView,
    View,
    spread_waiting,
)


class PrefixIndex:
    """The block hashes sent to one backend, most recently used last."""

    def __init__(self, max_tokens: int) -> None:
        self.num_tokens = 0
        self._max_tokens = max_tokens
        self._block_tokens: OrderedDict[int, int] = OrderedDict()

    def match(self, hashes: tuple[int, ...]) -> int:
        """How many leading blocks are known; equal hashes mean equal prefixes."""
        return next((i for i, block in enumerate(hashes) if block not in self._block_tokens), len(hashes))

    def insert(self, hashes: tuple[int, ...], block_tokens: int) -> None:
        for block in reversed(hashes):
            if block not in self._block_tokens:
                self._block_tokens[block] = block_tokens
                self.num_tokens += block_tokens
            self._block_tokens.move_to_end(block)
        while self.num_tokens > self._max_tokens:
            self.num_tokens -= self._block_tokens.popitem(last=False)[1]


class CacheAwarePolicy(PolicyBase):
    def __init__(self, config: CacheAwareConfig) -> None:
        self._config = config
        self._indices: dict[str, PrefixIndex] = {}

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        backends = [backend for backend in view.open_backends() if backend.fits(request.prompt_tokens)]
        hashes = request.block_hashes
        if not hashes or not backends or self._is_unbalanced(backends):
            return LeastInFlight(backends).choose(request.prompt_tokens)
        matches = [(self._index(backend.name).match(hashes), backend) for backend in backends]
        longest = max(length for length, _ in matches)
        if longest / len(hashes) > self._config.cache_threshold:
            backends = [backend for length, backend in matches if length == longest]
        return min(backends, key=self._size).name

    def restores(self, view: View, now: float, *, tick: bool) -> Sequence[Placement]:
        return spread_waiting(view, now)

    def granted(self, program: ProgramView, request: TurnRequested, backend: str, grant: int) -> None:
        hashes = request.block_hashes
        if hashes:
            self._index(backend).insert(hashes, max(1, request.prompt_tokens // len(hashes)))

    def observe(self, event: Event, now: float) -> None:
        match event:
            case BackendUp(backend=name) | BackendDown(backend=name):
                self._indices.pop(name, None)
            case WeightsUpdated(backends=names):
                for name in names:
                    self._indices.pop(name, None)
            case _:
                pass

    def _index(self, backend: str) -> PrefixIndex:
        return self._indices.setdefault(backend, PrefixIndex(self._config.max_tree_tokens))

    def _size(self, backend: BackendView) -> tuple[int, int, str]:
        return (self._index(backend.name).num_tokens, backend.num_in_flight, backend.name)

    def _is_unbalanced(self, backends: list[BackendView]) -> bool:
        loads = [backend.num_in_flight for backend in backends]
        busiest, idlest = max(loads), min(loads)
        return (
            busiest - idlest > self._config.balance_abs_threshold
            and busiest > self._config.balance_rel_threshold * idlest
        )
