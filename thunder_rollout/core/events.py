"""What the shells tell the scheduler.

Every event is frozen; required fields are those every shell can feed, optional ones (those
with a default) only make decisions better. `grant` is the number the scheduler gave with the
`Restore` that admitted the turn; a grant that is no longer current is stale and refused.
Tokens are counts, times are seconds, block hashes are opaque ints (equal hash = equal prefix).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

INITIAL_VERSION = "0"  # of the weights that every backend starts with


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"  # the turn was cut; not the start of a tool
    ERROR = "error"  # the engine failed the turn; not the start of a tool


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequested:
    """A program asks for one model call. `request` is unique among its open requests."""

    program: str
    request: str
    prompt_tokens: int
    block_hashes: tuple[int, ...] | None = None
    group: str | None = None
    task_kind: str | None = None
    expected_output_tokens: int | None = None
    priority: int = 0
    sandbox: bool = False  # the program acts in a sandbox that can be prepared ahead
    age_s: float = 0.0  # since its program first asked, where that was under another name


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramAnnounced:
    """A program that acts in a sandbox will ask for its first turn once there is a place for it. Those announced
    begin about in the order in which they were, after those that wait."""

    program: str
    task_kind: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStarted:
    program: str
    grant: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnProgress:
    """`output_tokens` is the count produced so far in this turn, not a difference."""

    program: str
    grant: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnded:
    """`output_tokens` counts those that stay in the program's context (0 for a cut turn whose output is
    dropped); `weight_version` is that of the weights which produced them."""

    program: str
    grant: int
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: FinishReason = FinishReason.STOP
    weight_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStarted:
    program: str
    tool: str | None = None
    expected_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolEnded:
    program: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramEnded:
    program: str
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """The caller no longer waits: for one request, or (request None) for the whole program."""

    program: str
    request: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUp:
    """A KV pool can be used. A higher `generation` means its cache started empty.

    `block_size` is the tokens behind one hash of `TurnRequested.block_hashes`; without it, the power
    of two that the first hashed prompt's length allows. `offload_tokens` of KV are kept in host memory
    as well, written through and least recently used first out; 0: there is no such tier. Where it
    `releases`, what only programs that gave their KV up have in its cache goes before the rest. With
    `updating` its gate is shut from the start (see `WeightsUpdating`).
    """

    backend: str
    generation: int
    capacity_tokens: int
    max_running: int
    block_size: int | None = None
    offload_tokens: int = 0
    releases: bool = False
    updating: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendDown:
    """`returning`: a restart may come, so who waits for the last backend goes on waiting."""

    backend: str
    generation: int
    reason: str | None = None
    returning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStats:
    """What the engine itself reports. `stored` and `removed` are the block hashes that its cache took in
    and gave up since the last report or, with `whole`, `stored` is all it holds; None: not known."""

    backend: str
    generation: int
    used_tokens: int | None = None
    running: int | None = None
    waiting: int | None = None
    stored: tuple[int, ...] | None = None
    removed: tuple[int, ...] = ()
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsUpdating:
    """The gate of these backends shuts: nothing is admitted there until `WeightsUpdated`, or until they
    are up in a new generation."""

    backends: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsUpdated:
    """The gate opens, and the caches count as void. Without `version` the weights are the old ones: the
    update failed. Versions are compared by the order in which they were first told."""

    backends: tuple[str, ...]
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxReady:
    program: str
    took_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxFailed:
    program: str
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxStopped:
    """The sandbox of a program that waits was put away: it takes seconds to have it back, which PrepareSandbox
    asks for like a first start."""

    program: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    pass


Event = (
    ProgramAnnounced
    | TurnRequested
    | TurnStarted
    | TurnProgress
    | TurnEnded
    | ToolStarted
    | ToolEnded
    | ProgramEnded
    | Withdrawn
    | BackendUp
    | BackendDown
    | BackendStats
    | WeightsUpdating
    | WeightsUpdated
    | SandboxReady
    | SandboxFailed
    | SandboxStopped
    | Tick
)
