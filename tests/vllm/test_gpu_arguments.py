"""The GPU path without a GPU: composed configs up to vLLM's engine arguments and Ray's reservations."""

from __future__ import annotations

from dataclasses import fields

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from thunder_rollout.config import load_rollout_config
from thunder_rollout.engine.config import EngineConfig, check_resources
from thunder_rollout.engine.vllm_arguments import engine_arguments
from thunder_rollout.engine.vllm_executor import OwnedMultiprocExecutor, OwnedUniProcExecutor
from thunder_rollout.errors import ConfigError

EIGHT_GPU_NODES = {"CPU": 128.0, "GPU": 16.0}  # two of them


def composed(*overrides: str) -> EngineConfig:
    return load_rollout_config(["engine=gpu", "engine.model=org/model", *overrides]).engine


def arguments(config: EngineConfig) -> AsyncEngineArgs:
    return AsyncEngineArgs(**engine_arguments(config, {field.name for field in fields(AsyncEngineArgs)}))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (1, 8)])
def test_an_engine_takes_one_to_eight_gpus_of_one_node(tensor: int, pipeline: int) -> None:
    config = composed(f"engine.tensor_parallel_size={tensor}", f"engine.pipeline_parallel_size={pipeline}")
    assert config.resources() == {"CPU": 1.0, "GPU": float(tensor * pipeline)}
    args = arguments(config)
    assert (args.tensor_parallel_size, args.pipeline_parallel_size) == (tensor, pipeline)
    single = tensor * pipeline == 1
    assert args.distributed_executor_backend is (OwnedUniProcExecutor if single else OwnedMultiprocExecutor)
    assert args.gpu_memory_utilization == 0.9
    assert args.num_gpu_blocks_override is None, "as many as the memory holds"
    assert args.kv_cache_memory_bytes is None


def test_engines_fill_several_nodes() -> None:
    check_resources(composed("engine.tensor_parallel_size=4"), 4, EIGHT_GPU_NODES)
    with pytest.raises(ConfigError, match=r"5 engines need 20 GPUs and the cluster has 16"):
        check_resources(composed("engine.tensor_parallel_size=4"), 5, EIGHT_GPU_NODES)


def test_two_small_engines_share_a_gpu() -> None:
    config = composed("engine.num_gpus=0.5", "engine.gpu_memory_utilization=0.45")
    assert config.resources()["GPU"] == 0.5
    assert arguments(config).gpu_memory_utilization == 0.45


def test_what_a_gpu_engine_is_given_reaches_vllm() -> None:
    args = arguments(
        composed(
            "engine.kv_cache_tokens=160000",
            "engine.max_model_len=32768",
            "engine.max_num_seqs=64",
            "+engine.extra.kv_cache_dtype=fp8",
        )
    )
    assert (args.num_gpu_blocks_override, args.block_size, args.max_model_len) == (10_001, 16, 32_768)
    assert (args.max_num_seqs, args.kv_cache_dtype) == (64, "fp8")
