"""Let the policy act on unseen toy tasks in local sandboxes, with the real agent loop and grader.

It decodes with Hugging Face on one task at a time: a check of the recipe, not a benchmark.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.agent.loop import AgentLoop, TurnResult, in_one_piece
from thunder_rollout.engine.protocol import Generation, Sampling
from thunder_rollout.sandbox.local import LocalSandbox
from thunder_rollout.tasks.environment import sandbox_spec, started
from thunder_rollout.tasks.grading import Grade, grade
from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.toy import generate

_UNSEEN_SEED = 1_000_003
_MAX_TURNS = 10
_MAX_TURN_TOKENS = 160


@dataclass(frozen=True, slots=True)
class HuggingFaceClient:
    """A `ModelClient` that decodes in this process."""

    model: Any
    end_id: int

    async def turn(self, prompt_ids: list[int], sampling: Sampling) -> TurnResult:
        started = time.monotonic()
        greedy = sampling.temperature == 0
        how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        prompt = torch.tensor([prompt_ids])
        with torch.inference_mode():
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=sampling.max_tokens,
                eos_token_id=self.end_id,
                **how,
            )
        token_ids = output[0, len(prompt_ids) :].tolist()
        took_s = time.monotonic() - started
        generation = Generation(
            token_ids=token_ids,
            logprobs=[0.0] * len(token_ids),
            finish_reason="stop" if token_ids[-1] == self.end_id else "length",
            prompt_tokens=len(prompt_ids),
            cached_tokens=0,
            queue_s=0.0,
            prefill_s=0.0,
            decode_s=took_s,
        )
        return in_one_piece(generation, backend="hf", queue_s=0.0, engine_s=took_s)

    async def tool_started(self, tool: str) -> None: ...

    async def tool_ended(self) -> None: ...


def evaluate(folder: Path, count: int, temperature: float, difficulty: str) -> str:
    """One line: how many of `count` tasks it fixed, and why not the others."""
    return asyncio.run(_evaluate(folder, generate(_UNSEEN_SEED, count, difficulty), temperature))


async def _evaluate(folder: Path, tasks: list[Task], temperature: float) -> str:
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    client = HuggingFaceClient(model, chat.end_id)
    loop = AgentLoop(
        chat=chat,
        config=AgentConfig(max_turns=_MAX_TURNS, max_turn_tokens=_MAX_TURN_TOKENS),
        sampling=Sampling(max_tokens=_MAX_TURN_TOKENS, temperature=temperature),
        max_model_len=model.config.max_position_embeddings,
    )
    grades = [await _play(task, loop, client) for task in tasks]
    fixed = sum(verdict.resolved for verdict in grades)
    reasons = Counter(verdict.reason for verdict in grades if not verdict.resolved)
    return f"fixed {fixed} of {len(tasks)} unseen tasks at temperature {temperature:g}; not fixed: {dict(reasons)}"


async def _play(task: Task, loop: AgentLoop, client: HuggingFaceClient) -> Grade:
    spec = sandbox_spec(task)
    async with started(LocalSandbox(spec)) as sandbox:
        await loop.run(task.problem_statement, client, sandbox)
        patch = await sandbox.diff(task.base_commit)
    return await grade(task, patch, lambda: started(LocalSandbox(spec)))
