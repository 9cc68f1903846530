"""What the ledger keeps of each turn in flight, program and backend."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from operator import sub

from thunder_rollout.core.events import BackendStats
from thunder_rollout.core.policies.adaptive.prefill_model import PrefillModel, ServiceClock
from thunder_rollout.core.prefix import PrefixTree

_REPORT_LAG_S = 0.5  # what an engine reports of its cache is at most this old when it arrives


@dataclass(slots=True)
class Run:
    """A turn in flight, from its grant: its prompt is held, loaded or uncached."""

    backend: str
    prompt_tokens: int
    held_tokens: int  # of its prompt, by its backend's cache as far as we know
    loaded_tokens: int  # expected from the host tier
    uncached_tokens: int  # expected
    output_tokens: float  # expected
    granted_s: float
    served_s: float  # of its backend's clock
    refill: bool  # most of it was computed before


@dataclass(slots=True)
class ProgramAccount:
    kind: str | None = None
    backend: str | None = None  # charged there
    last_backend: str | None = None  # ran there last
    last_cache: int = 0  # of that backend, then
    last_odometer: float = 0.0  # of that backend, then
    settled_tokens: int = 0  # its context then
    private_tokens: int = 0  # beyond hashed blocks
    context_tokens: int = 0
    reserve_tokens: float = 0.0
    num_in_flight: int = 0
    was_granted: bool = False  # a turn, whether it finished or not: what comes next is computed again
    expected_output_tokens: int | None = None
    acting_since_s: float | None = None
    seen_acting_s: float = 0.0  # how long it had acted when the return times were last told so
    gone_tokens: int | None = None  # it was taken for gone, with this context
    tool: str | None = None  # what it acts with
    expected_s: float | None = None  # how long that will take, if anybody said
    last_tool: str | None = None
    spared_since_s: float | None = None  # it waits for its last backend, though another had room
    group: str | None = None
    runs: dict[int, Run] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)  # its part of `BackendAccount.curve` ...
    curve_backend: str | None = None  # ... of this backend
    curve_tokens: int = 0  # ... from this context on


@dataclass(slots=True)
class Refusal:
    """A backend had no room: what it was to hold then, now and as its programs grow, and the largest
    context for which there was room, as far as those it refused tell (inf: refused for another reason)."""

    demand_tokens: float
    curve: list[float]
    room_tokens: float

    def room_now_tokens(self, demand_tokens: float, curve: list[float]) -> float:
        """The largest context for which there may be room since. What was learned meanwhile, of growth and
        gain, is left out: ticks forget refusals, some backends with each."""
        fell: float = max(map(sub, self.curve, curve), default=0.0)
        return self.room_tokens + max(0.0, self.demand_tokens - demand_tokens, fell)


@dataclass(slots=True)
class BackendAccount:
    name: str
    generation: int
    capacity_tokens: int
    offload_tokens: int  # of its host tier
    releases: bool  # what released programs have goes first
    max_running: int
    model: PrefillModel
    clock: ServiceClock
    private_tokens: int = 0
    reserve_tokens: float = 0.0
    num_bound: int = 0
    cache: int = 0  # another one whenever everything it held is void
    refill_tokens: int = 0  # expected in turns in flight that compute again what was computed before
    odometer_tokens: float = 0.0  # ever prefilled or produced here
    mean_turn_s: float = 0.0  # of wall time
    points: tuple[float, ...] = ()  # growth in tokens at which `curve` looks ahead
    curve: list[float] = field(default_factory=list)  # tokens expected in use as its programs grow and leave
    num_left: list[float] = field(default_factory=list)  # so many of them are expected to be there still
    num_curves: int = 0  # programs in it
    ended: deque[tuple[float, str]] = field(default_factory=deque)  # turns that ended of late: when, whose
    drift_tokens: int | None = None  # what its last report of its cache corrected
    refusal: Refusal | None = None  # of the waiting programs that it had no room for

    def turn_ended(self, program_id: str, now: float) -> None:
        while self.ended and self.ended[0][0] < now - _REPORT_LAG_S:
            self.ended.popleft()
        self.ended.append((now, program_id))

    def hear(self, event: BackendStats, tree: PrefixTree, now: float, block_size: int) -> None:
        """Believe what the engine says that it holds, but of turns that it may have said that too early for."""
        late = [program_id for ended_s, program_id in self.ended if ended_s >= now - _REPORT_LAG_S]
        num_blocks = tree.report(self.name, event.stored, event.removed, whole=event.whole, late=late)
        self.drift_tokens = None if num_blocks is None else num_blocks * block_size

    def lose_sight(self, tree: PrefixTree) -> None:
        """The engine is gone, or another one."""
        tree.report(self.name, None)
        self.drift_tokens = None
        self.generation = -1
