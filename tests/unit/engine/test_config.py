from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from thunder_rollout.config import conf_dir
from thunder_rollout.engine.config import EngineConfig, check_model_folder, check_resources
from thunder_rollout.errors import ConfigError

GPU: dict[str, Any] = {"model": "m", "device": "gpu", "num_gpus": 1}


@pytest.mark.parametrize("name", ["cpu_tiny", "gpu"])
def test_the_shipped_files_are_valid_and_misspell_nothing(name: str) -> None:
    raw = yaml.safe_load((conf_dir() / "engine" / f"{name}.yaml").read_text())
    assert raw.keys() <= {field.name for field in fields(EngineConfig)}
    config = EngineConfig(**{**raw, "model": "org/name"})
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "vlm"}, "kind"),
        ({"device": "tpu"}, "device"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode"),
        ({"distributed_executor_backend": "mpi"}, "distributed_executor_backend"),
        ({"log_level": "LOUD"}, "log_level"),
        ({"block_size": 0}, "block_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"omp_threads": 0}, "omp_threads"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"startup_timeout_s": 0}, "startup_timeout_s"),
        ({"num_cpus": -1}, "num_cpus"),
        ({"kv_cache_tokens": 31}, "kv_cache_tokens"),
        ({"kv_cache_tokens": 1024, "max_model_len": 2048}, "kv_cache_tokens"),
        ({"kv_offload_gib": -1}, "kv_offload_gib"),
        ({"kv_offload_gib": 1}, "kv_offload_gib"),
        ({**GPU, "kv_offload_gib": 1, "kind": "fake"}, "kv_offload_gib"),
        ({**GPU, "kv_offload_gib": 1, "enable_prefix_caching": False}, "kv_offload_gib"),
        ({"num_gpus": 1}, "num_gpus"),
        ({**GPU, "num_gpus": 0}, "num_gpus"),
        ({**GPU, "tensor_parallel_size": 2}, "num_gpus"),
        ({**GPU, "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "num_gpus": 2}, "num_gpus"),
    ],
)
def test_an_impossible_value_names_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^engine\.{field}=.*(must be|raise)"):
        EngineConfig(**{"model": "m", **changes})


def test_the_pool_is_whole_blocks() -> None:
    config = EngineConfig(model="m", kv_cache_tokens=100, block_size=32, max_model_len=96)
    assert config.num_kv_blocks == 3


def test_resources_name_only_what_is_reserved() -> None:
    assert EngineConfig(model="m", num_cpus=2).resources() == {"CPU": 2}
    assert EngineConfig(**GPU, num_cpus=0).resources() == {"GPU": 1}


def test_only_a_cpu_engine_binds_threads() -> None:
    assert EngineConfig(model="m", omp_threads=3).environment()["OMP_NUM_THREADS"] == "3"
    assert not any("CPU" in name or "OMP" in name for name in EngineConfig(**GPU).environment())


def test_more_than_the_cluster_has() -> None:
    check_resources(EngineConfig(**GPU), 2, {"CPU": 8.0, "GPU": 2.0})
    with pytest.raises(ConfigError, match=r"engine\.num_gpus=1: 3 engines need 3 GPUs and the cluster has 2"):
        check_resources(EngineConfig(**GPU), 3, {"CPU": 8.0, "GPU": 2.0})
    with pytest.raises(ConfigError, match=r"engine\.num_gpus"):
        check_resources(EngineConfig(**GPU), 1, {"CPU": 8.0})
    with pytest.raises(ConfigError, match=r"engine\.num_cpus=2: 2 engines need 4 CPUs and the cluster has 3"):
        check_resources(EngineConfig(model="m", num_cpus=2), 2, {"CPU": 3.0})
    with pytest.raises(ConfigError, match="num_engines=0"):
        check_resources(EngineConfig(model="m"), 0, {"CPU": 3.0})


def test_model_folders(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "none"), "./none", "runs/models/none", ""):
        with pytest.raises(ConfigError, match=r"engine\.model=.*no such folder"):
            check_model_folder(missing)
    with pytest.raises(ConfigError, match=r"engine\.model=.*config\.json"):
        check_model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"engine\.model=.*no tokenizer"):
        check_model_folder(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    check_model_folder(str(tmp_path))


@pytest.mark.parametrize("hub_id", ["gpt2", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_hub_ids_are_left_to_the_hub(hub_id: str) -> None:
    check_model_folder(hub_id)


def test_block_events_are_of_one_cache_that_caches() -> None:
    assert EngineConfig(model="m").publishes_kv_events
    assert not EngineConfig(model="m", kv_events=False).publishes_kv_events
    assert not EngineConfig(model="m", enable_prefix_caching=False).publishes_kv_events
    assert not EngineConfig(model="m", extra={"data_parallel_size": 2}).publishes_kv_events
