"""From a configuration to the engine it names."""

from __future__ import annotations

from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.protocol import Engine
from thunder_rollout.engine.vllm import VllmEngine


def create_engine(config: EngineConfig) -> Engine:
    """An engine that is yet to be started, in this process."""
    return FakeEngine(config) if config.kind == "fake" else VllmEngine(config)
