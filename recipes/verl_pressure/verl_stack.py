"""verl's rollout stack on the CPU: two vLLM replicas, and over them both balancers, each with verl's own agent loop
manager, client and worker. What plays in the workers is `ScriptedLoop`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from omegaconf import DictConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopManager, AgentLoopOutput
from verl.protocol import DataProto
from verl.utils.profiler import marked_timer
from verl.workers.rollout.llm_server import LLMServerClient, LLMServerManager
from verl.workers.rollout.router import get_router_handle

from thunder_rollout.bench.workload import Script
from thunder_rollout.errors import EngineFailed
from thunder_rollout.verl_adapter.router.replica import read_facts

OBJECT_STORE_BYTES = 512 * 2**20


class ScriptedLoop(AgentLoopBase):
    """One program: its script's tokens and tool times, and as many tokens generated as it says. Tells no more of
    itself than verl's own loops do."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """`row["script"]` is a `Script`. Raises `EngineFailed` for a turn of another length."""
        script: Script = row["script"]
        program = uuid.uuid4().hex
        ids: list[int] = []
        mask: list[int] = []
        turns: list[dict[str, float]] = []
        for turn in script.turns:
            known_tokens = len(ids)
            ids += turn.new_ids
            began_s = time.monotonic()
            output = await self.server_manager.generate(
                request_id=program,
                prompt_ids=list(ids),
                sampling_params=sampling_params | {"max_tokens": turn.output_tokens, "ignore_eos": True},
            )
            if len(output.token_ids) != turn.output_tokens:
                raise EngineFailed(f"a turn gave {len(output.token_ids)} tokens, not {turn.output_tokens}")
            turns.append(
                {
                    "prompt_tokens": len(ids),
                    "known_tokens": known_tokens,
                    "cached_tokens": output.extra_fields.get("num_cached_tokens") or 0,
                    "turn_s": time.monotonic() - began_s,
                }
            )
            ids += output.token_ids
            mask += [0] * len(turn.new_ids) + [1] * len(output.token_ids)
            if turn is not script.turns[-1]:
                await asyncio.sleep(turn.tool_s)
        num_first = len(script.turns[0].new_ids)
        return AgentLoopOutput(
            prompt_ids=ids[:num_first],
            response_ids=ids[num_first:],
            response_mask=mask[num_first:],
            reward_score=0.0,
            num_turns=2 * len(turns),
            metrics={
                "generate_sequences": sum(turn["turn_s"] for turn in turns),
                "tool_calls": sum(turn.tool_s for turn in script.turns[:-1]),
            },
            extra_fields={"scripted": turns},
        )


@dataclass(frozen=True, slots=True)
class Played:
    """`gen_s` is verl's `timing_s/gen`; `programs` are the turns of each; `router` what the router says of itself."""

    gen_s: float
    programs: list[list[dict[str, float]]]
    router: dict[str, float]


class Stack:
    def __init__(self, config: DictConfig, router_path: str) -> None:
        self._servers = LLMServerManager.create(config=config)
        replicas = dict(zip(self._servers.server_addresses, self._servers.server_handles, strict=True))
        self._router = get_router_handle(servers=replicas, router_config_path=router_path)
        clients = {
            "verl": self._servers.get_client(),
            "router": LLMServerClient(config=config, load_balancer_handle=self._router),
        }
        self._managers = {
            name: AgentLoopManager.create(config=config, llm_client=client) for name, client in clients.items()
        }
        self._num_steps = 0

    def capacities(self) -> list[int]:
        """KV tokens of each replica, as it tells them."""
        handles = self._servers.server_handles
        facts = ray.get([handle.__ray_call__.remote(read_facts, None, 1) for handle in handles])
        return [one.capacity_tokens for one in facts]

    def play(self, balancer: str, scripts: Sequence[Script]) -> Played:
        """One step of training as far as rollouts go: all programs are handed over at once. Before it, out of the time
        that is measured, new weights are pretended, as verl does: caches are cleared, the version counts on."""
        self._num_steps += 1
        for handle in self._servers.server_handles:
            ray.get([handle.clear_kv_cache.remote(), handle.set_global_steps.remote(self._num_steps)])
        batch = batch_of(scripts, self._num_steps)
        timing: dict[str, float] = {}
        with marked_timer("gen", timing):
            output = self._managers[balancer].generate_sequences(batch)
        figures = ray.get(self._router.metrics.remote()) if balancer == "router" else {}
        return Played(timing["gen"], list(output.non_tensor_batch["scripted"]), figures)


@contextmanager
def started(config: DictConfig, router_path: str) -> Iterator[Stack]:
    """On a Ray cluster of its own."""
    ray.init(
        address="local",
        num_cpus=16,  # what verl's actors reserve, not what there is
        num_gpus=config.actor_rollout_ref.rollout.n_gpus_per_node,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    try:
        yield Stack(config, router_path)
    finally:
        ray.shutdown()


def batch_of(scripts: Sequence[Script], step: int) -> DataProto:
    rows = np.empty(len(scripts), dtype=object)
    rows[:] = list(scripts)
    prompts = np.empty(len(scripts), dtype=object)
    prompts[:] = [[] for _ in scripts]
    return DataProto.from_dict(
        non_tensors={"script": rows, "raw_prompt": prompts}, meta_info={"global_steps": step, "validate": False}
    )
