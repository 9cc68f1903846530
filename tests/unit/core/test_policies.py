from __future__ import annotations

import pytest

from thunder_rollout.core.config import POLICIES, SchedulerConfig
from thunder_rollout.core.events import Event, TurnRequested
from thunder_rollout.core.policies import make_policy, policy_names
from thunder_rollout.core.policies.base import Policy, PolicyBase, ProgramView, View
from thunder_rollout.core.scheduler import Scheduler
from thunder_rollout.errors import ConfigError


def test_the_names_in_config_are_those_that_can_be_made() -> None:
    assert set(POLICIES) == set(policy_names())
    for name in POLICIES:
        policy: Policy = make_policy(SchedulerConfig(policy=name))
        assert policy is not None


def test_an_unknown_policy_is_an_error_that_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.policy='thundr'"):
        SchedulerConfig(policy="thundr")


def test_a_policy_of_ones_own_is_told_what_happens() -> None:
    seen: list[Event] = []

    class Silent(PolicyBase):
        def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
            return None

        def observe(self, event: Event, now: float) -> None:
            seen.append(event)

    scheduler = Scheduler(SchedulerConfig(), policy=Silent())
    event = TurnRequested(program="p", request="r", prompt_tokens=5)
    assert scheduler.handle(event, 0.0) == []
    assert seen == [event]
