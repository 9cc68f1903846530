"""A conversation in verl's own tokens.

What stands between two turns comes from verl's Continuous Token builder, as in verl's own agent loops, so that
a row has the ids that `tool_agent` would have given it. Two things differ. Special tokens in what a tool
printed are defused, for it is written by whoever likes. A turn that was cut short is closed as context before
the observation; verl's loops end there.
"""

from __future__ import annotations

from typing import Any, Protocol

from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.errors import ConfigError

_TURN = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


class Merged(Protocol):
    @property
    def token_ids(self) -> list[int]: ...


class ContextBuilder(Protocol):
    """What is used of verl's `ContinuousTokenBuilder`."""

    def merge_context_tokens(
        self,
        previous_messages: list[dict[str, Any]],
        updated_messages: list[dict[str, Any]],
        runtime_token_ids: list[int],
    ) -> Merged: ...


class ContinuousChat:
    """One row's conversation, which begins with `prompt_ids`; the agent loop's `Chat`."""

    def __init__(self, chat: ChatFormat, builder: ContextBuilder, prompt_ids: list[int]) -> None:
        self._chat = chat
        self._builder = builder
        self._prompt_ids = prompt_ids

    @property
    def end_id(self) -> int:
        return self._chat.end_id

    def initial_ids(self, system: str, user: str) -> list[int]:
        """Those of the row, whose prompt is given."""
        return list(self._prompt_ids)

    def observation_ids(self, text: str, *, ended: bool) -> list[int]:
        message = {"role": "user", "content": self._chat.escape(text)}
        ids = list(self._builder.merge_context_tokens(_TURN, [*_TURN, message], [self.end_id]).token_ids)
        if ids[:1] != [self.end_id]:
            raise ConfigError(
                f"actor_rollout_ref.model.path: {type(self._builder).__name__} lets no turn end with its chat "
                f"template's token {self.end_id}; use a model whose chat template and type belong together"
            )
        return ids[1:] if ended else ids

    def decode(self, token_ids: list[int]) -> str:
        return self._chat.decode(token_ids)
