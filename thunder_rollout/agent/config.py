"""Limits and prompt of the agent loop."""

from __future__ import annotations

from dataclasses import dataclass

from thunder_rollout.errors import ConfigError

SYSTEM_PROMPT = (
    "You fix bugs in the git repository in the current directory. Each turn, reply with exactly one "
    "command in a block:\n```bash\ncommand\n```\nYou then see its exit code and output. Every command "
    "runs in a new shell. Change source files, not tests. When the bug is fixed, the command is `submit`."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """One episode's limits: whichever is reached first ends it."""

    system_prompt: str = SYSTEM_PROMPT
    max_turns: int = 30
    max_context_tokens: int = 32_768  # prompt and response together; the engine's limit also holds
    max_turn_tokens: int = 2_048
    max_episode_s: float = 1_800.0  # of prefill, decoding and commands; waiting for them is not the agent's time
    exec_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_context_tokens", "max_turn_tokens", "max_episode_s", "exec_timeout_s"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"agent.{name}={value!r}: must be > 0")
