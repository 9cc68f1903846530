"""A stand-in for verl's vLLM server actor: the attributes that a router reads, and no engine behind them."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any


class StandInServer:
    """`begin` and `end` are what a turn does to a real one."""

    def __init__(self, capacity_tokens: int, max_num_seqs: int = 64) -> None:
        greedy = SimpleNamespace(temperature=0, top_p=1.0, top_k=-1)
        self.config = SimpleNamespace(
            name="vllm",
            data_parallel_size=1,
            disaggregation=SimpleNamespace(enabled=False),
            max_num_seqs=max_num_seqs,
            val_kwargs=greedy,
            full_determinism=False,
            enable_prefix_caching=True,
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
        )
        self.model_config = SimpleNamespace(processor=None)
        self.global_steps: int | None = None
        self._submission_paused = False
        cache = SimpleNamespace(num_gpu_blocks=capacity_tokens // 16 + 1, block_size=16)
        self.engine = SimpleNamespace(
            vllm_config=SimpleNamespace(cache_config=cache, model_config=SimpleNamespace(max_model_len=4096)),
            output_processor=SimpleNamespace(request_states={}),
            errored=False,
        )

    async def begin(self, prompt_tokens: int) -> str:
        name = uuid.uuid4().hex
        self.engine.output_processor.request_states[name] = SimpleNamespace(prompt_len=prompt_tokens)
        return name

    async def end(self, name: str) -> None:
        del self.engine.output_processor.request_states[name]

    async def set(self, **attributes: Any) -> None:
        for attribute, value in attributes.items():
            setattr(self, attribute, value)
