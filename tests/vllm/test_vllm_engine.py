"""The contract on a real vLLM engine, and that `FakeEngine` tells the truth about its cache."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file

from tests.support.engine_contract import *  # noqa: F403
from tests.support.engine_contract import CONFIG, VOCAB_SIZE, new_prompt, new_request, run, settled
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.protocol import Engine, EngineInfo, GenerateRequest
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.engine.vllm import VllmEngine
from thunder_rollout.engine.vllm_arguments import engine_arguments
from thunder_rollout.engine.vllm_offload import offload_tokens
from thunder_rollout.engine.vllm_release import make_releasing
from thunder_rollout.engine.weights import FolderWeights, MemoryWeights, WeightSource
from thunder_rollout.errors import ConfigError

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[VllmEngine, EngineInfo]]:
    model = write_preset("qwen2_test", tmp_path_factory.mktemp("model"))
    vllm = VllmEngine(replace(CONFIG, model=str(model.path)))
    try:
        yield vllm, await vllm.start()
    finally:
        await vllm.stop()


@pytest.fixture(scope="module")
def weights(
    started: tuple[VllmEngine, EngineInfo], tmp_path_factory: pytest.TempPathFactory
) -> tuple[WeightSource, WeightSource]:
    other = write_preset("qwen2_test", tmp_path_factory.mktemp("other"), seed=1).path
    return FolderWeights(path=started[1].model), MemoryWeights.of(load_file(other / "model.safetensors"))


@pytest.fixture
def engine(started: tuple[VllmEngine, EngineInfo]) -> VllmEngine:
    return started[0]


async def test_what_it_says_of_itself(started: tuple[VllmEngine, EngineInfo]) -> None:
    _, info = started
    assert (info.capacity_tokens, info.block_size) == (4096, 32)
    assert (info.max_running, info.max_model_len) == (16, 2048)


async def test_it_holds_what_it_says(engine: Engine) -> None:
    """Two turns that fill the pool to the last block run side by side, without preemption."""
    before = await settled(engine)
    await asyncio.gather(*(run(engine, new_prompt(2000), max_tokens=48) for _ in range(2)))
    assert (await settled(engine)).preemptions == before.preemptions


async def test_the_fake_agrees_on_every_hit(engine: Engine) -> None:
    """Programs take turns on a pool too small for all; the same turns, in the same order, hit the
    same tokens in both engines, also where programs are released between their turns."""
    rng = random.Random(0)
    programs = [new_prompt(rng.randrange(20, 300)) for _ in range(8)]
    await settled(engine)
    await engine.reset_prefix_cache()
    turns: list[tuple[GenerateRequest, list[int], int]] = []
    for _ in range(60):
        number = rng.randrange(len(programs))
        context = programs[number]
        if len(context) > 1200:
            del context[rng.randrange(100, 1000) :]  # a program may edit its history
        request = replace(
            new_request(list(context), max_tokens=rng.randrange(1, 60)),
            program=f"p{number}",
            released=tuple(f"p{other}" for other in rng.sample(range(len(programs)), 2) if rng.random() < 0.5),
        )
        generation = await engine.generate(request)
        turns.append((request, generation.token_ids, generation.cached_tokens))
        context += [*generation.token_ids, *rng.choices(range(VOCAB_SIZE), k=rng.randrange(1, 150))]
    outputs = iter([output for _, output, _ in turns])
    fake = FakeEngine(CONFIG, script=lambda prompt_ids, sampling: next(outputs), vocab_size=VOCAB_SIZE)
    await fake.start()
    hits = [(await fake.generate(request)).cached_tokens for request, _, _ in turns]
    await fake.stop()
    assert hits == [cached for _, _, cached in turns]
    assert 0 in hits
    assert len(set(hits)) > 10


async def test_another_engine_argument_is_refused_by_name(engine: VllmEngine) -> None:
    for extra, message in (
        ({"max_logprob": 1}, r"engine\.extra\.max_logprob: .*did you mean engine\.extra\.max_logprobs"),
        ({"model": "x"}, r"engine\.extra\.model: .*use engine\.model"),
        ({"num_gpu_blocks_override": 9}, r"use engine\.kv_cache_tokens"),
        ({"kv_events_config": None}, r"use engine\.kv_events"),
        ({"scheduling_policy": "no"}, r"engine: vLLM refuses this configuration"),
    ):
        other = VllmEngine(replace(engine._config, extra=extra))
        with pytest.raises(ConfigError, match=message):
            await other.start()
        await other.stop()


async def test_an_untried_vllm_keeps_its_scheduler(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vllm
    from vllm.config import SchedulerConfig

    def scheduler(version: str, **fields: Any) -> Any:
        monkeypatch.setattr(vllm, "__version__", version)
        made = SimpleNamespace(scheduler_config=SchedulerConfig.default_factory(**fields))
        make_releasing(made)
        return made.scheduler_config.scheduler_cls

    assert scheduler("0.28.0", async_scheduling=False).__name__ == "ReleasingScheduler"
    assert scheduler("0.28.1", async_scheduling=True).__name__ == "ReleasingAsyncScheduler"
    assert "release_on_pause" not in caplog.text
    assert scheduler("0.29.0") is None
    assert "engine.release_on_pause=true: not tried with vLLM 0.29.0" in caplog.text
    with pytest.raises(ConfigError, match=r"engine\.extra\.scheduler_cls: .*give one of the two"):
        scheduler("0.28.0", scheduler_cls="some.Scheduler")


async def test_offload_to_host_memory_is_composed(engine: VllmEngine, started: tuple[VllmEngine, EngineInfo]) -> None:
    """For a GPU, up to the engine's configuration: vLLM moves KV to the host from GPUs alone."""
    from dataclasses import fields

    from vllm.engine.arg_utils import AsyncEngineArgs

    assert started[1].offload_tokens == 0
    gpu = replace(engine._config, device="gpu", num_gpus=1, kv_offload_gib=0.5)
    arguments = engine_arguments(gpu, {field.name for field in fields(AsyncEngineArgs)}, None)
    vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
    assert vllm_config.kv_transfer_config.kv_connector == "OffloadingConnector"
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    assert extra == {"cpu_bytes_to_use": 2**29, "offload_prompt_only": False}
    model = vllm_config.model_config.hf_config
    token_bytes = 2 * 2 * model.num_hidden_layers * model.num_key_value_heads * 32
    assert (model.hidden_size // model.num_attention_heads, vllm_config.model_config.dtype.itemsize) == (32, 2)
    assert offload_tokens(vllm_config, 0.5) == 2**29 // token_bytes
    with pytest.raises(ConfigError, match=r"engine\.extra\.kv_offloading_size: .*use engine\.kv_offload_gib"):
        engine_arguments(replace(gpu, extra={"kv_offloading_size": 1}), set(arguments), None)


async def test_a_turn_that_never_ran_can_be_aborted(engine: Engine) -> None:
    running = [asyncio.create_task(run(engine, new_prompt(100), max_tokens=150)) for _ in range(16)]
    await asyncio.sleep(0.1)
    request = new_request(new_prompt(40))
    waiting = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0.05)
    await engine.abort(request.request_id)
    generation = await waiting
    assert (generation.token_ids, generation.finish_reason, generation.cached_tokens) == ([], "abort", 0)
    await asyncio.gather(*running)
