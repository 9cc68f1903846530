"""What `EngineConfig` becomes as the arguments of vLLM's `AsyncEngineArgs`; imports vLLM when called."""

from __future__ import annotations

import difflib
import os
from typing import Any

from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.kv_events import BUFFER_STEPS, KvEvents
from thunder_rollout.engine.vllm_offload import offload_arguments
from thunder_rollout.errors import ConfigError

# our field for vLLM's argument, where it has another name
_FIELDS = {
    "num_gpu_blocks_override": "kv_cache_tokens",
    "kv_cache_memory_bytes": "cpu_kv_space_gib",
    "kv_offloading_size": "kv_offload_gib",
    "kv_transfer_config": "kv_offload_gib",
    "kv_events_config": "kv_events",
}


def engine_arguments(config: EngineConfig, known: set[str], events: KvEvents | None = None) -> dict[str, Any]:
    """Keyword arguments of `AsyncEngineArgs`; `known` are all that it has. Raises `ConfigError` for one of
    `engine.extra` that it doesn't have, or that this project sets."""
    own = {
        "model": os.path.expanduser(config.model),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "block_size": config.block_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "distributed_executor_backend": _executor(config),
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.enable_prefix_caching,
        "enforce_eager": config.enforce_eager,
        "logprobs_mode": config.logprobs_mode,
        "seed": config.seed,
        # vLLM keeps one block for itself
        "num_gpu_blocks_override": None if config.num_kv_blocks is None else config.num_kv_blocks + 1,
        "kv_events_config": _kv_events_config(events),
        # on the CPU; without it vLLM wants gpu_memory_utilization of the whole memory to be free
        "kv_cache_memory_bytes": config.cpu_kv_space_gib * 2**30 if config.device == "cpu" else None,
        "worker_extension_cls": "thunder_rollout.engine.vllm_reload.FileReload",
        **offload_arguments(config.kv_offload_gib),
    }
    for name in config.extra:
        if name in own:
            raise ConfigError(f"engine.extra.{name}: this project sets it; use engine.{_FIELDS.get(name, name)}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean engine.extra.{close[0]}?" if close else "see vLLM's engine arguments"
            raise ConfigError(f"engine.extra.{name}: vLLM has no such engine argument; {hint}")
    return own | config.extra


def _kv_events_config(events: KvEvents | None) -> Any:
    if events is None:
        return None
    from vllm.config import KVEventsConfig

    return KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint=events.endpoint,
        replay_endpoint=events.replay_endpoint,
        buffer_steps=BUFFER_STEPS,
    )


def _executor(config: EngineConfig) -> Any:
    """One worker runs inside the engine core. On the CPU vLLM would give it a process of its own, to
    set its OpenMP variables (`EngineConfig.environment` has set them already), and the two would
    spin on each other's shared memory for a second after every step, on the sandboxes' cores."""
    backend = config.distributed_executor_backend
    if backend == "auto":
        single = config.tensor_parallel_size * config.pipeline_parallel_size == 1
        backend = "uni" if single else "mp"
    from thunder_rollout.engine.vllm_executor import OwnedMultiprocExecutor, OwnedUniProcExecutor

    return OwnedUniProcExecutor if backend == "uni" else OwnedMultiprocExecutor
