"""`VllmEngine`: the engine Protocol over vLLM's `AsyncLLM`.

vLLM is imported by `start`, never before: it reads its environment when it is imported. What vLLM
raises becomes one of our errors here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from thunder_rollout.core.events import FinishReason
from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.config import EngineConfig, check_model_folder
from thunder_rollout.engine.exit_codes import ended_from_outside
from thunder_rollout.engine.kv_events import KvEvents
from thunder_rollout.engine.protocol import EngineInfo, EngineStats, GenerateRequest, Generation
from thunder_rollout.engine.request_check import RequestLimits, check_request
from thunder_rollout.engine.scratch import Scratch
from thunder_rollout.engine.vllm_arguments import engine_arguments
from thunder_rollout.engine.vllm_offload import offload_tokens
from thunder_rollout.engine.vllm_release import make_releasing, release_arguments
from thunder_rollout.engine.weights import (
    UpdateGate,
    UpdateMode,
    WeightSource,
    check_weights,
    files_of,
    half_loaded,
    pause_in_time,
)
from thunder_rollout.errors import ConfigError, EngineDied, EngineFailed, RequestError, ThunderError

logger = logging.getLogger(__name__)

_SEE_LOG = "the cause is in Ray's logs (of this machine's newest cluster: /tmp/ray/session_latest/logs)"
_EXIT_WAIT_S, _EXIT_POLL_S = 5.0, 0.1  # a core that failed says so before it exits
_STOP_GRACE_S = 1.0  # an engine has nothing to save; its processes are killed after this

# vLLM reports a repeated pattern (its own detector) under a reason of its own; it ended the turn.
_FINISH_REASONS = {"repetition": FinishReason.STOP} | {str(reason): reason for reason in FinishReason}


class VllmEngine:
    """One engine; starts once. `stop` must be awaited, also after a failed or cancelled `start`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine: Any = None
        self._loading: asyncio.Task[Any] | None = None
        self._stopped = False
        self._gauges = _Gauges()
        self._releases = False
        self._gate = UpdateGate()
        self._half_loaded: EngineDied | None = None
        self._totals = {"prompt": 0, "cached": 0, "output": 0}
        self._limits: RequestLimits
        self._capacity_tokens = 0
        self._scratch: Scratch
        self._events: KvEvents | None = None

    async def start(self) -> EngineInfo:
        if self._loading is not None:
            raise ConfigError("an engine starts once; make another")
        check_model_folder(self._config.model)
        self._scratch = Scratch()
        if self._config.publishes_kv_events:
            self._events = KvEvents(self._scratch.path)
        self._loading = asyncio.create_task(
            asyncio.to_thread(_load, self._config, self._gauges, self._scratch, self._events)
        )
        self._engine = await asyncio.shield(self._loading)
        vllm_config = self._engine.vllm_config
        self._releases = self._config.release_on_pause and vllm_config.scheduler_config.scheduler_cls is not None
        self._capacity_tokens = kv_capacity_tokens(vllm_config)
        self._limits = RequestLimits(
            vocab_size=vllm_config.model_config.get_vocab_size(),
            max_model_len=vllm_config.model_config.max_model_len,
            capacity_tokens=self._capacity_tokens,
            seeds=self._config.device != "cpu",
        )
        if self._events is not None:
            self._events.start(vllm_config.cache_config.block_size)
        return EngineInfo(
            capacity_tokens=self._capacity_tokens,
            block_size=vllm_config.cache_config.block_size,
            max_running=vllm_config.scheduler_config.max_num_seqs,
            max_model_len=vllm_config.model_config.max_model_len,
            vocab_size=vllm_config.model_config.get_vocab_size(),
            model=self._config.model,
            offload_tokens=offload_tokens(vllm_config, self._config.kv_offload_gib),
            releases=self._releases,
        )

    async def generate(self, request: GenerateRequest) -> Generation:
        await self._serving()
        prompt_ids = check_request(request, self._limits)
        async with self._gate.turn(request.request_id):
            output = await self._final_output(await self._serving(), request, prompt_ids)
            generation = _to_generation(output, num_prompt=len(prompt_ids), weight_version=self._gate.version)
        self._totals["prompt"] += generation.prompt_tokens
        self._totals["cached"] += generation.cached_tokens
        self._totals["output"] += len(generation.token_ids)
        return generation

    async def abort(self, request_id: str) -> None:
        await (await self._serving()).abort(request_id)

    async def stats(self) -> EngineStats:
        await self._serving()
        gauges, idle = self._gauges, not self._gate.in_flight  # vLLM reports only while it works
        return EngineStats(
            weight_version=self._gate.version,
            in_flight=len(self._gate.in_flight),
            num_steps=gauges.num_steps,
            used_tokens=0 if idle else round(gauges.kv_usage * self._capacity_tokens),
            running=0 if idle else gauges.running,
            waiting=0 if idle else gauges.waiting,
            prompt_tokens=self._totals["prompt"],
            cached_tokens=self._totals["cached"],
            output_tokens=self._totals["output"],
            preemptions=gauges.preemptions,
        )

    async def reset_prefix_cache(self) -> None:
        """vLLM forgets all or nothing: where turns run, they are preempted and computed again."""
        engine = await self._serving()
        offloads = self._config.kv_offload_gib > 0
        if not await engine.reset_prefix_cache(reset_connector=offloads):
            await engine.reset_prefix_cache(reset_running_requests=True, reset_connector=offloads)
        if self._events is not None:
            self._events.note_cleared()

    async def cache_changes(self, *, whole: bool = False) -> CacheChanges | None:
        await self._serving()
        return await self._events.changes(whole=whole) if self._events is not None else None

    async def check_weights(self, source: WeightSource) -> None:
        await self._serving()
        await asyncio.to_thread(check_weights, source, self._config.model)

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        engine = await self._serving()
        await asyncio.to_thread(check_weights, source, self._config.model)
        await self._gate.update(
            version,
            lambda: self._load_weights(engine, source, version),
            cut=None if mode is UpdateMode.WAIT else engine.abort,
        )

    async def stop(self) -> None:
        self._stopped = True
        if self._loading is None:
            return
        await asyncio.wait([self._loading])
        try:
            if not self._loading.cancelled() and self._loading.exception() is None:
                await asyncio.to_thread(self._loading.result().shutdown, _STOP_GRACE_S)
        finally:
            if self._events is not None:
                self._events.close()
            self._scratch.close()

    def _running(self) -> Any:
        if self._engine is None or self._stopped:
            raise EngineDied(f"engine {self._config.model} is not running")
        if self._half_loaded is not None:
            raise self._half_loaded
        return self._engine

    async def _serving(self) -> Any:
        """Whoever comes first after a death says why: it is the only one that is listened to (`EngineHost`)."""
        if self._running().errored:
            raise await self._death()
        return self._engine

    async def _death(self) -> EngineDied:
        """Why the engine core is gone, by its exit code, which is also that of a worker process that was killed
        (`engine.vllm_executor`)."""
        if self._stopped:
            return EngineDied(f"engine {self._config.model} was stopped")
        for _ in range(round(_EXIT_WAIT_S / _EXIT_POLL_S)):
            if (code := _exit_code(self._engine)) is not None:
                break
            await asyncio.sleep(_EXIT_POLL_S)
        if code is None:
            why = "gave up"
        else:
            why = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return EngineDied(f"engine {self._config.model} {why}; {_SEE_LOG}", by_turn=not ended_from_outside(code))

    async def _load_weights(self, engine: Any, source: WeightSource, version: str) -> None:
        """No turn is inside. Anything that fails here leaves weights that no turn may see."""
        await self._serving()
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                pause = engine.pause_generation(mode="abort", clear_cache=True)
                await pause_in_time(pause, hang_s=self._config.hang_s)
                if self._events is not None:
                    self._events.note_cleared()
                await engine.collective_rpc("begin_reload")
                for file in files_of(source):
                    with ExitStack() as opened:
                        path = await asyncio.to_thread(opened.enter_context, file)
                        await engine.collective_rpc("reload_file", args=(path,))
                await engine.collective_rpc("end_reload")
                await engine.update_weight_version(version)
                await engine.resume_generation()
        except Exception as error:
            self._half_loaded = half_loaded(self._config.model, version, error)
            await asyncio.to_thread(engine.shutdown, _STOP_GRACE_S)
            raise self._half_loaded from error

    async def _final_output(self, engine: Any, request: GenerateRequest, prompt_ids: list[int]) -> Any:
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        outputs = engine.generate(
            tokens_input(prompt_ids),
            _sampling_params(request, releases=self._releases),
            request.request_id,
            priority=request.priority,
        )
        try:
            async for output in outputs:
                if output.finished:
                    return output
        except asyncio.CancelledError:
            # vLLM aborts a turn that was cancelled while it ran, not one cancelled while being added
            await asyncio.shield(engine.abort(request.request_id))
            raise
        except EngineDeadError as error:
            raise await self._death() from error
        except (EngineGenerateError, ValueError, TypeError) as error:
            if engine.errored or self._stopped:
                raise await self._death() from error
            if isinstance(error, EngineGenerateError) and not isinstance(error.__cause__, ValueError | TypeError):
                raise EngineFailed(f"request {request.request_id}: {error.__cause__ or error}; {_SEE_LOG}") from error
            raise RequestError(f"request {request.request_id}: vLLM refused it: {error.__cause__ or error}") from error
        finally:
            await outputs.aclose()
        raise EngineDied(f"engine {self._config.model} ended request {request.request_id} without a result")


