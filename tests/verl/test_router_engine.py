"""verl's own client and vLLM server, on the CPU, through the router that verl's own manager made."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from omegaconf import DictConfig, OmegaConf
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerManager

from tests.support.verl_fakes import verl_config
from thunder_rollout.config import conf_dir
from thunder_rollout.engine.random_model import write_preset

KV_TOKENS = 4096
NUM_PROGRAMS = 24
MAX_TOKENS = 100
EXECUTOR = "thunder_rollout.engine.vllm_executor.OwnedUniProcExecutor"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True, "ignore_eos": True}
OVERRIDES = (
    "trainer.device=cpu",
    f"actor_rollout_ref.rollout.router_config_path={conf_dir() / 'verl/thunder_router.yaml'}",
    "actor_rollout_ref.rollout.dtype=float32",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.enforce_eager=True",
    "actor_rollout_ref.rollout.free_cache_engine=False",
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",
    "actor_rollout_ref.rollout.load_format=auto",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.1",
    "actor_rollout_ref.rollout.prompt_length=512",
    f"actor_rollout_ref.rollout.response_length={MAX_TOKENS}",
    "actor_rollout_ref.rollout.max_model_len=1024",
    "actor_rollout_ref.rollout.max_num_seqs=32",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.block_size=32",
    f"+actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override={KV_TOKENS // 32 + 1}",
    f"+actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend={EXECUTOR}",
)


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMServerManager]:
    """One standalone replica and its router, on a cluster of their own."""
    model = write_preset("qwen2_test", tmp_path_factory.mktemp("model")).path
    ray.shutdown()  # what other tests' cluster offers has no GPU
    ray.init(address="local", num_cpus=16, num_gpus=1, include_dashboard=False, object_store_memory=256 * 1024**2)
    try:
        yield LLMServerManager.create(config=_config(model))
    finally:
        ray.shutdown()


def _config(model: Path) -> DictConfig:
    readonly = verl_config(*OVERRIDES, f"actor_rollout_ref.model.path={model}")
    config: DictConfig = OmegaConf.create(OmegaConf.to_container(readonly))
    return config


def prompt(program: int, num_tokens: int = 300) -> list[int]:
    return [(program * 37 + place * 11) % 250 for place in range(num_tokens)]


async def until(ask: Callable[[], Awaitable[Any]], holds: Callable[[Any], Any]) -> Any:
    for _ in range(1000):
        if holds(answer := await ask()):
            return answer
        await asyncio.sleep(0.05)
    raise AssertionError(f"{answer} for too long")


async def turn(client: Any, program: int, prompt_ids: list[int]) -> Any:
    return await client.generate(f"p{program}", prompt_ids=prompt_ids, sampling_params=dict(SAMPLING))


@pytest.mark.timeout(300)
async def test_programs_beyond_the_kv_memory_wait_and_an_abort_is_resumed(manager: LLMServerManager) -> None:
    router, client = manager.global_load_balancer, manager.get_client(client_cls=FullyAsyncLLMServerClient)
    replica = manager.get_replicas()[0]
    await replica.servers[0].set_global_steps.remote(1)
    turns = [asyncio.create_task(turn(client, program, prompt(program))) for program in range(NUM_PROGRAMS)]
    status = await until(router.get_status.remote, lambda status: status["held"])
    in_flight = sum(status["servers"].values())
    assert 0 < in_flight <= KV_TOKENS // 300, "no more than its memory holds"
    assert status["total_inflight"] == NUM_PROGRAMS

    assert (await replica.abort_all_requests())["aborted_count"] > 0
    await replica.servers[0].set_global_steps.remote(2)
    await replica.resume_generation()
    outputs = await asyncio.gather(*turns)
    assert [len(output.token_ids) for output in outputs] == [MAX_TOKENS] * NUM_PROGRAMS
    assert {output.extra_fields["max_global_steps"] for output in outputs} == {2}

    again = [turn(client, p, prompt(p) + list(output.token_ids) + [5] * 40) for p, output in enumerate(outputs)]
    await asyncio.gather(*again)
    figures = await router.metrics.remote()
    assert 0 < figures["thunder/router/num_turns"] - 2 * NUM_PROGRAMS <= figures["thunder/router/num_cut_turns"]
    assert figures["thunder/router/num_programs"] == NUM_PROGRAMS
    assert figures["thunder/router/num_reclaimed_turns"] == 0
    await until(router.get_total_inflight.remote, lambda inflight: inflight == 0)


@pytest.mark.timeout(300)
async def test_what_the_router_reads_is_the_engines_own(manager: LLMServerManager) -> None:
    server = manager.get_replicas()[0].servers[0]
    blocks = await server.__ray_call__.remote(lambda self: self.engine.vllm_config.cache_config.num_gpu_blocks)
    port = await manager.global_load_balancer.__ray_call__.remote(
        lambda self: [(r.facts.capacity_tokens, r.facts.block_size) for r in self._router._pool._replicas.values()]
    )
    assert port == [((blocks - 1) * 32, 32)]
    assert (blocks - 1) * 32 == KV_TOKENS


@pytest.mark.timeout(300)
async def test_a_replica_whose_engine_core_was_killed_is_told_as_lost(manager: LLMServerManager) -> None:
    router, client = manager.global_load_balancer, manager.get_client()
    await turn(client, 0, prompt(0))
    assert await router.lost_servers.remote() == {}
    pid = await manager.get_replicas()[0].servers[0].__ray_call__.remote(lambda self: os.getpid())
    (core,) = [child for child in psutil.Process(pid).children() if child.name().startswith("VLLM::")]
    core.kill()
    lost = await until(router.lost_servers.remote, bool)
    assert list(lost.values()) == ["its engine core died"]
    with pytest.raises(RuntimeError, match="No available servers"):
        await turn(client, 0, prompt(0))
