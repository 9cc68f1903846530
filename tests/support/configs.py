"""Every config that ships, composed as a user would: `python tests/support/configs.py` lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from thunder_rollout.bench.config import BenchConfig, BenchCoreConfig
from thunder_rollout.config import RolloutConfig, compose_config, conf_dir, to_typed
from thunder_rollout.runtime.make_tasks import MakeTasksConfig
from thunder_rollout.sim.config import CalibrateConfig, SimulateConfig
from thunder_rollout.tasks.to_verl import ToVerlConfig

TOP_LEVEL = {
    "rollout": RolloutConfig,
    "bench": BenchConfig,
    "bench_core": BenchCoreConfig,
    "simulate": SimulateConfig,
    "calibrate": CalibrateConfig,
    "make_tasks": MakeTasksConfig,
    "to_verl": ToVerlConfig,
}
MANDATORY = "???"


def choices(conf: Path) -> list[tuple[str, list[str]]]:
    """Each top-level config alone, then with each option of its groups; mandatory values are given."""
    found = []
    for top in sorted(conf.glob("*.yaml")):
        found.append((top.stem, []))
        for group in _groups(top):
            found += [
                (top.stem, [f"{group}={option.stem}", *_mandatory_values(option, group)])
                for option in sorted((conf / group).glob("*.yaml"))
            ]
    return found


def compose_typed(name: str, overrides: list[str]) -> object:
    return to_typed(TOP_LEVEL[name], compose_config(name, overrides))


def _groups(top: Path) -> list[str]:
    defaults = yaml.safe_load(top.read_text()).get("defaults", [])
    return [next(iter(entry)).removeprefix("override ") for entry in defaults if isinstance(entry, dict)]


def _mandatory_values(option: Path, group: str) -> list[str]:
    return [f"{key}=given-by-the-user" for key in _mandatory_keys(yaml.safe_load(option.read_text()) or {}, group)]


def _mandatory_keys(content: dict[str, Any], prefix: str) -> list[str]:
    keys = []
    for key, value in content.items():
        if isinstance(value, dict):
            keys += _mandatory_keys(value, f"{prefix}.{key}")
        elif value == MANDATORY:
            keys.append(f"{prefix}.{key}")
    return keys


if __name__ == "__main__":
    for name, overrides in choices(conf_dir()):
        compose_typed(name, overrides)
        print(conf_dir(), name, *overrides)
