"""Two tiny models whose log-probabilities tell which weights spoke: a real engine goes from one to the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.engine_contract import CONFIG, new_prompt, run
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.events import BackendUp
from thunder_rollout.engine.protocol import Sampling
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.engine.vllm import VllmEngine
from thunder_rollout.engine.weights import FolderWeights, MemoryWeights, UpdateMode
from thunder_rollout.errors import EngineDied, WeightsRefused
from thunder_rollout.runtime.client import LocalScheduler, ProgramClient
from thunder_rollout.runtime.service import SchedulerService
from thunder_rollout.runtime.weights import update_weights

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Model:
    path: Path

    def __post_init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.bfloat16)

    def logprobs(self, context: list[int], output: list[int]) -> list[float]:
        """Of each output id after the context and those before it."""
        with torch.no_grad():
            logits = self._model(torch.tensor([context + output])).logits[0, len(context) - 1 : -1].float()
        return torch.log_softmax(logits, -1)[range(len(output)), output].tolist()

    def spoke(self, context: list[int], output: list[int], logprobs: list[float]) -> bool:
        """Whether these are its log-probabilities, as far as bfloat16 goes."""
        own = self.logprobs(context, output)
        return max(abs(a - b) for a, b in zip(own, logprobs, strict=True)) < 0.1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Two random models say much the same where both repeat the prompt's last token; `b` is surer of it."""
    paths = {
        name: write_preset("qwen2_test", tmp_path_factory.mktemp(name), seed=seed).path
        for seed, name in enumerate(("a", "b"))
    }
    file = paths["b"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] *= 4
    save_file(tensors, file, metadata={"format": "pt"})
    return {name: Model(path) for name, path in paths.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(models: dict[str, Model]) -> AsyncIterator[VllmEngine]:
    vllm = VllmEngine(replace(CONFIG, model=str(models["a"].path)))
    try:
        await vllm.start()
        yield vllm
    finally:
        await vllm.stop()


def in_buckets(model: Model) -> MemoryWeights:
    """Backwards, so that the tensors of a layer are far apart, and a few at a time."""
    tensors = load_file(model.path / "model.safetensors")
    source = MemoryWeights.of(reversed(tensors.items()), bucket_bytes=max(t.nbytes for t in tensors.values()))
    assert len(source.buckets) >= 3
    return source


async def test_folder_and_memory_and_back(engine: VllmEngine, models: dict[str, Model]) -> None:
    prompt = new_prompt(100)
    a, b = models["a"], models["b"]
    outputs = {}
    for version, source in (
        ("0", None),
        ("folder b", FolderWeights(path=str(b.path))),
        ("memory a", MemoryWeights.of(load_file(a.path / "model.safetensors"))),
        ("buckets b", in_buckets(b)),
        ("buckets a", in_buckets(a)),
        ("memory b", MemoryWeights.of(load_file(b.path / "model.safetensors"))),
        ("a", FolderWeights(path=str(a.path))),
    ):
        if source is not None:
            await engine.update_weights(source, version=version, mode=UpdateMode.CUT)
        generation = await run(engine, prompt)
        outputs[version] = generation.token_ids
        assert (generation.weight_version, generation.cached_tokens) == (version, 0)
        spoke, silent = (b, a) if version.endswith("b") else (a, b)
        assert spoke.spoke(prompt, generation.token_ids, generation.logprobs), version
        assert not silent.spoke(prompt, generation.token_ids, generation.logprobs), version
    assert outputs["0"] == outputs["memory a"] == outputs["buckets a"] == outputs["a"]
    assert outputs["folder b"] == outputs["memory b"] == outputs["buckets b"]


async def test_vllm_alone_keeps_the_old_head_on_the_cpu(engine: VllmEngine, models: dict[str, Model]) -> None:
    """Where this fails, `engine.vllm_reload` is needed no more."""
    prompt, a, b = new_prompt(100), models["a"], models["b"]
    vllm = await engine._serving()
    await vllm.pause_generation(mode="abort", clear_cache=True)
    await vllm.collective_rpc("reload_weights", kwargs={"weights_path": str(b.path)})
    await vllm.resume_generation()
    generation = await run(engine, prompt)
    assert not b.spoke(prompt, generation.token_ids, generation.logprobs)
    await engine.update_weights(FolderWeights(path=str(a.path)), version="a", mode=UpdateMode.CUT)
    generation = await run(engine, prompt)
    assert a.spoke(prompt, generation.token_ids, generation.logprobs)


async def test_a_kept_turn_has_the_one_prefix_and_what_the_other_goes_on_with(
    engine: VllmEngine, models: dict[str, Model]
) -> None:
    """Many programs through the scheduler, an update in the midst of their turns: none is lost, and each
    segment is of the weights that its record names."""
    info = engine._capacity_tokens
    service = SchedulerService(SchedulerConfig())
    service.handle(BackendUp(backend="e0", generation=0, capacity_tokens=info, max_running=16))
    await service.start()
    scheduler, engines = LocalScheduler(service), {"e0": engine}
    greedy = Sampling(max_tokens=300, temperature=0.0, ignore_eos=True)

    async def play(name: str):
        prompt = new_prompt(60)
        async with ProgramClient(name, scheduler, engines, block_size=32) as client:
            return prompt, await client.turn(prompt, greedy)

    programs = [asyncio.create_task(play(f"p{number}")) for number in range(12)]
    await asyncio.sleep(0.3)
    source = FolderWeights(path=str(models["b"].path))
    report = await update_weights(scheduler, engines, source, version="b", mode=UpdateMode.KEEP)
    turns = await asyncio.gather(*programs)
    await service.stop()
    assert report.died == ()
    by_version = {"a": models["a"], "b": models["b"]}
    mixed = 0
    for prompt, result in turns:
        generation, context, start = result.generation, list(prompt), 0
        assert len(generation.token_ids) == 300
        mixed += len(result.weights) > 1
        for segment in result.weights:
            end = start + segment.num_tokens
            tokens, logprobs = generation.token_ids[start:end], generation.logprobs[start:end]
            assert by_version[segment.version].spoke(context, tokens, logprobs)
            context, start = context + tokens, end
    assert mixed > 0


async def test_what_is_not_this_models_is_refused_and_the_old_weights_serve(engine: VllmEngine, tmp_path: Path) -> None:
    tensors = load_file(Path(engine._config.model) / "model.safetensors")
    name = next(name for name in tensors if "layers.1" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsRefused, match="lacks tensor"):
        await engine.update_weights(FolderWeights(path=str(tmp_path)), version="x", mode=UpdateMode.CUT)
    assert (await run(engine, new_prompt(40))).weight_version == "b"


async def test_weights_that_fail_half_way_end_the_engine(
    engine: VllmEngine, models: dict[str, Model], tmp_path: Path
) -> None:
    """Comes last: the engine is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thunder_rollout.engine.vllm.check_weights", lambda folder, model: None)
        (tmp_path / "model.safetensors").write_bytes(b"torn")
        with pytest.raises(EngineDied, match="failed half-way"):
            await engine.update_weights(FolderWeights(path=str(tmp_path)), version="x", mode=UpdateMode.CUT)
    with pytest.raises(EngineDied, match="failed half-way"):
        await run(engine, new_prompt(40))
