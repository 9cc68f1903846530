"""The policies by name; a new one is a module and a line in `_BUILDERS` (and in `config.POLICIES`)."""

from __future__ import annotations

from collections.abc import Callable

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.policies.adaptive.policy import AdaptivePolicy
from thunder_rollout.core.policies.aimd import AimdPolicy
from thunder_rollout.core.policies.base import Policy
from thunder_rollout.core.policies.cache_aware import CacheAwarePolicy
from thunder_rollout.core.policies.capped import CappedPolicy
from thunder_rollout.core.policies.round_robin import RoundRobinPolicy
from thunder_rollout.core.policies.sticky import StickyPolicy
from thunder_rollout.core.policies.thunder import ThunderPolicy
from thunder_rollout.core.policies.ttl import TtlPolicy

_BUILDERS: dict[str, Callable[[SchedulerConfig], Policy]] = {
    "thunder": lambda config: ThunderPolicy(config.thunder),
    "adaptive": lambda config: AdaptivePolicy(config.adaptive),
    "sticky": lambda config: StickyPolicy(),
    "round_robin": lambda config: RoundRobinPolicy(),
    "cache_aware": lambda config: CacheAwarePolicy(config.cache_aware),
    "capped": lambda config: CappedPolicy(config.capped),
    "ttl": lambda config: TtlPolicy(config.ttl),
    "aimd": lambda config: AimdPolicy(config.aimd),
}


def policy_names() -> tuple[str, ...]:
    return tuple(_BUILDERS)


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that `config.policy` names (validated there)."""
    return _BUILDERS[config.policy](config)
