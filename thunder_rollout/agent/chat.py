"""Chat template in, token ids out; history is never tokenised again.

The template is rendered once with markers to learn what stands between an assistant's turn and
the next one. From then on a conversation only grows: the ids the engine produced are kept as
they are and each observation is tokenised by itself (the idea behind verl's Continuous Token).
"""

from __future__ import annotations

from typing import Any

from thunder_rollout.errors import ConfigError

_USER, _ASSISTANT, _OBSERVATION = "@USER@", "@ASSISTANT@", "@OBSERVATION@"


class ChatFormat:
    """A Hugging Face tokenizer's chat template as a token-level format.

    `end_id` ends an assistant's turn (`<|im_end|>` for ChatML) and is what engines stop at.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("engine.model: its tokenizer has no chat template; use a chat model's folder")
        self._tokenizer = tokenizer
        messages = [
            {"role": "user", "content": _USER},
            {"role": "assistant", "content": _ASSISTANT},
            {"role": "user", "content": _OBSERVATION},
        ]
        after = self._render(messages).partition(_ASSISTANT)[2]
        self._turn_end, found, self._generation_prompt = after.partition(_OBSERVATION)
        if not found:
            raise ConfigError("engine.model: its chat template doesn't keep user and assistant turns in order")
        self.end_id = self._encode(self._turn_end)[0]
        control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted({*tokenizer.all_special_tokens, *control}, key=len, reverse=True)

    def initial_ids(self, system: str, user: str) -> list[int]:
        """The first prompt: system and user message, ready for the assistant to speak."""
        user = self.escape(user)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if not system or not self._has_system_role():
            messages = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}]
        return self._encode(self._render(messages))

    def observation_ids(self, text: str, *, ended: bool) -> list[int]:
        """What goes between two assistant turns.

        `ended` says that the turn before already closed itself with `end_id`; a turn that was cut
        short is closed here, as context. Special tokens inside `text` are defused.
        """
        ids = self._encode(self._turn_end + self.escape(text) + self._generation_prompt)
        return ids[1:] if ended else ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of produced ids without special tokens, for reading actions only."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def escape(self, text: str) -> str:
        """`text` with its special tokens defused: as written by others it must not steer the conversation."""
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _render(self, messages: list[dict[str, str]]) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _has_system_role(self) -> bool:
        marked = [{"role": "system", "content": "@SYSTEM@"}, {"role": "user", "content": _USER}]
        try:
            return "@SYSTEM@" in self._render(marked)
        except Exception as error:  # templates refuse a role by raising jinja2's TemplateError
            if type(error).__name__ != "TemplateError":
                raise
            return False
