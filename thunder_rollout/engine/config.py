"""One engine's settings: `conf/engine/*.yaml`, typed and checked.

Every engine of a run has the same. Whatever is wrong is a `ConfigError` naming `engine.<field>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thunder_rollout.errors import ConfigError

_CHOICES = {
    "kind": ("vllm", "fake"),
    "device": ("cpu", "gpu"),
    "logprobs_mode": ("raw_logprobs", "processed_logprobs"),
    "distributed_executor_backend": ("auto", "uni", "mp"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR"),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """`kind: fake` serves no model: tests and dry runs of everything around the engine.

    `num_cpus` and `num_gpus` are what Ray reserves for one engine. `extra` passes any other
    argument of vLLM's `AsyncEngineArgs` through.
    """

    model: str  # a folder, or a Hugging Face id
    kind: str = "vllm"
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None  # null: the model's own
    kv_cache_tokens: int | None = None  # null: what gpu_memory_utilization or cpu_kv_space_gib gives
    block_size: int = 32
    gpu_memory_utilization: float = 0.9
    cpu_kv_space_gib: int = 1
    kv_offload_gib: float = 0.0  # host memory of one engine that keeps KV which left its GPUs; 0: none
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: str = "auto"  # uni: in one process; mp: a process a GPU, on one node
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    kv_events: bool = True  # tell the scheduler which blocks the cache really holds
    release_on_pause: bool = False  # what paused and ended programs left in the cache goes first, before LRU
    enforce_eager: bool = False
    logprobs_mode: str = "raw_logprobs"
    seed: int = 0
    num_cpus: float = 1.0
    num_gpus: float | None = None  # null: one for each tensor and pipeline parallel rank, 0 on the CPU
    omp_threads: int = 1
    startup_timeout_s: float = 600.0
    report_s: float = 1.0  # the scheduler hears of an engine this often
    hang_s: float = 20.0  # an engine that has work and makes no step for so long, or answers nothing, is dead
    max_restarts: int = 12  # in a row without a step of work (a turn that kills takes 11), then the run does without it
    log_level: str = "WARNING"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        for name in (
            "block_size",
            "cpu_kv_space_gib",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "omp_threads",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        length = self.max_model_len
        _require(length is None or length >= 2, "max_model_len", length, "at least 2 (a prompt and an output), or null")
        usage = self.gpu_memory_utilization
        _require(0 < usage <= 1, "gpu_memory_utilization", usage, "in (0, 1]")
        for name in ("startup_timeout_s", "report_s", "hang_s"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        _require(self.num_cpus >= 0, "num_cpus", self.num_cpus, ">= 0")
        _require(self.max_restarts >= 0, "max_restarts", self.max_restarts, ">= 0")
        self._check_kv_cache()
        self._check_offload()
        self._check_gpus()

    @property
    def num_kv_blocks(self) -> int | None:
        return None if self.kv_cache_tokens is None else self.kv_cache_tokens // self.block_size

    @property
    def publishes_kv_events(self) -> bool:
        """Ranks of data parallelism have a cache each, and no one of them is what the scheduler sees."""
        single = self.extra.get("data_parallel_size", 1) == 1
        return self.kv_events and self.enable_prefix_caching and single

    @property
    def gpus(self) -> float:
        """GPUs of one engine."""
        if self.num_gpus is not None:
            return self.num_gpus
        return 0.0 if self.device == "cpu" else float(self.tensor_parallel_size * self.pipeline_parallel_size)

    def resources(self) -> dict[str, float]:
        """What Ray reserves for one engine: the bundle of its placement group."""
        wanted = {"CPU": self.num_cpus, "GPU": self.gpus}
        return {name: amount for name, amount in wanted.items() if amount > 0}

    def environment(self) -> dict[str, str]:
        """Variables to set in the engine's process before vLLM is imported there."""
        common = {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": self.log_level,
            "VLLM_ENGINE_READY_TIMEOUT_S": str(max(1, round(self.startup_timeout_s))),
        }
        if self.device == "gpu":
            return common
        return common | {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the machine's cores
            "OMP_NUM_THREADS": str(self.omp_threads),
            "TORCH_COMPILE_DISABLE": "1" if self.enforce_eager else "0",
        }

    def _check_kv_cache(self) -> None:
        blocks, tokens = self.num_kv_blocks, self.kv_cache_tokens
        if blocks is None:
            return
        _require(blocks >= 1, "kv_cache_tokens", tokens, f"at least one block of engine.block_size={self.block_size}")
        if self.max_model_len is not None and blocks * self.block_size < self.max_model_len:
            raise ConfigError(
                f"engine.kv_cache_tokens={tokens}: its {blocks} whole blocks of {self.block_size} can't hold one "
                f"turn of engine.max_model_len={self.max_model_len}; raise the first or lower the second"
            )

    def _check_offload(self) -> None:
        size = self.kv_offload_gib
        _require(size >= 0, "kv_offload_gib", size, ">= 0")
        if not size:
            return
        on = f"0, or engine.device=gpu: vLLM copies KV between a GPU and the host (here: {self.kind}, {self.device})"
        _require(self.kind == "vllm" and self.device == "gpu", "kv_offload_gib", size, on)
        hits = "0 where engine.enable_prefix_caching=false: what is offloaded is found by its prefix"
        _require(self.enable_prefix_caching, "kv_offload_gib", size, hits)

    def _check_gpus(self) -> None:
        size = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.device == "cpu":
            _require(self.gpus == 0, "num_gpus", self.num_gpus, "0 or null where engine.device=cpu")
        elif size == 1:
            _require(0 < self.gpus <= 1, "num_gpus", self.num_gpus, "in (0, 1] for an engine on one GPU")
        else:
            rule = f"null, or {size}: engine.tensor_parallel_size x engine.pipeline_parallel_size"
            _require(self.gpus == size, "num_gpus", self.num_gpus, rule)


def check_model_folder(model: str) -> None:
    """Raises `ConfigError` unless `model` is a loadable folder with a tokenizer, or a Hugging Face
    id (which is looked up when the engine starts)."""
    folder = Path(model).expanduser()
    if not model or not folder.is_dir():
        if _HUB_ID.fullmatch(model) and not folder.exists():
            return
        raise ConfigError(
            f"engine.model={model!r}: no such folder; give a model folder or a Hugging Face id "
            "(`make rollout` trains the default, the tiny policy of recipes/tiny_policy)"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"engine.model={model!r}: has no config.json; give the folder save_pretrained wrote")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ConfigError(
            f"engine.model={model!r}: has no tokenizer (tokenizer.json or vocabulary files); "
            "save the model's tokenizer into the same folder"
        )


def check_resources(config: EngineConfig, num_engines: int, cluster_resources: Mapping[str, float]) -> None:
    """Raises `ConfigError` if the Ray cluster can never hold `num_engines` engines.

    `cluster_resources` is `ray.cluster_resources()`.
    """
    if num_engines < 1:
        raise ConfigError(f"rollout.num_engines={num_engines}: must be at least 1; nothing generates without an engine")
    for resource, name in (("GPU", "num_gpus"), ("CPU", "num_cpus")):
        each = config.resources().get(resource, 0.0)
        there = cluster_resources.get(resource, 0.0)
        if each * num_engines > there:
            raise ConfigError(
                f"engine.{name}={each:g}: {num_engines} engines need {each * num_engines:g} {resource}s and the "
                f"cluster has {there:g}; lower it or the number of engines, or join a larger cluster (ray.address)"
            )


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"engine.{name}={value!r}: must be {rule}")
