"""`VllmEngine` over a core that fails, without vLLM."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.engine_contract import CONFIG, new_request
from thunder_rollout.engine.host import EngineHost
from thunder_rollout.engine.protocol import EngineInfo
from thunder_rollout.engine.vllm import VllmEngine
from thunder_rollout.engine.weights import MemoryWeights
from thunder_rollout.errors import EngineDied


class Core:
    """In place of vLLM's `AsyncLLM`: it never pauses, and `ends` when it is told to."""

    def __init__(self) -> None:
        self.errored = False
        self.process = SimpleNamespace(exitcode=None)
        self.engine_core: Any = SimpleNamespace(
            resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[self.process]))
        )

    def ends(self, code: int) -> None:
        self.errored = True
        self.process.exitcode = code

    async def pause_generation(self, **how: object) -> None:
        await asyncio.Event().wait()

    def shutdown(self, timeout_s: float) -> None:
        self.ends(-signal.SIGKILL)


class Started(VllmEngine):
    def __init__(self, core: Core) -> None:
        super().__init__(replace(CONFIG, hang_s=0.05))
        self._engine = core

    async def start(self) -> EngineInfo:
        return EngineInfo(
            capacity_tokens=4096, block_size=32, max_running=16, max_model_len=2048, vocab_size=512, model=""
        )


@pytest.mark.parametrize(("code", "by_turn"), [(-signal.SIGSEGV, True), (-signal.SIGKILL, False)])
async def test_a_turn_that_meets_a_core_just_gone_tells_why_it_went(code: int, by_turn: bool) -> None:
    """Before those that ran there have: the first word on a death is the one that counts for all of them."""
    core = Core()
    host = EngineHost(lambda: Started(core), hang_s=5.0)
    await host.start()
    core.ends(code)
    with pytest.raises(EngineDied, match=f"was killed by {signal.Signals(-code).name}") as caught:
        await host.generate(new_request([1, 2, 3]))
    assert caught.value.by_turn is by_turn
    await host.stop()


async def test_a_core_that_does_not_pause_for_new_weights_is_ended() -> None:
    core = Core()
    engine = Started(core)
    async with asyncio.timeout(5):
        with pytest.raises(EngineDied, match="did not pause within"):
            await engine._load_weights(core, MemoryWeights(shapes={}, buckets=()), "1")
    assert core.errored
    with pytest.raises(EngineDied, match="did not pause within"):
        await engine.stats()
