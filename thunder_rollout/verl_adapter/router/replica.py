"""What a router reads of a replica, through verl's own server actor.

`read_facts` and `read_state` run inside the actor's process, on verl's server object, and touch nothing
but attributes of it: no call of verl's or vLLM's is made, no turn is delayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from thunder_rollout.engine.vllm import kv_capacity_tokens
from thunder_rollout.errors import ConfigError

VERL_KEY = "actor_rollout_ref.rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """By what verl's validation traffic can be told from the rest."""

    temperature: float
    top_p: float
    top_k: int

    def matches(self, params: Mapping[str, Any]) -> bool:
        return all(params.get(name) == getattr(self, name) for name in ("temperature", "top_p", "top_k"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFacts:
    """What stays as it is while the replica lives. `placeholder_ids` stand for images and videos."""

    capacity_tokens: int
    max_running: int
    block_size: int
    validation: Sampling | None = None  # None: validation samples as training does
    placeholder_ids: frozenset[int] = frozenset()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """`version` is verl's `global_steps`; `paused`: requests are aborted or parked, for new weights or since
    its GPUs are training's for now; `prompt_lengths` of all requests it has, None where it does not tell."""

    paused: bool = False
    version: int | None = None
    prompt_lengths: tuple[int, ...] | None = ()
    broken: str | None = None  # why it will never serve again


class ReplicaPort(Protocol):
    """A replica as the router sees it. `handle` is what verl's client calls."""

    @property
    def handle(self) -> Any: ...

    async def facts(self) -> ReplicaFacts:
        """Raises `ConfigError` for a replica that can't be scheduled, `EngineDied` for a dead one, `TimeoutError` for
        one that can't be reached for now."""

    async def state(self) -> ReplicaState:
        """Raises `EngineDied` for a dead one."""


def read_facts(server: Any, capacity_tokens: int | None, block_size: int) -> ReplicaFacts:
    """The last two are for servers that do not tell; raises `ConfigError` for what can't be scheduled."""
    config = server.config
    _refuse_unschedulable(config)
    vllm_config = getattr(getattr(server, "engine", None), "vllm_config", None)
    if vllm_config is not None:
        capacity_tokens = kv_capacity_tokens(vllm_config)
        block_size = vllm_config.cache_config.block_size
    elif capacity_tokens is None:
        raise ConfigError(
            f"capacity_tokens: replicas of {VERL_KEY}.name={config.name} ({type(server).__name__}) do not tell how "
            "many KV tokens they hold; set capacity_tokens and block_size in the router's YAML, or use vllm"
        )
    return ReplicaFacts(
        capacity_tokens=capacity_tokens,
        max_running=config.max_num_seqs,
        block_size=block_size,
        validation=_validation(config),
        placeholder_ids=_placeholder_ids(server),
        warnings=_warnings(config),
    )


def read_state(server: Any) -> ReplicaState:
    engine, manager = getattr(server, "engine", None), getattr(server, "tokenizer_manager", None)
    lengths = None
    if engine is not None and hasattr(engine, "output_processor"):
        requests = engine.output_processor.request_states.values()
        lengths = tuple(request.prompt_len for request in requests)
    elif manager is not None:
        lengths = tuple(len(request.obj.input_ids) for request in list(manager.rid_to_state.values()))
    return ReplicaState(
        paused=_is_paused(server),
        version=server.global_steps,
        prompt_lengths=lengths,
        broken="its engine core died" if getattr(engine, "errored", False) else None,
    )


def _refuse_unschedulable(config: Any) -> None:
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"{VERL_KEY}.data_parallel_size={config.data_parallel_size}: such a replica has several KV pools and "
            "picks one by itself; use 1 and more replicas (tensor_model_parallel_size as it is), or leave "
            f"{VERL_KEY}.router_config_path=null"
        )
    if config.disaggregation.enabled:
        raise ConfigError(
            f"{VERL_KEY}.disaggregation.enabled=true: prefill and decode have pools of their own, between which a "
            f"program's KV moves; use false, or leave {VERL_KEY}.router_config_path=null"
        )


def _validation(config: Any) -> Sampling | None:
    train, validation = (
        Sampling(temperature=source.temperature, top_p=source.top_p, top_k=source.top_k)
        for source in (config, config.val_kwargs)
    )
    return validation if validation != train else None


def _warnings(config: Any) -> tuple[str, ...]:
    warnings = []
    if config.full_determinism:
        warnings.append(
            f"{VERL_KEY}.full_determinism=true: verl then picks a replica by the request's name, and so its seed; "
            "this router picks by memory, so two runs may differ"
        )
    if not config.enable_prefix_caching:
        warnings.append(f"{VERL_KEY}.enable_prefix_caching=false: no program's KV outlives its turn; set it to true")
    return tuple(warnings)


def _placeholder_ids(server: Any) -> frozenset[int]:
    processor = getattr(server.model_config, "processor", None)
    if processor is None:
        return frozenset()
    from verl.workers.rollout.utils import get_vision_placeholder_token_ids

    return frozenset(get_vision_placeholder_token_ids(processor))


def _is_paused(server: Any) -> bool:
    """verl's servers for vLLM and TensorRT-LLM keep it themselves, that for SGLang leaves it to SGLang."""
    allowed = getattr(server, "_generation_allowed", None)  # TensorRT-LLM's
    manager = getattr(server, "tokenizer_manager", None)  # SGLang's
    return (
        bool(getattr(server, "_submission_paused", False))
        or (allowed is not None and not allowed.is_set())
        or (manager is not None and bool(manager.is_pause))
    )
