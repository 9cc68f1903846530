"""An engine as the simulator sees it: `conf/sim_engine/*.yaml`, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from thunder_rollout.engine.model import EngineShape, EngineTiming
from thunder_rollout.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """Shape and step time of one backend; `source` says where the numbers come from.

    A step takes `step_s`, plus each other `_s` term times its count: prefilled tokens, (prefilled
    token, token it attends to) pairs, decoding turns, tokens of context that scheduled turns attend
    to. `turn_overhead_s` passes between a grant and the engine: transport, templating, hashing.
    `host_tokens` of KV fit a tier in host memory (0: there is none), from which a token takes
    `load_token_s`. With `release_on_pause` what paused and ended programs left in the cache goes first.
    """

    name: str
    source: str
    capacity_tokens: int
    block_size: int
    max_running: int
    max_batched_tokens: int
    max_context_tokens: int
    step_s: float
    prefill_token_s: float
    decode_turn_s: float
    context_token_s: float
    prefill_context_s: float = 0.0
    turn_overhead_s: float = 0.0
    host_tokens: int = 0
    load_token_s: float = 0.0
    release_on_pause: bool = False

    def __post_init__(self) -> None:
        for name in ("capacity_tokens", "block_size", "max_running", "max_batched_tokens", "max_context_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sim_engine.{name}={getattr(self, name)!r}: must be >= 1")
        for name in (
            "prefill_token_s",
            "decode_turn_s",
            "context_token_s",
            "prefill_context_s",
            "turn_overhead_s",
            "host_tokens",
            "load_token_s",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"sim_engine.{name}={getattr(self, name)!r}: must be >= 0")
        if self.step_s <= 0:
            raise ConfigError(f"sim_engine.step_s={self.step_s!r}: must be > 0, or time would stand still")
        if self.capacity_tokens < self.block_size:
            raise ConfigError(
                f"sim_engine.capacity_tokens={self.capacity_tokens}: must hold one block of {self.block_size} tokens"
            )
        if self.max_running > self.max_batched_tokens:
            raise ConfigError(
                f"sim_engine.max_running={self.max_running}: must not exceed max_batched_tokens="
                f"{self.max_batched_tokens}, for every decoding turn is in every step"
            )

    @property
    def shape(self) -> EngineShape:
        return EngineShape(
            num_blocks=self.capacity_tokens // self.block_size,
            block_size=self.block_size,
            max_running=self.max_running,
            max_batched_tokens=self.max_batched_tokens,
        )

    @property
    def timing(self) -> EngineTiming:
        return EngineTiming(
            step_s=self.step_s,
            prefill_token_s=self.prefill_token_s,
            decode_turn_s=self.decode_turn_s,
            context_token_s=self.context_token_s,
            prefill_context_s=self.prefill_context_s,
        )

    @property
    def longest_context_tokens(self) -> int:
        """What a turn may reach, prompt and output."""
        return min(self.max_context_tokens, self.shape.capacity_tokens)

    def prefill_s(self, num_tokens: int, cached_tokens: int = 0) -> float:
        """A lone prompt of `num_tokens`, the first `cached_tokens` of them cached."""
        seconds = 0.0
        computed = cached_tokens
        while computed < num_tokens:
            chunk = min(self.max_batched_tokens, num_tokens - computed)
            computed += chunk
            seconds += (
                self.step_s
                + self.prefill_token_s * chunk
                + self.context_token_s * computed
                + self.prefill_context_s * chunk * (computed - chunk / 2)
            )
        return seconds

    def decode_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """A lone turn's tokens after the first."""
        steps = max(0, output_tokens - 1)
        per_step = self.step_s + self.decode_turn_s + self.context_token_s * (prompt_tokens + output_tokens / 2)
        return steps * per_step


def read_profile(path: Path) -> EngineProfile:
    """A file as `thunder-rollout calibrate` writes it."""
    try:
        return EngineProfile(**yaml.safe_load(path.read_text()))
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"profile={path}: {error}; give a file as conf/sim_engine/*.yaml is") from None
