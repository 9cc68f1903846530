"""`FakeEngine`: a real block pool and a real batching scheduler, but no model.

Its time is the event loop's: real under `asyncio.run`, virtual under
`virtual_time.run_in_virtual_time`. Tokens are a hash of the prompt and their position, or what a
script says, and of the weights' version; log-probabilities are made up but negative and repeatable.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thunder_rollout.core.events import INITIAL_VERSION, FinishReason
from thunder_rollout.engine.cache_report import CacheChanges, CacheReport
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.hashing import ROOT_HASH, chain_hash
from thunder_rollout.engine.model import EngineModel, EngineShape, EngineTiming
from thunder_rollout.engine.protocol import EngineInfo, EngineStats, GenerateRequest, Generation, Sampling
from thunder_rollout.engine.request_check import RequestLimits, check_request
from thunder_rollout.engine.weights import FolderWeights, UpdateGate, UpdateMode, WeightSource, pause_in_time
from thunder_rollout.errors import ConfigError, EngineDied, WeightsRefused

logger = logging.getLogger(__name__)

Script = Callable[[list[int], Sampling], list[int]]

DEFAULT_MAX_MODEL_LEN = 4096
DEFAULT_KV_CACHE_TURNS = 8  # the pool holds this many turns of max_model_len if nothing else is said


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    request: GenerateRequest
    done: asyncio.Future[Generation]
    script: list[int] | None
    root: int
    queued_at_s: float
    admitted_at_s: float | None = None
    first_token_at_s: float | None = None


class FakeEngine:
    """`script(prompt_ids, sampling)` gives a turn's whole output (it ends there with reason `stop`,
    or before with `length` at `max_tokens`). Loading weights takes `update_s`. `die()` and `hang()` are
    the faults to inject."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        timing: EngineTiming | None = None,
        script: Script | None = None,
        vocab_size: int = 32_000,
        update_s: float = 0.0,
    ) -> None:
        max_model_len = config.max_model_len or DEFAULT_MAX_MODEL_LEN
        num_blocks = config.num_kv_blocks or -(-max_model_len // config.block_size) * DEFAULT_KV_CACHE_TURNS
        self._shape = EngineShape(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_running=config.max_num_seqs,
            max_batched_tokens=config.max_num_batched_tokens,
            enable_caching=config.enable_prefix_caching,
        )
        self._limits = RequestLimits(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            capacity_tokens=self._shape.capacity_tokens,
            seeds=config.device != "cpu",
        )
        self._name = config.model
        self._hang_s = config.hang_s
        self._releases = config.release_on_pause
        self._script = script
        self._model = EngineModel(self._shape, timing or EngineTiming())
        self._report = CacheReport()
        self._publishes_kv_events = config.publishes_kv_events
        self._pending: dict[str, _Pending] = {}
        self._gate = UpdateGate()
        self._update_s = update_s
        self._work = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._dead: str | None = "the engine was not started"
        self._totals = {"prompt": 0, "cached": 0, "output": 0}
        self._num_steps = 0
        self._hangs = False

    async def start(self) -> EngineInfo:
        if self._runner is not None:
            raise ConfigError("an engine starts once; make another")
        self._dead = None
        self._runner = asyncio.create_task(self._run(), name="fake-engine")
        self._runner.add_done_callback(self._on_runner_done)
        return EngineInfo(
            capacity_tokens=self._shape.capacity_tokens,
            block_size=self._shape.block_size,
            max_running=self._shape.max_running,
            max_model_len=self._limits.max_model_len,
            vocab_size=self._limits.vocab_size,
            model=self._name,
            releases=self._releases,
        )

    async def generate(self, request: GenerateRequest) -> Generation:
        self._check_alive()
        prompt_ids = check_request(request, self._limits)
        async with self._gate.turn(request.request_id):
            self._check_alive()
            return await self._run_turn(request, prompt_ids)

    async def _run_turn(self, request: GenerateRequest, prompt_ids: list[int]) -> Generation:
        pending = _Pending(
            request=request,
            done=asyncio.get_running_loop().create_future(),
            script=None if self._script is None else self._script(prompt_ids, request.sampling),
            root=chain_hash(_weights_hash(self._gate.version), prompt_ids),
            queued_at_s=_now_s(),
        )
        self._pending[request.request_id] = pending
        for program in request.released:
            self._model.release(program)
        self._model.add(request.request_id, prompt_ids, request.program if self._releases else None)
        self._work.set()
        try:
            return await pending.done
        finally:
            if self._pending.get(request.request_id) is pending:
                self._drop(request.request_id)

    async def abort(self, request_id: str) -> None:
        self._check_alive()
        if request_id in self._pending:
            self._finish(request_id, FinishReason.ABORT)

    async def stats(self) -> EngineStats:
        self._check_alive()
        return EngineStats(
            weight_version=self._gate.version,
            in_flight=len(self._pending),
            num_steps=self._num_steps,
            used_tokens=self._model.used_tokens,
            running=self._model.num_running,
            waiting=self._model.num_waiting,
            prompt_tokens=self._totals["prompt"],
            cached_tokens=self._totals["cached"],
            output_tokens=self._totals["output"],
            preemptions=self._model.num_preemptions,
        )

    async def reset_prefix_cache(self) -> None:
        self._check_alive()
        self._model.forget_cache()

    async def cache_changes(self, *, whole: bool = False) -> CacheChanges | None:
        self._check_alive()
        if not self._publishes_kv_events:
            return None
        return self._report.changes(self._model.cached_hashes(), whole=whole)

    async def check_weights(self, source: WeightSource) -> None:
        self._check_alive()
        if isinstance(source, FolderWeights) and not Path(source.path).is_dir():
            raise WeightsRefused(f"weights {source.path}: no such folder; give one that the engines can read")

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        await self.check_weights(source)
        await self._gate.update(version, self._load_weights, cut=None if mode is UpdateMode.WAIT else self._cut)

    async def stop(self) -> None:
        self.die("it was stopped")
        if self._runner is not None:
            await asyncio.wait([self._runner])

    def hang(self) -> None:
        """Make no step any more."""
        self._hangs = True

    def die(self, why: str = "it was killed by a test", *, by_turn: bool = False) -> None:
        """Fail every turn, now and later, with `EngineDied`. Idempotent."""
        if self._dead is None:
            self._dead = why
        if self._runner is not None:
            self._runner.cancel()
        for request_id, pending in list(self._pending.items()):
            if not pending.done.done():
                pending.done.set_exception(EngineDied(f"engine {self._name} is gone: {self._dead}", by_turn=by_turn))
            self._drop(request_id)

    async def _cut(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if request_id in self._pending:
                self._finish(request_id, FinishReason.ABORT)

    async def _load_weights(self) -> None:
        try:
            await pause_in_time(self._pause(), hang_s=self._hang_s)
        except EngineDied as error:
            self.die(str(error))
            raise
        await asyncio.sleep(self._update_s)
        self._check_alive()
        self._model.forget_cache()

    async def _pause(self) -> None:
        if self._hangs:
            await asyncio.Event().wait()

    async def _run(self) -> None:
        while True:
            step = None if self._hangs else self._model.begin_step()
            if step is None:
                self._work.clear()
                await self._work.wait()
                continue
            for request_id in step.admitted:
                pending = self._pending[request_id]
                if pending.admitted_at_s is None:
                    pending.admitted_at_s = _now_s()
            scheduled = {request_id: self._pending[request_id] for request_id in step.sampled}
            await asyncio.sleep(step.took_s)
            self._num_steps += 1
            sampled = [request_id for request_id, turn in scheduled.items() if self._pending.get(request_id) is turn]
            self._model.end_step({request_id: self._next_token(request_id) for request_id in sampled})
            for request_id in sampled:
                self._after_token(request_id)

    def _on_runner_done(self, runner: asyncio.Task[None]) -> None:
        if not runner.cancelled() and (error := runner.exception()) is not None:
            logger.error("engine=%s failed", self._name, exc_info=error)
            self.die(repr(error))

    def _next_token(self, request_id: str) -> int:
        pending = self._pending[request_id]
        position = len(self._model.output_ids(request_id))
        if pending.script is not None and position < len(pending.script):
            return pending.script[position]
        return chain_hash(pending.root, [position]) % self._limits.vocab_size

    def _after_token(self, request_id: str) -> None:
        pending = self._pending[request_id]
        sampling = pending.request.sampling
        if pending.first_token_at_s is None:
            pending.first_token_at_s = _now_s()
        output = self._model.output_ids(request_id)
        scripted_end = pending.script is not None and len(output) >= len(pending.script)
        if scripted_end or output[-1] in sampling.stop_token_ids:
            self._finish(request_id, FinishReason.STOP)
        elif len(output) >= sampling.max_tokens:
            self._finish(request_id, FinishReason.LENGTH)

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        pending = self._pending[request_id]
        token_ids = self._model.output_ids(request_id)
        cached_tokens = self._model.cached_tokens(request_id)
        num_prompt = len(pending.request.prompt_ids)
        now_s = _now_s()
        admitted_s = now_s if pending.admitted_at_s is None else pending.admitted_at_s
        first_token_s = now_s if pending.first_token_at_s is None else pending.first_token_at_s
        self._drop(request_id)
        self._totals["prompt"] += num_prompt
        self._totals["cached"] += cached_tokens
        self._totals["output"] += len(token_ids)
        if pending.done.done():
            return
        pending.done.set_result(
            Generation(
                token_ids=token_ids,
                logprobs=[_fake_logprob(pending.root, position) for position in range(len(token_ids))],
                finish_reason=reason,
                prompt_tokens=num_prompt,
                cached_tokens=cached_tokens,
                queue_s=admitted_s - pending.queued_at_s,
                prefill_s=first_token_s - admitted_s,
                decode_s=now_s - first_token_s,
                weight_version=self._gate.version,
            )
        )

    def _drop(self, request_id: str) -> None:
        del self._pending[request_id]
        self._model.remove(request_id)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDied(f"engine {self._name} is gone: {self._dead}")


def _weights_hash(version: str) -> int:
    return ROOT_HASH if version == INITIAL_VERSION else zlib.crc32(version.encode())


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _fake_logprob(root: int, position: int) -> float:
    return -(1 + chain_hash(root, [position, 1]) % 4000) / 1000
