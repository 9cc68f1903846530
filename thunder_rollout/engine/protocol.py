"""The engine seam: token ids in, token ids and log-probabilities out.

`VllmEngine` and `FakeEngine` both honour it (tests/unit/engine and tests/vllm run the same
contract). No text crosses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from thunder_rollout.core.events import INITIAL_VERSION
from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.weights import UpdateMode, WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample one turn; field names are vLLM's `SamplingParams`."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One turn. `prompt_ids` is the program's whole context, exactly as the model must see it.

    With `engine.release_on_pause` the engine keeps in mind what `program` has cached, and gives up first
    what the `released` programs had that no other has. A hint: it changes no token.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: Sampling
    priority: int = 0
    max_together: int | None = None  # `EngineHost` runs at most so many turns while it runs, itself among them
    program: str | None = None
    released: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One turn's result.

    `token_ids` (N,) are the ids produced, the stop token included; `logprobs` (N,) their
    log-probabilities under the sampling distribution the engine reports (vLLM's
    `logprobs_mode`, default raw); `cached_tokens` of the `prompt_tokens` came from the cache.
    All of them are of the weights `weight_version`.
    `finish_reason` is one of `core.events.FinishReason`. Times are seconds in the engine.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    weight_version: str = INITIAL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Read from the running engine, not from the configuration. `offload_tokens` of KV fit its tier in
    host memory, 0: it has none; it `releases` what it is told of (`GenerateRequest.released`)."""

    capacity_tokens: int
    block_size: int
    max_running: int
    max_model_len: int
    vocab_size: int
    model: str
    offload_tokens: int = 0
    releases: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """`in_flight` are the turns that it should be working on; with any, `num_steps` grows."""

    weight_version: str
    in_flight: int
    num_steps: int  # since start
    used_tokens: int
    running: int
    waiting: int
    prompt_tokens: int  # totals since start
    cached_tokens: int
    output_tokens: int
    preemptions: int


class Engine(Protocol):
    async def start(self) -> EngineInfo:
        """Load the model and allocate the KV pool. Raises `ConfigError` or `EngineDied`."""

    async def generate(self, request: GenerateRequest) -> Generation:
        """Run one turn. Raises `RequestError` if it can't be borne (the engine never sees it),
        `EngineDied` if the engine is gone. Cancelling the call aborts the turn."""

    async def abort(self, request_id: str) -> None:
        """Cut a turn; its `generate` returns what it has with finish reason `abort`."""

    async def stats(self) -> EngineStats: ...

    async def reset_prefix_cache(self) -> None:
        """Forget every cached block that no running turn holds."""

    async def cache_changes(self, *, whole: bool = False) -> CacheChanges | None:
        """What the prefix cache took in and gave up since the last call (`whole`: all it holds); for one
        caller. None while that isn't known, from an engine without block events always."""

    async def check_weights(self, source: WeightSource) -> None:
        """Raises `WeightsRefused` if `update_weights` would."""

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        """Serve these weights, called `version`, from now on; the cache is void. Turns in flight finish first
        or are cut (they return with finish reason `abort`), turns that come meanwhile wait.

        Raises `WeightsRefused` (the old weights serve on) if they are not this model's, `EngineDied` if
        the engine is gone, or hangs once its turns were cut, or loading failed half-way, which ends it.
        Cancelled, it leaves either version whole."""

    async def stop(self) -> None:
        """Idempotent; frees the model and its processes."""
