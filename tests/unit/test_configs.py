"""Every YAML of conf/ composes into its typed config."""

from __future__ import annotations

import pytest

from tests.support.configs import TOP_LEVEL, choices, compose_typed
from thunder_rollout.config import conf_dir

CHOICES = choices(conf_dir())
FOR_VERL = {"verl"}  # files that verl reads, see tests/unit/verl_adapter


@pytest.mark.parametrize(("name", "overrides"), CHOICES, ids=[" ".join([n, *o]) for n, o in CHOICES])
def test_config_composes(name: str, overrides: list[str]) -> None:
    assert isinstance(compose_typed(name, overrides), TOP_LEVEL[name])


def test_no_group_is_out_of_reach() -> None:
    reached = {overrides[0].split("=")[0] for _, overrides in CHOICES if overrides}
    assert reached == {path.parent.name for path in conf_dir().glob("*/*.yaml")} - FOR_VERL
