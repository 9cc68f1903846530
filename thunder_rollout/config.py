"""The whole configuration: hydra composes it from `conf/`, this module makes it typed.

Built once at the entry and handed down. Whatever is wrong (a misspelt field, a wrong type, an
impossible value) is a `ConfigError` that names the field and the remedy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

import thunder_rollout
from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.errors import ConfigError
from thunder_rollout.observe.config import ObserveConfig
from thunder_rollout.runtime.config import RayConfig, RolloutSettings
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.tasks.config import TaskConfig
from thunder_rollout.tasks.grading import GradingConfig

T = TypeVar("T")

_RUN_NAME = re.compile(r"[\w-][\w.-]*")
_RESERVED_NAMES = ("latest", "bench", "bench_full", "simulate")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """One field a hydra group, the rest from `conf/rollout.yaml`."""

    engine: EngineConfig
    task: TaskConfig
    name: str | None = None  # the run folder's; null: resume the latest unfinished one, else by time
    runs_dir: str = "runs"
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if self.name is not None and not _RUN_NAME.fullmatch(self.name):
            raise ConfigError(f"name={self.name!r}: must be letters, digits, '.', '_' or '-', and not begin with '.'")
        if self.name in _RESERVED_NAMES:
            raise ConfigError(f"name={self.name!r}: {self.runs_dir}/{self.name} has another meaning; choose another")
        if self.sandbox.limits.ttl_s <= self.agent.max_episode_s:
            raise ConfigError(
                f"sandbox.limits.ttl_s={self.sandbox.limits.ttl_s:g}: must be above agent.max_episode_s="
                f"{self.agent.max_episode_s:g}, which leaves out what an episode waits; many times that is right"
            )


def conf_dir() -> Path:
    """Where the YAML lies: inside an installed wheel, or beside the package in a checkout."""
    package = Path(thunder_rollout.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def load_rollout_config(overrides: list[str]) -> RolloutConfig:
    """Compose `conf/rollout.yaml` with hydra overrides, outside of hydra's own entry."""
    return to_typed(RolloutConfig, compose_config("rollout", overrides))


def compose_config(name: str, overrides: list[str]) -> DictConfig:
    """Compose `conf/<name>.yaml`; raises `ConfigError` naming what hydra could not place."""
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        try:
            return compose(name, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__
            if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
                parent, _, key = cause.full_key.rpartition(".")
                there = compose(name, [])
                raise _no_such_field(parent, key, OmegaConf.select(there, parent) if parent else there) from None
            raise ConfigError(str(error)) from None


def with_known_fields(cls: Any, overrides: list[str]) -> list[str]:
    """hydra takes `a.b=c` only for fields that some YAML names; here every field of `cls` will do."""
    return [f"++{override}" if _is_field(cls, override.partition("=")[0]) else override for override in overrides]


def _is_field(cls: Any, path: str) -> bool:
    """Whether the dotted `path` is a setting of `cls` below its first level (where groups live)."""
    head, dot, rest = path.partition(".")
    kind = get_type_hints(cls).get(head) if is_dataclass(cls) else None
    while dot and is_dataclass(kind):
        head, dot, rest = rest.partition(".")
        kind = get_type_hints(kind).get(head)
        if kind is not None and not dot:
            return True
    return bool(dot) and get_origin(kind) is dict


def to_typed(cls: type[T], config: DictConfig) -> T:
    """A dataclass from a composed config; raises `ConfigError` naming the field."""
    try:
        raw = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {error.msg or error}; give it a value") from error
    assert isinstance(raw, dict)
    _refuse_unknown(cls, raw, "")
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as error:
        lines = (
            f"{'.'.join(str(part) for part in e['loc'])}={e['input']!r}: {e['msg']}"
            if e["type"] != "missing"
            else f"{'.'.join(str(part) for part in e['loc'])}: has no value; set it"
            for e in error.errors()
        )
        raise ConfigError("\n".join(lines)) from None


def _refuse_unknown(cls: Any, raw: Mapping[Any, Any], path: str) -> None:
    known = {f.name for f in fields(cls)}
    hints = get_type_hints(cls)
    for key, value in raw.items():
        if key not in known:
            raise _no_such_field(path, key, known)
        where = f"{path}.{key}" if path else key
        if is_dataclass(hints[key]) and isinstance(value, Mapping):
            _refuse_unknown(hints[key], value, where)
            continue
        inner = next((kind for kind in reversed(get_args(hints[key])) if is_dataclass(kind)), None)
        items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for name, item in items:
            if inner is not None and isinstance(item, Mapping):
                _refuse_unknown(inner, item, f"{where}.{name}")


def _no_such_field(parent: str, key: str, known: Iterable[Any]) -> ConfigError:
    prefix = f"{parent}." if parent else ""
    names = sorted(str(name) for name in known)
    close = difflib.get_close_matches(str(key), names, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else f"{parent or 'it'} has: {', '.join(names)}"
    return ConfigError(f"{prefix}{key}: no such field; {hint}")
