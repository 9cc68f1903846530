"""The recipe's settings, read once from config.yaml; a wrong key or type names its field."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.toy import DIFFICULTIES

CONFIG_PATH = Path(__file__).with_name("config.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    vocab_size: int
    num_transcripts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    initializer_range: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    num_steps: int
    batch_transcripts: int
    mistake_share: float
    hasty_share: float
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    seed: int
    difficulty: str
    tokenizer: TokenizerSettings
    model: ModelSettings
    train: TrainSettings


def load_settings(path: Path = CONFIG_PATH) -> Settings:
    """Raises `ConfigError`."""
    loaded = yaml.safe_load(path.read_text())
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must hold a mapping of settings")
    values = dict(loaded)
    sections = {"tokenizer": TokenizerSettings, "model": ModelSettings, "train": TrainSettings}
    for name, section in sections.items():
        values[name] = _build(section, values.get(name), f"{path}: {name}.")
    settings: Settings = _build(Settings, values, f"{path}: ")
    if settings.difficulty not in DIFFICULTIES:
        raise ConfigError(f"{path}: difficulty={settings.difficulty!r}: must be one of {', '.join(DIFFICULTIES)}")
    return settings


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where[:-1]} is missing; copy it from the recipe's config.yaml")
    wanted = {field.name: field.type for field in fields(kind)}
    for name in wanted.keys() ^ values.keys():
        verb = "is missing" if name in wanted else "is not a setting"
        raise ConfigError(f"{where}{name} {verb}; the settings are {', '.join(wanted)}")
    for name, value in values.items():
        if wanted[name] in ("int", "float") and type(value).__name__ != wanted[name]:
            raise ConfigError(f"{where}{name}={value!r}: must be a {wanted[name]}")
    return kind(**values)
