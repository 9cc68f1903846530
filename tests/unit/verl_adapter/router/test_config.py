"""The router's YAML: what ships parses, what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from thunder_rollout.config import conf_dir
from thunder_rollout.core.config import AdaptiveConfig, SchedulerConfig
from thunder_rollout.errors import ConfigError
from thunder_rollout.verl_adapter.router.config import RouterConfig, parse

NAME = "thunder_rollout.verl_adapter.ProgramRouter"

SCHEDULER = SchedulerConfig(tick_s=1.0, adaptive=AdaptiveConfig(silent_ends=True))


def test_the_file_that_ships_has_the_defaults_but_that_ends_are_silent() -> None:
    raw = yaml.safe_load((conf_dir() / "verl/thunder_router.yaml").read_text())
    assert parse(raw) == RouterConfig(router_class=NAME, scheduler=SCHEDULER)


def test_the_least_that_verl_needs_is_enough() -> None:
    assert parse({"router_class": NAME}) == RouterConfig(router_class=NAME)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ({"pol_s": 1.0}, r"pol_s: no such field; did you mean poll_s\?"),
        ({"scheduler": {"policy": "fastest"}}, r"scheduler\.policy='fastest'"),
        ({"scheduler": {"lease_s": 60.0}}, r"scheduler\.lease_s=60\.0: must be null"),
        ({"scheduler": {"max_staleness": 1}}, r"scheduler\.max_staleness=1: must be null"),
        ({"orphan_s": 0}, r"orphan_s=0\.0: must be > 0"),
        ({"capacity_tokens": 0}, r"capacity_tokens=0: must be at least 1"),
        ({"block_size": 0}, r"block_size=0: must be at least 1"),
    ],
)
def test_a_bad_field_is_named(raw: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse({"router_class": NAME, **raw})