class _Gauges:
    """The newest of what vLLM's scheduler reports; vLLM calls it once a step."""

    def __init__(self) -> None:
        self.kv_usage = 0.0
        self.running = 0
        self.waiting = 0
        self.preemptions = 0
        self.num_steps = 0

    def update(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        self.num_steps += 1
        if scheduler_stats is not None:
            self.kv_usage = scheduler_stats.kv_cache_usage
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs


def _load(config: EngineConfig, gauges: _Gauges, scratch: Scratch, events: KvEvents | None) -> Any:
    """Import vLLM and start an `AsyncLLM`; takes seconds to minutes, so it runs in a thread."""
    if "vllm" not in sys.modules:
        os.environ.update(config.environment())
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class GaugeLogger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            gauges.update(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    try:
        args = AsyncEngineArgs(**engine_arguments(config, {f.name for f in fields(AsyncEngineArgs)}, events))
        vllm_config = args.create_engine_config()
        if config.release_on_pause:
            make_releasing(vllm_config)
    except ThunderError:
        raise
    except Exception as error:
        raise ConfigError(f"engine: vLLM refuses this configuration of {config.model}: {error}") from error
    try:
        with scratch.for_vllm():
            return AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[GaugeLogger], disable_log_stats=True)
    except Exception as error:
        raise EngineDied(f"engine {config.model} did not start ({error}); {_SEE_LOG}") from error


def _exit_code(engine: Any) -> int | None:
    """Of the engine core's process (the first that failed, where there are several); None while all run."""
    manager = engine.engine_core.resources.engine_manager
    codes = [process.exitcode for process in manager.processes]
    return next((code for code in codes if code is not None), None)


def kv_capacity_tokens(vllm_config: Any) -> int:
    """KV tokens that turns can hold: all blocks but the one vLLM keeps for itself.

    Counted through the number of full-length turns that fit, which is right also where a model has
    several kinds of attention that share the blocks.
    """
    cache, max_model_len = vllm_config.cache_config, vllm_config.model_config.max_model_len
    turns = getattr(cache, "kv_cache_max_concurrency", None)
    if turns is None:
        return (cache.num_gpu_blocks - 1) * cache.block_size
    blocks_per_turn = -(-max_model_len // cache.block_size)
    return (round(turns * blocks_per_turn) - 1) * cache.block_size


def _sampling_params(request: GenerateRequest, *, releases: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=0,  # of the sampled token alone
        detokenize=False,
        skip_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=release_arguments(request) if releases else None,
    )


def _to_generation(output: Any, *, num_prompt: int, weight_version: str) -> Generation:
    completion, times = output.outputs[0], output.metrics
    token_ids = list(completion.token_ids)
    entries = completion.logprobs or []
    pairs = zip(token_ids, entries, strict=False)  # engine.result_check finds a difference
    logprobs = [entry[token_id].logprob for token_id, entry in pairs]
    return Generation(
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=_FINISH_REASONS.get(completion.finish_reason, FinishReason.ERROR),
        prompt_tokens=num_prompt,
        cached_tokens=max(0, output.num_cached_tokens or 0),
        queue_s=_between(times, "queued_ts", "scheduled_ts"),
        prefill_s=_between(times, "scheduled_ts", "first_token_ts"),
        decode_s=_between(times, "first_token_ts", "last_token_ts"),
        weight_version=weight_version,
    )


def _between(times: Any, start: str, end: str) -> float:
    """Seconds from one of vLLM's time stamps to another; 0 for a stage the turn never reached."""
    started, ended = getattr(times, start, 0.0), getattr(times, end, 0.0)
    return max(0.0, ended - started) if started and ended else 0.0
