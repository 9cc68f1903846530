"""Settings of the scheduler and its policies, validated where they are built.

Field names are those of DESIGN.md; the paper's symbol is given where there is one
(ThunderAgent, arXiv 2602.13692).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from thunder_rollout.errors import ConfigError

POLICIES = ("thunder", "adaptive", "sticky", "round_robin", "cache_aware", "capped", "ttl", "aimd")


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"scheduler.{name}={value!r}: must be {rule}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThunderConfig:
    """The paper's policy (its section 4); defaults are the paper's."""

    high_watermark: float = 1.0  # lambda_max: a backend thrashes above this share of capacity
    low_watermark: float = 1.0  # lambda_min: restore only while demand is below this share
    decay_base: float = 2.0  # x in f(t) = x^-t
    decay_unit_s: float = 1.0  # the unit of t, which the paper leaves open
    decay_when_pausing: bool = False  # eq. 7 as printed: True; the published code: False
    headroom_tokens: int = 100  # reserved for every bound program

    def __post_init__(self) -> None:
        high, low = self.high_watermark, self.low_watermark
        _require(0 < high <= 2, "thunder.high_watermark", high, "in (0, 2]")
        _require(0 < low <= high, "thunder.low_watermark", low, "in (0, high_watermark]")
        _require(self.decay_base >= 1, "thunder.decay_base", self.decay_base, ">= 1")
        _require(self.decay_unit_s > 0, "thunder.decay_unit_s", self.decay_unit_s, "> 0")
        _require(self.headroom_tokens >= 0, "thunder.headroom_tokens", self.headroom_tokens, ">= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveConfig:
    """The policy `adaptive`; what it can learn it learns, so these are bounds and priors."""

    admit_watermark: float = 0.95  # admit while demand is within this share of capacity
    high_watermark: float = 0.98  # release programs while demand is above this share
    least_fill: float = 0.7  # share that the projected peak may reach where one more program gains nothing,
    most_fill: float = 1.0  # and where throughput is in proportion to their number; between them linear
    prior_growth: float = 2.0  # a context is expected to grow by this share until programs of its kind have ended
    decay_base: float = 2.0  # x: before a tool was seen, x^-t is the share of its calls still running after t
    decay_unit_s: float = 1.0  # the unit of t
    prior_returns: float = 1.0  # tool calls that this prior is worth
    prior_prefill_token_s: float = 1e-4  # seconds of prefill a token before any turn was seen
    prior_load_token_s: float = 3e-6  # seconds to load a token from host memory before any was: 150 kB at 50 GB/s
    forgetting: float = 0.995  # weight of older turns in the model of prefill, a turn
    min_turns: int = 20  # a backend's own model of prefill counts from so many turns on, the fleet's before
    load_weight: float = 4.0  # in placing, of a turn's seconds of load: a place is for many turns, its prefill for one
    group_weight_s: float = 60.0  # a group that is nearly complete goes ahead of those so many seconds older
    patience_s: float = 5.0  # after this in the queue a program that fits nowhere has a backend kept for it
    lookahead: int = 16  # waiting programs looked at, in order, when room comes free
    max_refill_share: float = 0.5  # of a backend's capacity that may be in recomputation at once
    silent_ends: bool = False  # programs may end without a word: one long away may be gone
    rebalance_on_update: bool = True  # give up all places when weights update: caches are void, moving is free

    def __post_init__(self) -> None:
        admit, high = self.admit_watermark, self.high_watermark
        _require(0 < high <= 2, "adaptive.high_watermark", high, "in (0, 2]")
        _require(0 < admit <= high, "adaptive.admit_watermark", admit, "in (0, high_watermark]")
        least, most = self.least_fill, self.most_fill
        _require(0 < most <= 2, "adaptive.most_fill", most, "in (0, 2]")
        _require(0 < least <= most, "adaptive.least_fill", least, "in (0, most_fill]")
        _require(self.decay_base > 1, "adaptive.decay_base", self.decay_base, "> 1")
        _require(0 < self.forgetting <= 1, "adaptive.forgetting", self.forgetting, "in (0, 1]")
        _require(self.lookahead >= 1, "adaptive.lookahead", self.lookahead, ">= 1")
        for name in (
            "decay_unit_s",
            "prior_returns",
            "prior_prefill_token_s",
            "prior_load_token_s",
            "max_refill_share",
        ):
            _require(getattr(self, name) > 0, f"adaptive.{name}", getattr(self, name), "> 0")
        for name in ("prior_growth", "min_turns", "load_weight", "group_weight_s", "patience_s"):
            _require(getattr(self, name) >= 0, f"adaptive.{name}", getattr(self, name), ">= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedConfig:
    """`sticky` under a static limit on active programs, over all backends."""

    max_programs: int = 64

    def __post_init__(self) -> None:
        _require(self.max_programs >= 1, "capped.max_programs", self.max_programs, ">= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TtlConfig:
    """`ttl`: pin a program's KV while it acts, for a time-to-live from tool statistics."""

    ttl_quantile: float = 0.9  # of a tool's recent times
    default_ttl_s: float = 5.0  # for a tool never seen
    max_ttl_s: float = 60.0
    headroom_tokens: int = 100  # reserved for every bound program

    def __post_init__(self) -> None:
        _require(0 < self.ttl_quantile <= 1, "ttl.ttl_quantile", self.ttl_quantile, "in (0, 1]")
        for name in ("default_ttl_s", "max_ttl_s", "headroom_tokens"):
            _require(getattr(self, name) >= 0, f"ttl.{name}", getattr(self, name), ">= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AimdConfig:
    """`aimd`: a limit on active programs that grows by a step and is cut by a share."""

    initial_programs: int = 8  # a backend
    grow_programs: int = 1  # a backend and tick
    cut_share: float = 0.8  # what is left of the active programs after a cut
    max_lost_share: float = 0.1  # of the tokens computed before that may have left the cache
    target_usage: float = 0.95  # of capacity by bound programs' contexts, beyond which it does not grow

    def __post_init__(self) -> None:
        for name in ("initial_programs", "grow_programs"):
            _require(getattr(self, name) >= 1, f"aimd.{name}", getattr(self, name), ">= 1")
        for name in ("cut_share", "max_lost_share", "target_usage"):
            _require(0 < getattr(self, name) < 1, f"aimd.{name}", getattr(self, name), "in (0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAwareConfig:
    """Longest prefix match unless load is unbalanced; defaults are SGLang router's."""

    cache_threshold: float = 0.5  # a match shorter than this share of the prompt doesn't count
    balance_abs_threshold: int = 32  # in-flight turns between the busiest and the idlest backend
    balance_rel_threshold: float = 1.0001
    max_tree_tokens: int = 2**24  # per backend; the oldest prefixes are forgotten beyond it

    def __post_init__(self) -> None:
        _require(0 <= self.cache_threshold <= 1, "cache_aware.cache_threshold", self.cache_threshold, "in [0, 1]")
        _require(
            self.balance_abs_threshold >= 0, "cache_aware.balance_abs_threshold", self.balance_abs_threshold, ">= 0"
        )
        _require(
            self.balance_rel_threshold >= 1, "cache_aware.balance_rel_threshold", self.balance_rel_threshold, ">= 1"
        )
        _require(self.max_tree_tokens > 0, "cache_aware.max_tree_tokens", self.max_tree_tokens, "> 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    policy: str = "adaptive"
    tick_s: float = 5.0  # dt
    max_wait_s: float = 600.0  # after this in the queue nobody younger goes ahead
    lease_s: float | None = None  # a program silent for so long is terminated; longer than any turn or tool call
    max_staleness: int | None = None  # weight versions that a program's oldest token may lie behind the newest
    prepare_ahead: int = 64  # at most so many waiting programs have a sandbox before their grant; 0: none has
    thunder: ThunderConfig = field(default_factory=ThunderConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    capped: CappedConfig = field(default_factory=CappedConfig)
    cache_aware: CacheAwareConfig = field(default_factory=CacheAwareConfig)
    ttl: TtlConfig = field(default_factory=TtlConfig)
    aimd: AimdConfig = field(default_factory=AimdConfig)

    def __post_init__(self) -> None:
        _require(self.policy in POLICIES, "policy", self.policy, f"one of {', '.join(POLICIES)}")
        _require(self.tick_s > 0, "tick_s", self.tick_s, "> 0")
        _require(self.max_wait_s > 0, "max_wait_s", self.max_wait_s, "> 0")
        _require(self.lease_s is None or self.lease_s > 0, "lease_s", self.lease_s, "> 0 or null")
        staleness = self.max_staleness
        _require(staleness is None or staleness >= 0, "max_staleness", staleness, ">= 0 or null")
        _require(self.prepare_ahead >= 0, "prepare_ahead", self.prepare_ahead, ">= 0")

    @property
    def uses_block_hashes(self) -> bool:
        """Whether the policy looks at `TurnRequested.block_hashes`; otherwise clients save the work."""
        return self.policy in ("adaptive", "cache_aware")
